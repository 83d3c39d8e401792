"""How a sequence ends, and what is emitted on the way."""

import pytest
from helpers.fake_runner import Host
from helpers.requests import request

from jaxllm.core import FinishReason

EOS, STOP = 7, 8


def run(script, **asked):
    """The one sequence of a request whose sampled tokens are `script`, then pseudo-random ones.

    The same with several steps in one dispatch.
    """
    limits = {name: asked.pop(name) for name in ("max_model_len", "num_pages") if name in asked}
    ways = ({}, {"decode_steps": 3}, {"decode_steps": 4, "overlap": True})
    first, *others = [run_so(script, asked, limits | way) for way in ways]
    for other in others:
        assert other.output_token_ids == first.output_token_ids
        assert (other.finish_reason, other.stop_reason) == (first.finish_reason, first.stop_reason)
    return first


def run_so(script, asked, limits):
    host = Host(**limits)
    (sequence,) = host.add(request(eos=(EOS,), **asked))
    host.runner.scripts["a"] = script
    host.run()
    assert host.outputs[-1].finish_reason is sequence.finish_reason
    assert host.emitted(sequence) == sequence.output_token_ids
    return sequence


def test_eos_ends_a_sequence_and_is_part_of_it():
    sequence = run([1, EOS, 2], max_tokens=10)
    assert sequence.output_token_ids == [1, EOS]
    assert (sequence.finish_reason, sequence.stop_reason) == (FinishReason.STOP, None)


def test_ignore_eos_goes_on():
    sequence = run([1, EOS, 2, 3], max_tokens=4, ignore_eos=True)
    assert sequence.output_token_ids == [1, EOS, 2, 3]
    assert sequence.finish_reason is FinishReason.LENGTH


def test_a_stop_token_ends_a_sequence_and_is_the_reason():
    sequence = run([1, STOP, 2], max_tokens=10, stop_token_ids=[STOP])
    assert sequence.output_token_ids == [1, STOP]
    assert (sequence.finish_reason, sequence.stop_reason) == (FinishReason.STOP, STOP)


def test_a_stop_token_counts_even_when_eos_is_ignored():
    sequence = run([1, EOS], max_tokens=10, ignore_eos=True, stop_token_ids=[EOS])
    assert (sequence.finish_reason, sequence.stop_reason) == (FinishReason.STOP, EOS)


def test_an_ending_token_within_min_tokens_is_a_token_like_others():
    sequence = run([EOS, STOP, EOS, EOS], max_tokens=10, min_tokens=3, stop_token_ids=[STOP])
    assert sequence.output_token_ids == [EOS, STOP, EOS, EOS]
    assert sequence.finish_reason is FinishReason.STOP


def test_max_tokens_ends_a_sequence():
    sequence = run([1] * 9, max_tokens=5)
    assert sequence.num_output == 5
    assert (sequence.finish_reason, sequence.stop_reason) == (FinishReason.LENGTH, None)


def test_the_token_that_reaches_max_tokens_may_still_be_an_ending():
    assert run([1, EOS], max_tokens=2).finish_reason is FinishReason.STOP


def test_the_context_ends_a_sequence():
    sequence = run([1] * 50, max_tokens=None, max_model_len=12)
    assert len(sequence.tokens) == 12
    assert sequence.finish_reason is FinishReason.LENGTH


def test_min_tokens_cannot_go_beyond_the_context():
    sequence = run([EOS] * 50, max_tokens=None, min_tokens=40, max_model_len=12)
    assert len(sequence.tokens) == 12
    assert sequence.finish_reason is FinishReason.LENGTH


def test_a_sequence_that_fills_the_pool_alone_ends_by_length():
    sequence = run([1] * 500, max_tokens=None, num_pages=5, max_model_len=200)
    assert len(sequence.tokens) == 5 * 4 + 1
    assert sequence.finish_reason is FinishReason.LENGTH


def test_an_error_ends_its_sequence_alone():
    host = Host()
    (bad,) = host.add(request(id="bad", max_tokens=5))
    (good,) = host.add(request(id="good", max_tokens=5))
    host.runner.errors.add(("bad", 2))
    host.run()
    assert bad.finish_reason is FinishReason.ERROR
    assert bad.num_output == 2
    (news,) = [output for output in host.outputs if output.sequence is bad and output.finish_reason]
    assert (news.token_id, news.error) == (None, "injected fault")
    assert good.finish_reason is FinishReason.LENGTH


def test_what_a_failed_sequence_computed_is_never_found_again():
    host = Host()
    host.add(request(id="bad", prompt=range(30), max_tokens=9))
    host.runner.errors.add(("bad", 3))
    host.run()
    assert host.pool.num_cached == 0
    (again,) = host.add(request(id="again", prompt=range(30)))
    host.run()
    assert again.num_cached == 0


def test_the_engine_can_end_a_sequence_for_a_reason_of_its_own():
    host = Host()
    (sequence,) = host.add(request(max_tokens=50))
    host.step()
    host.scheduler.finish(sequence, FinishReason.STOP, "###")
    host.scheduler.check()
    assert (sequence.finish_reason, sequence.stop_reason) == (FinishReason.STOP, "###")
    assert not host.scheduler.has_work
    assert host.pool.num_held == 0


def test_a_sequence_whose_pages_somebody_else_holds_fails_instead_of_spinning():
    host = Host(num_pages=6, caching=False)
    (sequence,) = host.add(request(prompt=6, max_tokens=20))
    host.step()
    taken = host.pool.allocate(4)
    while host.scheduler.has_work:
        outputs = host.scheduler.commit(plan := host.scheduler.schedule(), host.runner.run(plan) if plan else [])
        host.scheduler.check(taken)
    assert sequence.finish_reason is FinishReason.ERROR
    assert outputs[-1].error == "KV pages exhausted: no page is left for token 9 (6 of 6 held)"


def test_a_waiting_sequence_whose_pages_somebody_else_holds_fails_instead_of_spinning():
    host = Host(num_pages=6, caching=False)
    taken = host.pool.allocate(5)
    (large,) = host.add(request(id="large", prompt=6))
    (small,) = host.add(request(id="small", prompt=2, max_tokens=2))
    plan = host.scheduler.schedule()
    outputs = host.scheduler.commit(plan, host.runner.run(plan))
    assert [(out.sequence, out.finish_reason) for out in outputs] == [(large, FinishReason.ERROR), (small, None)]
    assert outputs[0].error == "KV pages exhausted: its 6 tokens need 2 pages, 1 are left (5 of 6 held)"
    host.scheduler.check(taken)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_log_probabilities_of_the_prompt_come_once_and_in_order(chunk):
    host = Host(max_prefill_chunk=chunk)
    host.add(request(prompt=range(100, 107), prompt_logprobs=1, max_tokens=3))
    host.run()
    heard = [entry.token_id for output in host.outputs for entry in output.prompt_logprobs]
    assert heard == list(range(101, 107))


def test_a_sequence_that_wants_prompt_log_probabilities_computes_its_prompt_again():
    host = Host()
    host.add(request(id="a", prompt=range(9)))
    host.run()
    (sequence,) = host.add(request(id="b", prompt=range(9), prompt_logprobs=0))
    host.run()
    assert sequence.num_cached == 0
    assert [e.token_id for out in host.outputs for e in out.prompt_logprobs] == list(range(1, 9))


def test_prompt_log_probabilities_are_not_emitted_again_after_a_preemption():
    host = Host(num_pages=9, caching=False, token_budget=8)
    host.add(request(id="first", prompt=8, max_tokens=20))
    (second,) = host.add(request(id="second", prompt=range(500, 508), prompt_logprobs=2, max_tokens=12))
    host.run()
    assert second.num_preempted > 0
    heard = [e.token_id for out in host.outputs for e in out.prompt_logprobs]
    assert heard == list(range(501, 508))


def test_once_they_are_emitted_a_preempted_sequence_may_find_its_pages_again():
    host = Host(num_pages=9, token_budget=8)
    host.add(request(id="first", prompt=8, max_tokens=20))
    (second,) = host.add(request(id="second", prompt=range(500, 508), prompt_logprobs=2, max_tokens=12))
    host.run()
    resumed_at = [
        row.start for plan in host.plans for row in plan.rows if plan.admitted == (row.sequence,) == (second,)
    ]
    assert second.num_preempted == 1
    assert resumed_at[0] == 0
    assert resumed_at[1] >= 8
