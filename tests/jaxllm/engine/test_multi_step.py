"""Several decode steps in one dispatch: planned only while nothing can change, and never seen in what comes out."""

import dataclasses
import random

import pytest
from helpers.fake_runner import Host, expected_tokens
from helpers.requests import request

from jaxllm.config import load, resolve
from jaxllm.core import FinishReason, GrammarKind, GrammarSpec
from jaxllm.engine.multi_step import STEPS, with_decode_steps
from jaxllm.engine.retry import ShrinkingRunner
from jaxllm.graph.compile import Ladder
from pallas_kernels.roofline import MODELS, StepCost

EOS = 7
H200 = "NVIDIA H200"


def decoding(*requests, **limits):
    """A host whose requests have all computed their prompts, one step a dispatch."""
    host = Host(**{"decode_steps": 4} | limits)
    for made in requests:
        host.add(made)
    while any(not sequence.num_output for sequence in host.scheduler._running) or not host.scheduler.num_running:
        host.step()
    return host


def test_decode_steps_go_together_and_the_books_count_every_one_of_them():
    host = decoding(request("a", 5, max_tokens=21), request("b", 3, max_tokens=21))
    host.run()
    assert host.runner.dispatches == [1, 4, 4, 4, 4, 4]
    metrics = host.scheduler.metrics
    assert (metrics.dispatches, metrics.steps) == (6, 21)
    assert metrics.generated_tokens == 42
    assert metrics.scheduled_tokens == host.runner.num_computed_tokens == 8 + 2 * 20


def test_news_come_in_the_order_of_single_steps():
    alone, together = (decoding(request("a", 5), request("b", 3), decode_steps=steps) for steps in (1, 3))
    for host in (alone, together):
        host.run()
    told = [[(out.sequence.request.id, out.token_id) for out in host.outputs] for host in (alone, together)]
    assert told[0] == told[1]
    assert together.scheduler.metrics.dispatches < alone.scheduler.metrics.dispatches


def test_with_one_step_a_dispatch_none_go_together():
    host = decoding(request(max_tokens=30), decode_steps=1)
    host.run()
    assert set(host.runner.dispatches) == {1}


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_that_arrives_waits_for_what_is_launched_and_nothing_more(overlap):
    host = decoding(request("a", 5, max_tokens=60), overlap=overlap)
    host.step()
    assert host.runner.dispatches[-1] == 4
    (late,) = host.add(request("late", 3, max_tokens=8))
    host.step()
    assert host.runner.dispatches[-1] == 1
    assert late.row is not None
    host.run()
    assert host.runner.dispatches.count(4) > 10  # and both decode together again


def test_while_somebody_waits_steps_go_one_by_one():
    host = decoding(request("a", 5, max_tokens=30), max_num_seqs=1)
    host.add(request("b", 5, max_tokens=30))
    while host.scheduler.num_waiting:
        host.step()
    assert 4 not in host.runner.dispatches
    host.run()
    assert 4 in host.runner.dispatches


def test_siblings_that_are_held_back_count_as_waiting():
    host = Host(decode_steps=4, overlap=True)
    host.add(request(prompt=20, n=3, max_tokens=30))
    host.step()
    host.step()  # the first decodes before the others know of its prompt
    assert set(host.runner.dispatches) == {1}
    host.run()
    assert 4 in host.runner.dispatches


ASKING_THE_HOST = {
    "log-probabilities": {"logprobs": 2},
    "log-probabilities of the prompt": {"prompt_logprobs": 1},
    "a bad word of several tokens": {"bad_words": ((4, 5),)},
}


@pytest.mark.parametrize("asked", ASKING_THE_HOST.values(), ids=ASKING_THE_HOST)
def test_what_the_host_must_see_token_by_token_goes_step_by_step(asked):
    host = decoding(request("a", 5, max_tokens=30), request("b", 4, max_tokens=12, **asked))
    while host.scheduler.num_running == 2:
        host.step()
    assert set(host.runner.dispatches) == {1}
    host.run()
    assert 4 in host.runner.dispatches


def test_a_grammar_goes_step_by_step():
    host = Host(decode_steps=4)
    (sequence,) = host.add(request(max_tokens=12, grammar=GrammarSpec(GrammarKind.REGEX, "a+")))
    host.run()
    assert set(host.runner.dispatches) == {1}
    assert sequence.num_output == 12


def test_until_min_tokens_steps_go_one_by_one():
    host = decoding(request(max_tokens=30, min_tokens=9, eos=(EOS,)))
    host.run()
    first = host.runner.dispatches.index(4)
    assert sum(host.runner.dispatches[:first]) == 9
    assert 4 in host.runner.dispatches


def test_more_rows_than_the_executables_have_go_step_by_step():
    host = decoding(*(request(name, 3, max_tokens=12) for name in "abc"))
    host.scheduler.config = dataclasses.replace(host.scheduler.config, decode_steps_rows=2)
    host.run()
    assert set(host.runner.dispatches) == {1}


def test_a_sequence_that_ends_in_the_midst_gives_no_later_token_and_the_others_go_on():
    host = decoding(request("a", 5, max_tokens=40, eos=(EOS,)), request("b", 5, max_tokens=40))
    host.runner.scripts["a"] = [1, 2, 3, EOS, 4, 5, 6, 7]
    ended = next(sequence for sequence in host.scheduler._running if sequence.request.id == "a")
    host.run()
    assert host.emitted(ended) == ended.output_token_ids == [*ended.output_token_ids[:1], 2, 3, EOS]
    assert ended.finish_reason is FinishReason.STOP
    (other,) = [sequence for sequence in host.finished if sequence.request.id == "b"]
    assert other.output_token_ids == expected_tokens(other.request.prompt_token_ids, 40)
    assert host.scheduler.metrics.generated_tokens == 44


def test_a_row_that_fails_in_the_midst_fails_alone_and_keeps_what_came_before():
    host = decoding(request("a", 5, max_tokens=40), request("b", 5, max_tokens=40))
    host.runner.errors.add(("a", 3))
    host.run()
    failed, other = host.finished
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.output_token_ids == expected_tokens(failed.request.prompt_token_ids, 3)
    assert other.output_token_ids == expected_tokens(other.request.prompt_token_ids, 40)


def test_what_is_taken_back_in_the_midst_leaves_its_pages():
    host = decoding(request("a", 5, max_tokens=40), request("b", 5, max_tokens=40), overlap=True)
    host.step()
    host.scheduler.abort("a")
    host.scheduler.check()
    host.run()
    (other,) = host.finished
    assert other.output_token_ids == expected_tokens(other.request.prompt_token_ids, 40)


def test_without_pages_for_all_of_the_steps_they_go_one_by_one_until_there_are():
    """Two pages of four tokens are left to three sequences, each at the end of its page."""
    host = decoding(*(request(name, 3, max_tokens=13) for name in "abc"), num_pages=5, caching=False)
    host.step()
    assert host.runner.dispatches[-1] == 1
    host.run()
    assert host.scheduler.metrics.preemptions > 0
    assert 4 in host.runner.dispatches
    for sequence in host.finished:
        assert sequence.output_token_ids == expected_tokens(sequence.request.prompt_token_ids, 13)


def test_pages_of_the_prefix_cache_are_taken_for_the_steps_to_come():
    host = Host(num_pages=8, decode_steps=4)
    host.add(request("gone", 20, max_tokens=2))
    host.run()
    assert host.pool.num_cached > 3
    (sequence,) = host.add(request("a", 3, max_tokens=25))
    host.run()
    assert host.runner.dispatches[-6:] == [4] * 6
    assert sequence.output_token_ids == expected_tokens(sequence.request.prompt_token_ids, 25)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("steps", [2, 4, 7])
def test_tokens_and_ends_are_those_of_single_steps_whatever_comes_when(steps, overlap):
    def tokens(steps):
        dice, host = random.Random(3), Host(num_pages=14, decode_steps=steps, overlap=overlap, max_model_len=40)
        everyone = []
        for number in range(25):
            name = str(number)
            host.runner.scripts[name] = [None] * dice.randrange(30) + [EOS]
            asked = {"max_tokens": dice.randrange(1, 35), "eos": (EOS,), "min_tokens": 0}
            everyone += host.add(request(name, dice.randrange(1, 12), **asked))
            for _ in range(dice.randrange(6)):
                host.step()
        host.run()
        return [(one.output_token_ids, one.finish_reason) for one in everyone], host.scheduler.metrics

    single, counted = tokens(1)
    several, fewer = tokens(steps)
    assert several == single
    assert fewer.preemptions > 0
    assert fewer.dispatches < fewer.steps
    assert fewer.generated_tokens == counted.generated_tokens


def test_a_dispatch_without_memory_is_launched_again_as_halves_of_as_many_steps():
    host = decoding(request("a", 5, max_tokens=21), request("b", 3, max_tokens=21))
    launch, refused = host.runner.launch, []

    def refusing(plan):
        if len(plan.rows) > 1 and not refused:
            refused.append(plan.steps)
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return launch(plan)

    host.runner.launch = refusing
    host.runner = ShrinkingRunner(host.runner)
    host.step()
    assert refused == [4]
    assert host.runner.inner.dispatches[-2:] == [4, 4]
    host.run()
    for sequence in host.finished:
        assert sequence.output_token_ids == expected_tokens(sequence.request.prompt_token_ids, 21)


# ---- how many, and for which rows ----


def test_there_are_executables_for_one_row_for_a_few_and_for_the_most():
    ladder = Ladder((1, 2, 4, 8, 16, 32, 64), (32,), 4, decode_steps=4)
    assert [shape.rows for shape in ladder.multi_steps()] == [1, 8, 32]
    assert [ladder.multi_step(rows).rows for rows in (1, 2, 8, 9, 32)] == [1, 8, 8, 32, 32]
    assert Ladder((8,), (32,), 4, decode_steps=4).multi_step(3).rows == 8
    for without in ({"decode_steps": 1}, {"decode_steps": 4, "one_shape": True}):
        assert not Ladder((1, 8), (32,), 4, **without).multi_steps()
    assert not Ladder((48,), (32,), 4, decode_steps=4).multi_steps()


def decided(model="qwen3-0.6b", device=H200, linear_bytes=2.0, **settings):
    """What is decided for a model of the roofline's list."""
    config = resolve(load(environ={}, **settings), 4096, "gpu")
    cost = StepCost(MODELS[model], ((None, MODELS[model].L),), linear_bytes=linear_bytes)
    return with_decode_steps(config, cost, device).scheduler.decode_steps


def test_short_steps_go_together_and_long_ones_do_not():
    assert decided() == STEPS
    assert decided("llama-3.1-8b") == 1
    assert decided("llama-3.1-8b", linear_bytes=0.5) == STEPS
    assert decided("llama-3.1-8b", tensor_parallel_size=4) == decided("qwen3-30b-a3b", ep=4) == STEPS
    assert decided(device="cpu") == 1


def test_a_number_that_is_given_is_taken_where_steps_can_go_together(caplog):
    assert decided("llama-3.1-8b", num_scheduler_steps=8) == 8
    assert decided(decode_steps=1) == 1
    assert not caplog.records
    assert decided(decode_steps=4, deterministic=True) == 1
    assert "deterministic" in caplog.records[-1].message
    for mesh in (
        {"pipeline_parallel_size": 2},
        {"cp": 2},
        {"ep": 2, "attention_data": True},
        {"ep": 2, "redundant_experts": 2},
    ):
        assert decided(decode_steps=4, **mesh) == 1
        assert "mesh" in caplog.records[-1].message
    assert decided(decode_steps=4, decode_buckets=[48], max_num_seqs=48) == 1
