"""The engine's loop without a server: what commands do, and what a slow grammar does not do to others."""

from concurrent.futures import Future

import pytest
from helpers.byte_model import build_engine

from jaxllm.core import RequestError, SamplingParams
from jaxllm.engine.loop import EngineBroken, EngineLoop
from jaxllm.engine.messages import Abort, Add, Control, Failed, Ready, Reply, Step, Stop


class Script:
    """Gives commands one turn at a time, then Stop; keeps the events."""

    def __init__(self, *turns):
        self.turns, self.events = list(turns), []

    def receive(self, wait):
        if not self.turns:
            return [Stop()]
        turn = self.turns.pop(0)
        return turn() or [] if callable(turn) else turn

    def news(self, request_id):
        steps = [event for event in self.events if isinstance(event, Step)]
        return [one for step in steps for one in step.news if one.request_id == request_id]


def run(*turns, **engine):
    script = Script(*turns)
    made, _ = build_engine(**engine)
    loop = EngineLoop(made, script.receive, script.events.append)
    return script, loop, made


def add(engine, name, **params):
    return Add(engine.make_request(list(b"hello"), SamplingParams(**{"max_tokens": 3, **params}), request_id=name))


def test_a_request_is_answered_token_by_token_and_leaves_nothing():
    script, loop, engine = run()
    script.turns = [[add(engine, "a")], [], [], [], []]
    loop.run()
    assert isinstance(script.events[0], Ready)
    assert [one.finish_reason for one in script.news("a")] == [None, None, "length"]
    engine.check()
    assert not loop._flights


def test_others_go_on_while_a_grammar_compiles_and_it_can_be_aborted_meanwhile():
    script, loop, engine = run()
    slow: Future = Future()
    engine.prepare = lambda request: slow if request.id in ("slow", "gone") else None
    slow_one, gone, quick = (add(engine, name) for name in ("slow", "gone", "quick"))
    script.turns = [
        [slow_one, gone, quick],
        [Abort("gone")],
        [],
        [],
        [],
        lambda: slow.set_result(None),
        [],
        [],
        [],
        [],
        [],
    ]
    loop.run()
    order = [one.request_id for event in script.events if isinstance(event, Step) for one in event.news]
    assert order == ["quick"] * 3 + ["slow"] * 3
    assert not loop._preparing


@pytest.mark.parametrize("error", [RequestError("prompt", 1, "no"), RuntimeError("broken")])
def test_a_grammar_that_cannot_be_compiled_ends_its_request_alone(error):
    script, loop, engine = run()
    failed: Future = Future()
    failed.set_exception(error)
    engine.prepare = lambda request: failed if request.id == "bad" else None
    script.turns = [[add(engine, "bad"), add(engine, "good")], [], [], [], [], []]
    loop.run()
    code = "invalid_request/prompt: " if isinstance(error, RequestError) else "internal_error: "
    assert [one.error.startswith(code) for one in script.news("bad")] == [True]
    assert script.news("good")[-1].finish_reason == "length"


def test_two_failed_steps_in_a_row_break_the_engine():
    script, loop, engine = run(fault="step:1:raise=2")
    script.turns = [[add(engine, "a")], [add(engine, "b")], []]
    with pytest.raises(EngineBroken):
        loop.run()
    assert script.news("a")[0].error.startswith("engine_error")
    engine.check()


def test_an_unknown_operation_and_a_failing_one_are_answered():
    script, loop, _ = run([Control(1, "dance")], [Control(2, "embed")], [Control(3, "check")])
    loop.run()
    replies = {event.id: event for event in script.events if isinstance(event, Reply)}
    assert replies[1].error.startswith("not_supported")
    assert replies[2].error.startswith("internal_error")
    assert replies[3].value["held_pages"] == 0
    assert not [event for event in script.events if isinstance(event, Failed)]


def test_an_embedding_is_computed_between_the_steps_of_others():
    script, loop, engine = run(num_pages=400)
    embed = Control(1, "embed", {"token_ids": list(range(200)), "pooling": "mean"})
    script.turns = [[add(engine, "a", max_tokens=6), embed], [], [], [], [], [], []]
    loop.run()
    places = [i for i, event in enumerate(script.events) if isinstance(event, Reply)]
    assert len(script.events[places[0]].value) == 16
    assert any(isinstance(event, Step) for event in script.events[: places[0]])
    assert any(isinstance(event, Step) for event in script.events[places[0] :])
    engine.check()
