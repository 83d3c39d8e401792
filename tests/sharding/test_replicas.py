"""Two engines as one: requests are balanced by tokens, found again, and counted together; the loop can drive them."""

from helpers.byte_model import build_engine

from jaxllm.core import FinishReason, SamplingParams
from jaxllm.engine.replicas import ReplicatedEngine


def pair():
    return ReplicatedEngine(tuple(build_engine(num_pages=64)[0] for _ in range(2)))


def ask(engine, name, length, tokens):
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0)
    return engine.add(engine.make_request(list(range(40, 40 + length)), params, request_id=name))[0]


def test_a_request_goes_to_the_engine_with_the_fewest_tokens_before_it():
    engine = pair()
    ask(engine, "long", 20, 40)
    for name in "abc":
        ask(engine, name, 4, 5)
    assert [e.scheduler.num_waiting + e.scheduler.num_running for e in engine.engines] == [1, 3]
    assert engine.scheduler.num_waiting + engine.scheduler.num_running == 4


def test_all_finish_and_nothing_stays_behind():
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


def test_an_abort_finds_its_request_and_a_second_one_is_ignored():
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
