"""Prefill workers in processes and threads of their own: pages over ZeroMQ, and what becomes of a dead one's prompts.

No device: the tokens are a function of what the pages hold, so a page that is wrong, late or of another attempt shows.
"""

import contextlib
import dataclasses
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
from helpers import two_sides as sides
from helpers.fake_runner import expected_tokens
from helpers.ports import free_port
from helpers.requests import request

from jaxllm.config import ConfigError
from jaxllm.core import FinishReason, RequestError, Sequence
from jaxllm.engine.disagg.handoff import Key, PrefillRestarted
from jaxllm.engine.disagg.messages import VERSION, Asked, Begin, Block, Hello, Welcome


def free_address():
    return f"127.0.0.1:{free_port()}"


@contextlib.contextmanager
def process(address, step_s=0.0):
    """A worker that can be killed."""
    command = [sys.executable, str(Path(sides.__file__)), address, str(step_s)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout.readline() == "listening\n"
        yield started
    finally:
        started.kill()
        started.wait()
        started.stdout.close()


@contextlib.contextmanager
def thread(address, **more):
    """A worker whose inside can be looked at, once it has ended."""
    worker = sides.worker(address, **more)
    body = threading.Thread(target=worker.run)
    body.start()
    try:
        yield worker
    finally:
        worker.stopped = True
        body.join(10)
        assert not body.is_alive()
        worker.socket.close(linger=0)


@contextlib.contextmanager
def served(addresses, **settings):
    engine = sides.decode_side(sides.peers(addresses, **settings))
    try:
        yield engine
    finally:
        engine.prefill.close()


def run(engine, until=lambda: False, seconds=20.0):
    outputs, deadline = [], time.monotonic() + seconds
    while engine.has_work and not until():
        assert time.monotonic() < deadline, "still work"
        outputs += engine.step()
        engine.check()
    return outputs


def right(sequence):
    count = sequence.num_output
    return sequence.output_token_ids == expected_tokens(sequence.request.prompt_token_ids, count, index=sequence.index)


def halfway(engine):
    """Of some prompt of the first worker some pages have come and some have not."""
    mine = [engine._handoffs[prompt.key] for prompt in engine.prefill._peers[0].prompts.values()]
    return any(0 < one.missing < (len(one.sequence.pages) - one.first_page) * engine.num_groups for one in mine)


def told(outputs, sequence):
    return [out.token_id for out in outputs if out.sequence is sequence and out.token_id is not None]


def test_pages_that_went_through_a_socket_give_the_tokens_of_one_engine():
    address = free_address()
    with thread(address, chunk=7) as worker, served([address]) as engine:
        asked = [engine.add(request(f"r{i}", 3 + 5 * i, max_tokens=5 + i, n=1 + i % 2)) for i in range(8)]
        asked = [sequence for one in asked for sequence in one]
        outputs = run(engine)
        assert all(sequence.finish_reason is FinishReason.LENGTH for sequence in asked)
        assert all(map(right, asked))
        assert all(told(outputs, sequence) == sequence.output_token_ids for sequence in asked)
        sides.whole(engine)
    worker.side.check()
    assert worker.side.scheduler.pool.num_held == 0
    assert not worker._keys
    assert not engine.prefill._prompts


def test_log_probabilities_of_the_prompt_and_hits_of_either_side_come_over():
    address = free_address()
    shared = tuple(range(300, 320))
    with thread(address), served([address]) as engine:
        first = engine.add(request("a", (*shared, 1), max_tokens=2, prompt_logprobs=0))[0]
        outputs = run(engine)
        assert [lp.token_id for out in outputs for lp in out.prompt_logprobs] == first.tokens[1:21]
        engine.decode.scheduler.cache.evict(64)
        again = engine.add(request("b", (*shared, 2, 3), max_tokens=2))[0]
        run(engine)
        assert again.num_cached == 20  # found where it was computed
        assert right(again)


def test_a_worker_that_is_killed_under_load_loses_no_prompt_and_repeats_no_token():
    address, other = free_address(), free_address()
    with served([address, other]) as engine, process(other, 0.01) as second:
        with process(address, 0.01) as first:
            early = [engine.add(request(f"e{i}", 9 + i, max_tokens=40))[0] for i in range(4)]
            outputs = run(engine, until=lambda: all(s.num_output > 3 for s in early))
            late = [engine.add(request(f"l{i}", 60 + 3 * i, max_tokens=6))[0] for i in range(8)]
            outputs += run(engine, until=lambda: halfway(engine) and engine.prefill._landing)
            os.kill(first.pid, signal.SIGKILL)
            outputs += run(engine)
        assert second.poll() is None
        for sequence in (*early, *late):
            assert sequence.finish_reason is FinishReason.LENGTH
            assert right(sequence)
            assert told(outputs, sequence) == sequence.output_token_ids
        assert engine.prefill.restarts > 0
        sides.whole(engine)


def test_a_block_of_a_dead_worker_that_lands_late_counts_for_nothing():
    address = free_address()
    end = sides.peers([address])
    end.form = dataclasses.replace(end.form, carry=lambda pages: sides.Later(pages, random.Random(0), 0.0))
    router = zmq.Context.instance().socket(zmq.ROUTER)
    router.bind(f"tcp://{address}")
    encode, items = msgspec.msgpack.encode, []
    key = Key("a", 0, 0)
    end.begin(key, Sequence(request("a", 20)), 0)
    while not end._landing:
        items += end.turn(wait=False)
        while router.poll(5):
            client, asked = router.recv_multipart()
            asked = msgspec.msgpack.decode(asked, type=Asked)
            if isinstance(asked, Hello):
                router.send_multipart([client, encode(Welcome(7, 100, {}))])
            if isinstance(asked, Begin):
                block = encode(Block(0, 1, [(asked.job, 0)]))
                router.send_multipart([client, block, np.zeros(2, np.uint64).tobytes()])
    blocks = [block for _, block in end._landing]
    router.close(linger=0)
    while not items:
        items += end.turn(wait=False)
        time.sleep(0.005)
    for block in blocks:
        block.pages.done = True
    items += end.turn(wait=False)
    assert items == [PrefillRestarted(key)]
    end.check()
    end.close()


def test_the_only_worker_is_waited_for_and_found_again():
    address = free_address()
    with served([address]) as engine:
        with process(address, 0.02):
            sequence = engine.add(request("a", 80, max_tokens=4))[0]
            run(engine, until=lambda: bool(engine.prefill._peers[0].prompts))
        run(engine, until=lambda: engine.prefill.restarts == 1)
        with process(address):
            run(engine)
        assert right(sequence)
        assert sequence.num_output == 4


def test_a_prompt_that_outlives_its_workers_too_often_fails_with_a_clean_error():
    address = free_address()
    with served([address], retries=0) as engine:
        with process(address, 0.05):
            sequence = engine.add(request("a", 80, max_tokens=4))[0]
            run(engine, until=lambda: bool(engine.prefill._peers[0].prompts))
        outputs = run(engine)
        assert [out.error.split(":")[0] for out in outputs] == ["prefill_died"]
        assert sequence.finish_reason is FinishReason.ERROR
        sides.whole(engine)


def test_a_prompt_that_no_worker_takes_in_time_fails_with_a_clean_error():
    with served([free_address()], wait_s=0.3) as engine:
        engine.add(request("a", 20))
        began = time.monotonic()
        outputs = run(engine)
        assert 0.2 < time.monotonic() - began < 10
        assert [out.error.split(":")[0] for out in outputs] == ["prefill_unavailable"]
        sides.whole(engine)


@pytest.mark.faults
def test_a_worker_that_is_stopped_is_dead_after_a_while_and_welcome_when_it_comes_back():
    address = free_address()
    with process(address, 0.01) as stopped, served([address], silent_s=1.5, retries=5) as engine:
        sequence = engine.add(request("a", 80, max_tokens=4))[0]
        run(engine, until=lambda: bool(engine.prefill._peers[0].prompts))
        stopped.send_signal(signal.SIGSTOP)
        run(engine, until=lambda: engine.prefill.restarts == 1)
        stopped.send_signal(signal.SIGCONT)
        run(engine)
        assert right(sequence)
        assert sequence.num_output == 4


def test_requests_that_are_taken_back_leave_nothing_with_the_worker():
    address = free_address()
    with thread(address, step_s=0.002) as worker, served([address]) as engine:
        for i in range(12):
            engine.add(request(f"r{i}", 50, max_tokens=9))
            run(engine, until=iter([False, False, True]).__next__)
            engine.abort(f"r{i}")
            engine.check()
        kept = engine.add(request("kept", 30, max_tokens=3))[0]
        run(engine)
        assert right(kept)
        sides.whole(engine)
        deadline = time.monotonic() + 5
        while worker._keys or worker.side.busy or worker.side._bytes:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    worker.side.check()
    assert worker.side.scheduler.pool.num_held == 0


def test_a_decode_server_that_goes_leaves_nothing_with_the_worker():
    address = free_address()
    with thread(address, step_s=0.005, silent_s=0.5) as worker:
        with served([address]) as engine:
            for i in range(6):
                engine.add(request(f"r{i}", 90, max_tokens=9))
            run(engine, until=lambda: worker.side.moved_pages > 3)
        deadline = time.monotonic() + 10
        while worker._keys or worker.side.busy or worker.side._bytes:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with served([address]) as engine:  # the next one is served
            sequence = engine.add(request("n", 20, max_tokens=3))[0]
            run(engine)
            assert right(sequence)
    worker.side.check()
    assert worker.side.scheduler.pool.num_held == 0


def test_a_second_decode_server_waits_until_the_first_has_left():
    address = free_address()
    with thread(address, step_s=0.01), served([address]) as first, served([address], wait_s=0.5) as second:
        first.add(request("a", 100, max_tokens=3))
        run(first, until=lambda: bool(first.prefill._peers[0].prompts))
        second.add(request("b", 20))
        outputs = run(second)
        assert [out.error.split(":")[0] for out in outputs] == ["prefill_unavailable"]
        assert second.prefill._peers[0].why_not == "this prefill worker serves another decode server"


def test_a_worker_of_another_model_is_not_used_and_a_prompt_too_long_for_all_is_refused():
    address = free_address()
    with thread(address, pages=6), served([address], wait_s=0.5) as engine:
        engine.add(request("short", 10))
        run(engine)
        with pytest.raises(RequestError, match="no prefill worker holds more"):
            engine.add(request("long", 40))
        engine.prefill.hello = Hello(VERSION, "another model", sides.PAGE_SIZE)
        engine.prefill._peers[0].said_s = 0.0
        time.sleep(0.05)
        engine.add(request("b", 10))
        outputs = run(engine)
        assert outputs[-1].error.startswith("prefill_unavailable")
        assert "another model" in engine.prefill._peers[0].why_not


def test_what_is_no_message_harms_nobody():
    address = free_address()
    with thread(address) as worker, served([address]) as engine:
        stranger = zmq.Context.instance().socket(zmq.DEALER)
        stranger.connect(f"tcp://{address}")
        for frames in ([b"\xff\xfe"], [b""], [b"a", b"b", b"c"]):
            stranger.send_multipart(frames)
        sequence = engine.add(request("a", 20, max_tokens=3))[0]
        run(engine)
        stranger.close(linger=0)
        assert right(sequence)
    assert worker.side.scheduler.pool.num_held == 0


def test_a_taken_port_is_said_in_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"disaggregation.listen = '{address}': cannot listen there"):
            sides.bind(address)
