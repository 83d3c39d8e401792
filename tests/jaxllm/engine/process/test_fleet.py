"""Replicas in processes of their own, real processes around an engine without a device: one link, whoever dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.byte_model import build_engine

from jaxllm.config import load
from jaxllm.core import FinishReason, JaxLLMError, Request, RequestError, SamplingParams
from jaxllm.engine.messages import Abort, Add, Beat, Control, Failed, Ready, Reply, Step
from jaxllm.engine.process.fleet import FleetLink, Restarts
from jaxllm.engine.process.links import ProcessLink
from jaxllm.engine.process.remote import EngineGoneError, RemoteEngine
from jaxllm.llm import LLM

MAIN = Path(__file__).parents[3] / "helpers" / "engine_main.py"
PROMPTS = [[40 + i, *range(50, 60)] for i in range(8)]


def processes(count=2, **engine):
    told = json.dumps({"engine": engine}).encode()
    return [ProcessLink([sys.executable, str(MAIN)], told, subprocess.DEVNULL) for _ in range(count)]


def asked(name, length=5, tokens=6, **params):
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0, **params)
    return Request(id=name, prompt_token_ids=tuple(range(40, 40 + length)), params=params)


class Heard:
    """A fleet and all that it has told."""

    def __init__(self, fleet):
        self.fleet, self.events = fleet, []
        fleet.start()
        self.until(lambda: self.of(Ready))

    def until(self, condition, seconds=30.0):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            self.events += self.fleet.receive(0.02)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    def news(self, name):
        return [one for step in self.of(Step) for one in step.news if one.request_id == name]

    def ended(self, *names):
        return all(self.news(name) and self.news(name)[-1].finish_reason for name in names)

    def ask(self, number, operation):
        self.fleet.send(Control(number, operation))
        self.until(lambda: any(reply.id == number for reply in self.of(Reply)))
        return next(reply for reply in self.of(Reply) if reply.id == number)

    def stat(self, name):
        return self.of(Beat)[-1].stats[name] if self.of(Beat) else 0

    def serving(self):
        return self.stat("replicas_serving")


@pytest.fixture
def heard(request):
    options = getattr(request, "param", {})
    found = Heard(FleetLink(processes(step_s=0.01, **options.get("engine", {})), restarts=options.get("restarts")))
    yield found
    found.fleet.close()
    assert all(link.death() is not None for link in found.fleet.links)


def test_requests_are_dealt_out_by_tokens_and_operations_are_everybodys(heard):
    (ready,) = heard.of(Ready)
    assert (ready.max_num_seqs, ready.capacity_tokens) == (16, 2 * 128 * 8)
    assert (ready.facts["replicas"], ready.facts["replica_capacity_tokens"]) == (2, 128 * 8)
    assert heard.ask(1, "pause").value == {"paused": True}
    heard.fleet.send(Add(asked("long", 20, 40)), *(Add(asked(name)) for name in "abc"))
    assert heard.fleet.loads() == [60, 33]
    heard.until(lambda: heard.stat("waiting") == 4)
    assert heard.of(Beat)[-1].paused
    heard.ask(2, "resume")
    heard.until(lambda: heard.ended("long", *"abc"))
    assert [len(heard.news(name)) for name in ("long", *"abc")] == [40, 6, 6, 6]
    assert heard.fleet.loads() == [0, 0]
    books = heard.ask(3, "check").value
    assert (books["generated_tokens"], books["total_pages"], books["held_pages"]) == (58, 256, 0)
    cached = books["cached_pages"]
    assert cached == 7 + 1, "whole pages of both; three requests were alike"
    assert heard.ask(4, "reset_prefix_cache").value == {"evicted_pages": cached}
    assert heard.ask(5, "sleep").error.startswith("not_supported")
    assert heard.ask(6, "nonsense").error.startswith("not_supported")
    assert len(heard.of(Reply)) == 6, "one answer each"


def test_an_abort_finds_its_request_and_what_is_refused_leaves_nothing(heard):
    heard.fleet.send(Add(asked("kept", 5, 30)), Add(asked("gone", 5, 400)), Add(asked("too long", 600, 4, n=2)))
    heard.until(lambda: heard.ended("too long") and len(heard.news("gone")) > 3)
    assert heard.news("too long")[0].error.startswith("invalid_request")
    heard.fleet.send(Add(asked("kept too", 5, 200)), Add(asked("kept too", 5, 4)))
    heard.until(lambda: heard.ended("kept too"))
    assert heard.news("kept too")[-1].error.startswith("invalid_request/id"), "whichever replica has fewer tokens"
    heard.fleet.send(Abort("gone"), Abort("unknown"))
    heard.until(lambda: heard.ended("kept"))
    assert len(heard.news("kept")) == 30
    assert heard.fleet.loads() == [0, 0]
    assert heard.ask(1, "check").value["held_pages"] == 0


def test_a_replica_that_is_killed_loses_its_requests_alone_and_comes_back(heard):
    names = [f"r{i}" for i in range(6)]
    heard.fleet.send(*(Add(asked(name, 5, 300)) for name in names))
    heard.until(lambda: all(len(heard.news(name)) > 5 for name in names))
    assert heard.ask(1, "check").value["generated_tokens"] >= 36, "known of both from now on"
    victim, other = heard.fleet.pids
    os.kill(victim, signal.SIGKILL)
    heard.until(lambda: heard.ended(*names))
    lost = [name for name in names if heard.news(name)[-1].error]
    assert lost == names[::2], "they went to the two in turn"
    assert all(heard.news(name)[-1].error.startswith("engine_died: ") for name in lost)
    assert all(len(heard.news(name)) == 300 for name in names[1::2])
    heard.until(lambda: heard.serving() == 2)
    assert heard.fleet.death() is None
    assert heard.fleet.pids[1] == other
    assert heard.fleet.pids[0] not in (victim, None)
    heard.fleet.send(Add(asked("x")), Add(asked("y")))
    heard.until(lambda: heard.ended("x", "y"))
    assert len(heard.news("x")) == len(heard.news("y")) == 6
    counts = heard.ask(2, "check").value
    assert counts["generated_tokens"] >= 3 * 300 + 2 * 6 + 18, "what the dead one counted stays counted"
    assert counts["replica_restarts"] == 1
    assert len(heard.of(Ready)) == 1, "of the whole it is said once"


def test_a_replica_that_comes_back_is_as_operations_made_the_others(heard):
    heard.ask(1, "pause")
    os.kill(heard.fleet.pids[0], signal.SIGKILL)
    heard.until(lambda: heard.serving() == 1)
    assert heard.ask(2, "check").value["total_pages"] == 128, "of the one that is there"
    heard.until(lambda: heard.serving() == 2)
    heard.fleet.send(Add(asked("x")), Add(asked("y")))
    heard.until(lambda: heard.stat("waiting") == 2)
    assert not heard.news("x")
    assert not heard.news("y")
    heard.ask(3, "resume")
    heard.until(lambda: heard.ended("x", "y"))


def test_an_operation_does_not_wait_for_a_replica_that_died(heard):
    os.kill(heard.fleet.pids[0], signal.SIGSTOP)
    heard.fleet.send(Control(1, "check"))
    heard.events += heard.fleet.receive(0.1)
    os.kill(heard.fleet.pids[0], signal.SIGKILL)
    heard.until(lambda: heard.of(Reply))
    assert heard.of(Reply)[0].value["total_pages"] == 128


@pytest.mark.parametrize("heard", [{"restarts": Restarts(silent_s=5.0)}], indirect=True)
def test_a_replica_that_is_silent_is_killed_and_replaced(heard):
    stopped = heard.fleet.pids[0]
    heard.fleet.send(Add(asked("x", 5, 400)), Add(asked("y", 5, 9)))
    os.kill(stopped, signal.SIGSTOP)
    heard.until(lambda: heard.ended("x", "y"))
    assert heard.news("x")[-1].error.startswith("engine_died: ")
    assert len(heard.news("y")) == 9
    heard.until(lambda: heard.serving() == 2)
    assert heard.fleet.pids[0] != stopped


@pytest.mark.parametrize("heard", [{"restarts": Restarts(most=0)}], indirect=True)
def test_too_many_restarts_are_the_end(heard):
    os.kill(heard.fleet.pids[1], signal.SIGKILL)
    heard.until(lambda: heard.fleet.death() is not None)
    assert heard.fleet.death() == "replicas died too often; the last one of signal 9"


def test_without_any_replica_the_fleet_is_dead_and_can_start_again(heard):
    heard.fleet.send(Add(asked("x", 5, 400)), Add(asked("y", 5, 400)))
    for pid in heard.fleet.pids:
        os.kill(pid, signal.SIGKILL)
    heard.until(lambda: heard.fleet.death() is not None and heard.ended("x", "y"))
    assert "no replica is left" in heard.fleet.death()
    heard.fleet.kill()
    heard.fleet.start()
    heard.until(lambda: len(heard.of(Ready)) == 2)
    heard.fleet.send(Add(asked("again")))
    heard.until(lambda: heard.ended("again"))
    assert len(heard.news("again")) == 6


def test_one_that_cannot_start_says_why_for_all():
    fleet = FleetLink([*processes(1), *processes(1, start_error="the weights do not fit")])
    try:
        fleet.start()
        events, deadline = [], time.monotonic() + 30
        while fleet.death() is None and time.monotonic() < deadline:
            events += fleet.receive(0.05)
        assert [event.message for event in events if isinstance(event, Failed)] == ["the weights do not fit"]
        assert fleet.death() == "replica 1 could not start: exit code 1"
        assert not any(isinstance(event, Ready) for event in events)
    finally:
        fleet.kill()
        fleet.close()


# ---- as LLM has it ----


@pytest.fixture(scope="module")
def alone():
    """What one engine of this process says to each prompt."""
    engine = build_engine()[0]
    sequences = [engine.add(engine.make_request(ids, asked("x", tokens=40).params)) for ids in PROMPTS]
    while engine.has_work:
        engine.step()
    return [each.output_token_ids for (each,) in sequences]


@pytest.fixture
def llm(tmp_path):
    """Token ids in, token ids out: a directory without a tokenizer."""
    engine = RemoteEngine(FleetLink(processes(step_s=0.005), restarts=Restarts()), load(model=str(tmp_path)))
    yield LLM(engine=engine)
    engine.close()


def test_tokens_are_those_of_one_engine_and_errors_come_as_from_one(llm, alone):
    params = asked("x", tokens=40).params
    outputs = llm.generate([*PROMPTS, [300], list(range(100)) * 6], params)
    assert [output.outputs[0].token_ids for output in outputs[:8]] == alone
    assert "token ids must be integers in [0, 258]" in outputs[8].error
    assert "must have at most 511 tokens" in outputs[9].error
    with pytest.raises(RequestError, match="token ids must be integers"):
        llm.generate([300], params)
    with pytest.raises(RequestError, match="already in use"):
        [llm.engine.add(asked("same", tokens=40)) for _ in range(2)]
    llm.engine.abort("same")
    assert llm.engine.counts.steps > 0
    assert llm.engine.control("check")["generated_tokens"] == 8 * 40
    with pytest.raises(JaxLLMError, match="not_supported"):
        llm.engine.control("nonsense")


def test_streams_can_be_closed_and_aborted_while_others_run(llm, alone):
    params = asked("x", tokens=40).params
    closed, aborted = llm.stream(PROMPTS[0], params), llm.stream(PROMPTS[1], params, request_id="mine")
    next(closed), next(aborted)
    closed.close()
    llm.abort("mine")
    assert list(aborted)[-1].outputs[0].finish_reason is FinishReason.ABORT
    assert llm.generate(PROMPTS[2], params)[0].outputs[0].token_ids == alone[2]
    both = llm.generate(PROMPTS[3], params.replace(n=2))[0].outputs
    assert (both[0].token_ids, len(both[1].token_ids)) == (alone[3], 40)
    assert not llm.engine.has_work
    assert llm.engine.link.loads() == [0, 0]
    books = llm.engine.control("check")
    assert (books["running"], books["waiting"], books["held_pages"]) == (0, 0, 0)


def test_a_killed_replica_ends_its_prompts_and_the_next_call_is_whole(llm, alone):
    params = asked("x", tokens=40).params
    stream = llm.stream(PROMPTS[0], params)  # it goes to the first
    next(stream)
    os.kill(llm.engine.link.pids[0], signal.SIGKILL)
    outputs = llm.generate(PROMPTS[1:3], params)
    assert [output.error for output in outputs if output.error is None or not output.error.startswith("engine_died")]
    assert list(stream)[-1].error.startswith("engine_died: ")
    again = llm.generate(PROMPTS, params)
    assert [output.outputs[0].token_ids for output in again] == alone


def test_an_engine_that_is_gone_says_so_to_whoever_waits_and_to_whoever_comes(llm):
    stream = llm.stream(PROMPTS[0], asked("x", tokens=400).params)
    next(stream)
    for pid in llm.engine.link.pids:
        os.kill(pid, signal.SIGKILL)
    assert list(stream)[-1].error.startswith("engine_died: ")
    with pytest.raises(EngineGoneError, match="no replica is left"):
        llm.generate(PROMPTS[0], asked("x").params)
