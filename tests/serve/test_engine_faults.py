"""faults.md section 3, what happens inside: faults of the engine behind the real server, over real HTTP.

Where a process must die there is a process; elsewhere the engine is a thread. Streams beside a fault must say what they
say alone.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from helpers.server import HEAD, Server, settings

from serve.client import Supervision

TEXTS = [f"neighbour number {i}" for i in range(6)]


def run_all(server, texts, **fields):
    """The events of streams that run side by side, in order; an HTTP error as its status."""
    found = {}

    def one(i):
        body = {"prompt": texts[i], "max_tokens": 40, "temperature": 0, **fields}
        try:
            found[i] = server.events("/v1/completions", body)
        except AssertionError:
            found[i] = [{"error": {"code": "status", "message": ""}}]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [found[i] for i in range(len(texts))]


def text_of(events):
    return "".join(choice["text"] for event in events[:-1] for choice in event["choices"])


def errors_of(streams):
    return [events[-1]["error"]["code"] for events in streams if isinstance(events[-1], dict)]


@pytest.fixture(scope="module")
def solo():
    """What each text gives alone, on an engine that nothing happens to."""
    with Server() as server:
        return [server.streamed_text(text, max_tokens=40) for text in TEXTS]


@pytest.mark.parametrize(("kind", "code"), [("nan_row", "numerical_error"), ("host_row", "internal_error")])
def test_40_41_a_sick_row_ends_alone(solo, kind, code):
    with Server(fault=f"step:9:{kind}=2", step_s=0.01) as server:
        streams = run_all(server, TEXTS)
        assert errors_of(streams) == [code]
        healthy = [text_of(events) == alone for events, alone in zip(streams, solo) if events[-1] == "[DONE]"]
        assert healthy == [True] * 5
        server.check_a()
        assert server.info()["engine"]["stats"]["finished_error"] == 1
        assert [text_of(events) for events in run_all(server, TEXTS)] == solo


def test_40_a_sick_row_before_the_first_token_is_a_500():
    with Server(fault="step:1:nan_row=0") as server:
        answer = server.complete()
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "numerical_error"
        server.check_a()


def test_40_numbers_that_stay_bad_make_the_server_unready():
    # Every second step is one launched ahead for a request that the step before has ended.
    with Server(fault="step:1:nan_row=0,step:3:nan_row=0,step:5:nan_row=0") as server:
        for _ in range(3):
            assert server.complete().status_code == 500
        server.until(lambda: server.status("/ready") == 503)
        assert "numerical" in server.http.get("/ready").json()["status"]
        assert server.complete().status_code == 200  # a good step clears it
        server.wait_ready()


def test_42_a_failed_step_ends_what_is_in_flight_once_and_the_engine_goes_on(solo):
    with Server(fault="step:9:raise=1", step_s=0.01) as server:
        streams = run_all(server, TEXTS)
        assert errors_of(streams) == ["engine_error"] * 6
        assert all(sum("error" in event for event in events if event != "[DONE]") == 1 for events in streams)
        server.check_a()
        assert [text_of(events) for events in run_all(server, TEXTS)] == solo
        assert server.info()["engine"]["restarts"] == 0


def test_42_an_engine_whose_steps_keep_failing_is_replaced():
    with Server(process=True, fault="step:3:raise=2") as server:
        assert server.complete().status_code == 500
        first = server.link.pid
        server.complete()
        server.until(lambda: server.link.pid != first)
        server.wait_ready()
        assert server.info()["engine"]["restarts"] == 1


def test_43_a_hanging_step_is_seen_and_the_engine_replaced(capfd):
    quick = Supervision(unhealthy_s=0.3)
    front = settings(unhealthy_s=0.3)
    with Server(
        front, process=True, supervision=quick, env_settings={"stall_s": 2.0}, fault="step:5:hang=60"
    ) as server:
        began = time.monotonic()
        thread = threading.Thread(target=run_all, args=(server, TEXTS[:1]))
        thread.start()
        server.until(lambda: server.status("/health") == 503 and server.status("/ready") == 503, 5)
        server.wait_ready()
        assert time.monotonic() - began < 10
        thread.join(10)
        assert server.info()["engine"]["restarts"] == 1


def test_44_a_killed_engine_ends_every_stream_with_an_error_and_comes_back(solo):
    with Server(process=True, step_s=0.02) as server:
        killer = threading.Timer(0.3, lambda: os.kill(server.link.pid, signal.SIGKILL))
        killer.start()
        streams = run_all(server, TEXTS)
        assert errors_of(streams) == ["engine_died"] * 6
        server.wait_ready()
        assert [text_of(events) for events in run_all(server, TEXTS[:2])] == solo[:2]
        server.check_a()


def test_44_a_stopped_engine_is_killed_and_replaced():
    patience = Supervision(unhealthy_s=0.5, kill_s=1.5)
    with Server(settings(unhealthy_s=0.5), process=True, supervision=patience) as server:
        os.kill(server.link.pid, signal.SIGSTOP)
        server.until(lambda: server.status("/health") == 503, 5)
        server.wait_ready()
        assert server.complete().status_code == 200


def test_44_an_engine_that_dies_too_often_is_given_up():
    with Server(process=True, supervision=Supervision(max_restarts=1)) as server:
        for number in range(2):
            os.kill(server.link.pid, signal.SIGKILL)
            if number == 0:
                server.until(lambda: server.status("/ready") == 503)
                server.wait_ready()
        server.until(lambda: server.lost is not None)
        assert server.status("/health") == 503
        answer = server.complete()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")


def test_38_streams_that_were_preempted_say_what_they_say_undisturbed(solo):
    with Server(num_pages=20, step_s=0.002) as server:
        streams = run_all(server, TEXTS)
        assert [text_of(events) for events in streams] == solo
        assert server.info()["engine"]["stats"]["preemptions"] > 0
        server.check_a()


def test_39_a_request_that_can_never_fit_is_refused_at_once():
    with Server(num_pages=8) as server:
        answer = server.complete("x" * 100)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
        server.check_a()


def test_35_a_full_queue_says_when_to_come_again():
    with Server(settings(max_queue=2), max_num_seqs=1, step_s=0.05) as server:
        streams = [threading.Thread(target=server.complete, kwargs={"max_tokens": 12}) for _ in range(3)]
        for thread in streams:
            thread.start()
        server.until(lambda: server.front.admission.slots == 3)
        answer = server.complete()
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        for thread in streams:
            thread.join(20)
        server.check_a()


def test_35_who_waits_too_long_in_the_queue_is_told():
    with Server(settings(queue_timeout_s=0.2), max_num_seqs=1, step_s=0.02) as server:
        long = threading.Thread(target=server.complete, kwargs={"max_tokens": 40})
        long.start()
        server.until(lambda: server.front.admission.slots == 1)
        time.sleep(0.1)
        answer = server.complete()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_timeout")
        assert "retry-after" in answer.headers
        long.join(20)
        server.check_a()


def test_37_a_reader_that_is_too_slow_is_ended_and_nobody_waits_for_it():
    with Server(settings(stream_limit_tokens=50), context=4096, num_pages=600) as server:
        request = b'{"prompt":"slow","max_tokens":4000,"stream":true,"logprobs":20,"return_token_ids":true}'
        server.narrow()
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            connection.sendall(head + b"content-length: %d\r\n\r\n" % len(request) + request)
            server.until(lambda: server.front.client.aborted == 1, 60)
            assert server.complete().status_code == 200
            server.until(lambda: server.info()["engine"]["stats"]["held_pages"] == 0)
        server.check_a()


def test_34_connections_beyond_the_cap_are_refused_and_the_rest_served():
    with Server(settings(max_connections=40, max_queue=2), max_num_seqs=2, step_s=0.01) as server:
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(60)]
        time.sleep(0.2)
        refused = 0
        for connection in idle:
            connection.settimeout(0.02)
            with contextlib.suppress(TimeoutError):
                refused += connection.recv(100).startswith(b"HTTP/1.1 503")
        assert refused >= 19
        assert server.complete().status_code == 200  # on the connection that was there before
        for connection in idle:
            connection.close()
        server.check_a()


def test_61_tenants_share_no_cached_pages():
    from serve.settings import hash_key

    keys = ("alice", "bob")
    with Server(settings(keys=tuple(map(hash_key, keys)))) as server:

        def cached(key, **fields):
            body = {"prompt": "a prompt of several pages " * 3, "max_tokens": 1, **fields}
            answer = server.post("/v1/completions", body, headers={"authorization": f"Bearer {key}"})
            return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert cached("alice") == 0
        assert cached("alice") > 0
        assert cached("bob") == 0
        assert cached("alice", cache_salt="other") == 0


def test_60_a_mix_of_requests_and_cancels_leaves_nothing_behind():
    import random

    rng = random.Random(7)
    with Server(num_pages=60, step_s=0.0005) as server:

        def client(seed):
            mine = random.Random(seed)
            for _ in range(15):
                body = {"prompt": "p" * mine.randrange(1, 120), "max_tokens": mine.randrange(1, 60), "stream": True}
                body["n"] = mine.choice([1, 1, 2])
                if mine.random() < 0.5:
                    server.events("/v1/completions", body)
                    continue
                with server.http.stream("POST", "/v1/completions", json=body) as answer:
                    for _ in zip(range(mine.randrange(1, 6)), answer.iter_lines()):
                        pass

        threads = [threading.Thread(target=client, args=(rng.random(),)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        server.check_a(tasks=0)


# ---- the whole command ----

MAIN = Path(__file__).parent.parent / "helpers" / "server_main.py"


class Process:
    """A server process of its own, as people start it."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen([sys.executable, str(MAIN), *arguments], stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().split()[-1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def get(self, path):
        return httpx.get(self.url + path, timeout=10, trust_env=False)

    def engine(self):
        listed = ["ps", "--ppid", str(self.process.pid), "-o", "pid="]
        return int(subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()[0])


def stream_in_thread(process, max_tokens):
    lines = []

    def body():
        fields = {"prompt": "drain", "max_tokens": max_tokens, "stream": True}
        with httpx.stream("POST", process.url + "/v1/completions", json=fields, timeout=20, trust_env=False) as answer:
            lines.extend(line for line in answer.iter_lines() if line)

    thread = threading.Thread(target=body)
    thread.start()
    return thread, lines


def test_55_sigterm_lets_streams_finish_and_refuses_new_ones():
    with Process() as server:
        thread, lines = stream_in_thread(server, 60)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert server.get("/ready").status_code == 503
        thread.join(15)
        assert lines[-1] == "data: [DONE]"
        assert server.process.wait(15) == 0


def test_55_a_signal_to_the_whole_group_lets_streams_finish_too():
    with Process() as server:
        thread, lines = stream_in_thread(server, 60)
        time.sleep(0.3)
        for process in (server.engine(), server.process.pid, server.process.pid):
            os.kill(process, signal.SIGTERM)
        thread.join(15)
        assert lines[-1] == "data: [DONE]"
        assert server.process.wait(15) == 0


@pytest.mark.parametrize("second", [True, False], ids=["second signal", "drain timeout"])
def test_55_at_the_end_of_patience_streams_get_an_error_event(second):
    with Process("--drain", "30" if second else "0.3") as server:
        thread, lines = stream_in_thread(server, 480)
        time.sleep(0.4)
        server.process.send_signal(signal.SIGTERM)
        if second:
            time.sleep(0.2)
            server.process.send_signal(signal.SIGINT)
        thread.join(15)
        assert '"code":"shutting_down"' in lines[-1]
        assert server.process.wait(15) == 0


def test_44_a_lost_engine_ends_the_server_with_a_failure():
    with Process("--restarts", "0") as server:
        os.kill(server.engine(), signal.SIGKILL)
        assert server.process.wait(15) == 1


def test_an_engine_never_outlives_its_front():
    with Process() as server:
        engine = server.engine()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{engine}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{engine}").exists()


def test_56_a_port_in_use_is_said_before_the_engine_starts():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, str(MAIN), "--port", str(port)], capture_output=True, text=True, check=False, timeout=20
        )
    assert done.returncode == 1
    assert f"--port {port}: is in use" in done.stderr


def test_46_49_an_engine_that_cannot_start_says_why_and_fails():
    done = subprocess.run(
        [sys.executable, str(MAIN), "--engine-error"], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 1
    assert "the weights do not fit" in done.stderr


def test_admin_operations_pause_and_resume():
    with Server() as server:
        assert server.http.post("/pause", headers=HEAD).json() == {"paused": True}
        server.until(lambda: server.status("/ready") == 503)
        thread = threading.Thread(target=server.complete)
        thread.start()
        server.until(lambda: server.info()["engine"]["stats"]["waiting"] == 1)
        assert server.http.post("/resume", headers=HEAD).json() == {"paused": False}
        thread.join(10)
        server.wait_ready()
        server.complete("a prompt of more than a page")
        assert server.http.post("/reset_prefix_cache", headers=HEAD).json()["evicted_pages"] > 0
        server.check_a()
