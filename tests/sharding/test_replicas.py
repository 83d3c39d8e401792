"""Two engines as one: requests are balanced by tokens, found again, and counted together; the loop can drive them."""

import pytest
from helpers.byte_model import build_engine

from jaxllm.core import FinishReason, RequestError, SamplingParams
from jaxllm.engine.loop import EngineBroken, EngineLoop
from jaxllm.engine.messages import Abort, Add, Beat, Control, News, Ready, Reply, Step, Stop
from jaxllm.engine.replicas import ReplicaFailedError


@pytest.fixture
def pair():
    return lambda **options: build_engine(num_pages=64, replicas=2, **options)[0]


class OnceReady:
    """A launched step whose device finishes when the test says so."""

    def __init__(self, inner, finished):
        self.inner, self._finished, self.waits = inner, finished, inner.waits

    @property
    def ready(self):
        return self._finished()


class Paced:
    """A runner on a device that the test drives."""

    def __init__(self, inner, finished):
        self.inner, self.finished = inner, finished

    def launch(self, plan):
        return OnceReady(self.inner.launch(plan), self.finished)

    def choose(self, launched):
        self.inner.choose(launched.inner)

    def collect(self, launched):
        assert launched.ready, "the thread would have waited for this device"
        return self.inner.collect(launched.inner)


def ask(engine, name, length, tokens):
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0)
    return engine.add(engine.make_request(list(range(40, 40 + length)), params, request_id=name))[0]


def test_a_request_goes_to_the_engine_with_the_fewest_tokens_before_it(pair):
    engine = pair()
    ask(engine, "long", 20, 40)
    for name in "abc":
        ask(engine, name, 4, 5)
    assert [e.scheduler.num_waiting + e.scheduler.num_running for e in engine.engines] == [1, 3]
    assert engine.scheduler.num_waiting + engine.scheduler.num_running == 4


def test_all_finish_and_nothing_stays_behind(pair):
    engine = pair()
    sequences = [ask(engine, f"r{i}", 3 + i, 6) for i in range(7)]
    while engine.has_work:
        engine.step()
        engine.scheduler.check()
    assert [s.finish_reason for s in sequences] == [FinishReason.LENGTH] * 7
    assert engine.scheduler.pool.num_held == 0
    assert engine.scheduler.metrics.as_dict()["generated_tokens"] == 42
    assert [engine.load_tokens(number) for number in (0, 1)] == [0, 0]
    engine.scheduler.cache.evict(engine.scheduler.pool.num_cached)
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages


def test_an_abort_finds_its_request_and_a_second_one_is_ignored(pair):
    engine = pair()
    kept, gone = ask(engine, "kept", 5, 9), ask(engine, "gone", 5, 50)
    engine.step()
    engine.abort("gone")
    engine.abort("gone")
    engine.finish(gone, FinishReason.ABORT)
    while engine.has_work:
        engine.step()
    assert kept.num_output == 9
    assert gone.finish_reason is FinishReason.ABORT


def test_an_engine_that_is_slow_holds_up_nobody_else(pair):
    engine = pair()
    busy = [True]
    engine.engines[0].runner = Paced(engine.engines[0].runner, lambda: not busy[0])
    slow, quick = ask(engine, "slow", 20, 9), ask(engine, "quick", 5, 9)
    while not quick.finished:
        engine.step()
    assert slow.num_output == 0
    busy[0] = False
    while engine.has_work:
        engine.step()
        engine.check()
    assert slow.num_output == 9


def test_an_abort_between_the_halves_of_a_turn_leaves_nothing(pair):
    engine = pair()
    busy = [True]
    engine.engines[0].runner = Paced(engine.engines[0].runner, lambda: not busy[0])
    gone, kept = ask(engine, "gone", 20, 9), ask(engine, "kept", 5, 30)
    for _ in range(3):
        engine.step()  # the first engine has begun its second turn, and cannot end it
    engine.abort("gone")
    engine.check()
    busy[0] = False
    again = ask(engine, "again", 5, 9)
    while engine.has_work:
        engine.step()
        engine.check()
    assert (gone.finish_reason, kept.num_output, again.num_output) == (FinishReason.ABORT, 30, 9)
    assert engine.drain() == []
    assert engine.scheduler.pool.num_held == 0


def test_an_id_in_use_is_refused_whichever_engine_has_it(pair):
    engine = pair()
    ask(engine, "same", 20, 40)
    with pytest.raises(RequestError, match="already in use"):
        ask(engine, "same", 4, 5)


def test_what_others_said_in_a_turn_that_failed_is_not_lost(pair):
    engine = pair(fault="step:3:raise=1")
    hit, spared = ask(engine, "hit", 6, 12), ask(engine, "spared", 5, 12)
    said = []

    def until_it_fails():
        while engine.has_work:
            said.extend(engine.step())

    with pytest.raises(ReplicaFailedError) as caught:
        until_it_fails()
    said += caught.value.outputs
    assert (caught.value.requests, caught.value.in_a_row) == ({"hit"}, 1)
    engine.finish(hit, FinishReason.ERROR)
    while engine.has_work:
        said += engine.step()
        engine.check()
    assert [out.token_id for out in said if out.sequence is spared] == spared.tokens[5:]
    assert spared.num_output == 12


# ---- through the loop ----


def drive(engine, *turns):
    """The loop over scripted commands until its engine has no work left; its events."""
    script, events = list(turns), []

    def receive(wait):
        if script:
            return script.pop(0)
        return [] if engine.has_work else [Stop()]

    loop = EngineLoop(engine, receive, events.append)
    loop.run()
    return events


def add(engine, name, length=5, tokens=6):
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0)
    return Add(engine.make_request(list(range(40, 40 + length)), params, request_id=name))


def news_of(events, name):
    return [one for event in events if isinstance(event, Step) for one in event.news if one.request_id == name]


def test_the_loop_says_what_all_engines_can_hold(pair):
    engine = pair()
    ready = drive(engine)[0]
    assert isinstance(ready, Ready)
    assert (ready.max_num_seqs, ready.capacity_tokens) == (16, 2 * 64 * 8)


def test_a_failed_step_of_one_engine_ends_its_requests_and_no_others(pair):
    engine = pair(fault="step:3:raise=1")
    events = drive(engine, [add(engine, "hit", 6, 12), add(engine, "spared", 5, 12)], [], [], [], [add(engine, "next")])
    assert news_of(events, "hit")[-1].error.startswith("engine_error")
    for name, count in (("spared", 12), ("next", 6)):
        found = news_of(events, name)
        assert [one.finish_reason for one in found] == [None] * (count - 1) + ["length"]
    engine.check()


def test_an_engine_that_fails_twice_in_a_row_breaks_the_whole_though_others_are_well(pair):
    engine = pair(fault="step:3:raise=2")
    turns = [[add(engine, "a", 6, 12), add(engine, "b", 5, 60)], [], [], [], [], [], [add(engine, "c")], [], []]
    with pytest.raises(EngineBroken, match="two steps in a row failed"):
        drive(engine, *turns)


def test_operations_reach_all_engines_or_say_why_not(pair):
    engine = pair()
    prompts = [add(engine, f"r{i}", 20 + i) for i in range(4)]
    quiet = [[]] * 12
    events = drive(
        engine,
        [*prompts, Control(1, "pause")],
        [],
        [Control(2, "resume")],
        *quiet,
        [Control(3, "check")],
        [Control(4, "reset_prefix_cache")],
        [Control(5, "sleep")],
        [Control(6, "check")],
        [Control(7, "embed", {"token_ids": list(range(50)), "pooling": "last"})],
    )
    replies = {event.id: event for event in events if isinstance(event, Reply)}
    assert all(news_of(events, f"r{i}")[-1].finish_reason == "length" for i in range(4))
    cached = replies[3].value["cached_pages"]
    assert cached == 2 * 4, "two pages of each prompt, of two engines"
    assert replies[4].value == {"evicted_pages": cached}
    assert replies[5].error.startswith("not_supported: ")
    assert replies[6].value["free_pages"] == replies[6].value["total_pages"] == 128
    assert len(replies[7].value) == 16
    assert engine.scheduler.metrics.as_dict()["compiles_after_ready"] == 0


def test_an_abort_through_the_loop_ends_what_it_names(pair):
    engine = pair()
    events = drive(engine, [add(engine, "a", tokens=90), add(engine, "b", tokens=9)], [], [Abort("a")])
    assert news_of(events, "b")[-1].finish_reason == "length"
    assert len(news_of(events, "a")) < 9
    assert not any(isinstance(event, News | Beat) for event in events)
    assert engine.scheduler.pool.num_held == 0
