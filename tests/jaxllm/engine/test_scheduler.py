"""Order, budget, chunks, admission and abort."""

import gc
import weakref

import pytest
from helpers.fake_runner import Host, expected_tokens
from helpers.requests import request

from jaxllm.core import FinishReason, RequestError, RowResult, SampledToken, Sequence
from jaxllm.engine.buckets import Padding
from jaxllm.engine.cache.hashed import NoPrefixCache, PrefixCache
from jaxllm.engine.cache.pages import PagePool
from jaxllm.engine.limits import Limits
from jaxllm.engine.scheduler import Scheduler


def counts(plan):
    return [(row.sequence.request.id, row.count) for row in plan.rows]


def test_of_a_hundred_staggered_requests_a_late_short_one_ends_before_early_long_ones():
    host = Host(num_pages=1700, max_num_seqs=100, token_budget=128, max_model_len=400)
    for number in range(99):
        host.add(request(id=str(number), prompt=5 + number % 11, max_tokens=120 + number % 7))
        host.step()
    (late,) = host.add(request(id="late", prompt=3, max_tokens=2))
    assert host.finished == []
    host.run()
    assert host.finished[0] is late
    assert len(host.finished) == 100
    for sequence in host.finished:
        made = sequence.request
        assert sequence.output_token_ids == expected_tokens(made.prompt_token_ids, made.params.max_tokens)


def test_decodes_go_first_and_prefills_take_what_is_left_of_the_budget():
    host = Host(token_budget=8, max_num_seqs=4)
    host.add(request(id="a", prompt=3, max_tokens=20))
    host.step()
    host.add(request(id="b", prompt=20))
    plans = [host.step() and host.plans[-1] for _ in range(3)]
    assert [counts(plan) for plan in plans] == [
        [("a", 1), ("b", 7)],
        [("a", 1), ("b", 7)],
        [("a", 1), ("b", 6)],
    ]
    assert [plan.rows[1].sample for plan in plans] == [False, False, True]


def test_a_prompt_a_little_longer_than_a_padded_size_fills_it_and_the_rest_comes_in_the_next_step():
    host = Host(token_budget=32, max_num_seqs=4, padding=Padding((4, 8, 16, 32), few=4))
    host.add(request(id="a", prompt=3, max_tokens=20))
    host.step()
    (late,) = host.add(request(id="b", prompt=17, max_tokens=4))
    plans = [host.step() and host.plans[-1] for _ in range(3)]
    assert [counts(plan) for plan in plans] == [[("a", 1), ("b", 15)], [("a", 1), ("b", 2)], [("a", 1), ("b", 1)]]
    host.run()
    assert late.output_token_ids == expected_tokens(late.request.prompt_token_ids, 4)


def test_what_fills_most_of_a_padded_size_is_computed_in_one_step():
    host = Host(token_budget=32, max_num_seqs=4, padding=Padding((4, 8, 16, 32), few=4))
    host.add(request(id="a", prompt=30))
    host.step()
    assert counts(host.plans[-1]) == [("a", 30)]


def test_prompts_that_wait_count_for_a_padded_size_too():
    host = Host(token_budget=32, max_num_seqs=4, padding=Padding((4, 8, 16, 32), few=4))
    for name in "abc":
        host.add(request(id=name, prompt=6))
    host.step()
    assert counts(host.plans[-1]) == [("a", 6), ("b", 6), ("c", 4)]


def test_the_running_prefill_goes_on_before_a_waiting_one_starts():
    host = Host(token_budget=8, max_num_seqs=4)
    host.add(request(id="a", prompt=12))
    host.add(request(id="b", prompt=12))
    host.step()
    assert counts(host.plans[-1]) == [("a", 8)]
    host.step()
    assert counts(host.plans[-1]) == [("a", 4), ("b", 4)]


def test_no_chunk_is_longer_than_max_prefill_chunk():
    host = Host(token_budget=16, max_prefill_chunk=5)
    host.add(request(id="a", prompt=12))
    host.add(request(id="b", prompt=12))
    host.step()
    assert counts(host.plans[-1]) == [("a", 5), ("b", 5)]


def test_a_step_never_exceeds_the_token_budget():
    host = Host(token_budget=9, max_num_seqs=5)
    for number in range(20):
        host.add(request(id=str(number), prompt=1 + number * 7 % 23, max_tokens=9))
    host.run()
    assert max(plan.num_tokens for plan in host.plans if plan) == 9


def test_no_more_sequences_run_than_there_are_rows():
    host = Host(max_num_seqs=3)
    for number in range(10):
        host.add(request(id=str(number), max_tokens=1 + number % 4))
    host.run()
    assert max(len(plan.rows) for plan in host.plans if plan) == 3


def test_a_sequence_joins_in_the_step_after_a_row_is_free():
    host = Host(max_num_seqs=1)
    host.add(request(id="a", max_tokens=2))
    host.add(request(id="b", max_tokens=2))
    host.run()
    assert [counts(plan) for plan in host.plans] == [[("a", 3)], [("a", 1)], [("b", 3)], [("b", 1)]]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 13, None])
@pytest.mark.parametrize("caching", [True, False])
def test_any_chunk_size_gives_the_same_tokens(chunk, caching):
    host = Host(max_prefill_chunk=chunk, token_budget=24, max_num_seqs=4, caching=caching)
    sequences = [host.add(request(id=str(n), prompt=4 + 9 * n, max_tokens=7))[0] for n in range(6)]
    host.run()
    for sequence in sequences:
        assert sequence.output_token_ids == expected_tokens(sequence.request.prompt_token_ids, 7)
        assert host.emitted(sequence) == sequence.output_token_ids


def test_only_a_new_sequence_is_listed_as_admitted():
    host = Host(token_budget=8)
    (sequence,) = host.add(request(prompt=12, max_tokens=3))
    host.run()
    assert [plan.admitted for plan in host.plans] == [(sequence,), (), (), ()]


def test_higher_priority_is_admitted_first_whenever_it_came():
    host = Host(max_num_seqs=1, policy="priority")
    for name, value in (("low", 5), ("high", -5), ("middle", 0), ("late high", -5)):
        host.add(request(id=name, priority=value))
    host.run()
    assert [s.request.id for s in host.finished] == ["high", "late high", "middle", "low"]


def test_priority_is_ignored_when_first_come_is_first_served():
    host = Host(max_num_seqs=1, policy="fcfs")
    for name, value in (("low", 5), ("high", -5)):
        host.add(request(id=name, priority=value))
    host.run()
    assert [s.request.id for s in host.finished] == ["low", "high"]


def test_a_waiting_sequence_that_does_not_fit_is_not_overtaken():
    host = Host(num_pages=10)
    host.add(request(id="a", prompt=20, max_tokens=10))
    host.step()
    host.add(request(id="large", prompt=30))
    host.add(request(id="small", prompt=2))
    host.run()
    admitted = [s.request.id for plan in host.plans if plan for s in plan.admitted]
    assert admitted == ["a", "large", "small"]


def test_nothing_to_do_is_no_plan():
    host = Host()
    assert host.scheduler.schedule() is None
    assert host.scheduler.commit(None, []) == []
    assert not host.scheduler.has_work


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_aborted_request_gives_everything_back(steps):
    host = Host(token_budget=8, caching=False)
    (sequence,) = host.add(request(prompt=14, max_tokens=20))
    for _ in range(steps):
        host.step()
    assert host.scheduler.abort("a") == [sequence]
    host.scheduler.check()
    assert sequence.finish_reason is FinishReason.ABORT
    assert host.pool.num_free == host.pool.num_pages
    assert not host.scheduler.has_work
    assert host.scheduler.schedule() is None


def test_the_pages_of_an_aborted_request_serve_the_next_one():
    host = Host()
    host.add(request(id="a", prompt=range(9), max_tokens=20))
    host.step()
    host.scheduler.abort("a")
    (again,) = host.add(request(id="b", prompt=range(9)))
    host.run()
    assert again.num_cached == 8
    assert again.output_token_ids == expected_tokens(range(9), 4)


def test_aborting_one_request_leaves_the_others_alone():
    host = Host()
    host.add(request(id="a", max_tokens=9))
    (other,) = host.add(request(id="b", max_tokens=9))
    host.step()
    host.scheduler.abort("a")
    host.run()
    assert other.output_token_ids == expected_tokens(other.request.prompt_token_ids, 9)


def test_an_id_can_be_used_again_when_its_request_has_ended():
    host = Host()
    host.add(request(id="a"))
    with pytest.raises(RequestError, match="already in use"):
        host.add(request(id="a"))
    host.run()
    host.add(request(id="a"))
    host.run()
    assert len(host.finished) == 2


def test_nothing_remembers_a_sequence_that_has_ended():
    pool = PagePool(16, 4)
    limits = Limits(token_budget=64, max_num_seqs=4, page_size=4, max_model_len=40)
    scheduler = Scheduler(limits, pool, PrefixCache(pool))
    references = []
    for number in range(4):
        sequence = Sequence(request(id=str(number), prompt=9, max_tokens=1, n=1 + number % 2))
        references.append(weakref.ref(sequence))
        scheduler.add(sequence)
    scheduler.abort("3")
    plan = scheduler.schedule()
    scheduler.commit(plan, [RowResult(SampledToken(1)) for _ in plan.rows])
    del sequence, plan
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


def test_unknown_ids_and_ended_sequences_can_be_ended_again_without_effect():
    host = Host()
    (sequence,) = host.add(request())
    host.run()
    assert host.scheduler.abort("a") == []
    assert host.scheduler.abort("never seen") == []
    host.scheduler.finish(sequence, FinishReason.ABORT)
    assert sequence.finish_reason is FinishReason.LENGTH


def test_commit_ignores_a_sequence_that_ended_while_its_step_was_running():
    host = Host()
    (gone,) = host.add(request(id="a", max_tokens=9))
    (stays,) = host.add(request(id="b", max_tokens=9))
    plan = host.scheduler.schedule()
    results = host.runner.run(plan)
    host.scheduler.abort("a")
    outputs = host.scheduler.commit(plan, results)
    host.scheduler.check()
    assert [output.sequence for output in outputs] == [stays]
    assert gone.num_output == 0


def test_results_must_match_the_plan():
    host = Host()
    host.add(request())
    plan = host.scheduler.schedule()
    with pytest.raises(ValueError, match="2 results for 1 scheduled rows"):
        host.scheduler.commit(plan, [RowResult(SampledToken(1))] * 2)
    with pytest.raises(ValueError, match="no sampled token"):
        host.scheduler.commit(plan, [RowResult()])


@pytest.mark.parametrize("length", [0, 40, 41])
def test_a_prompt_that_leaves_no_room_in_the_context_is_refused(length):
    host = Host(max_model_len=40)
    with pytest.raises(RequestError, match=r"must have 1 to 39 \(the context is 40 tokens\)"):
        host.add(request(prompt=range(length)))
    assert not host.scheduler.has_work


def test_a_prompt_that_can_never_fit_in_the_pool_is_refused_with_the_numbers():
    host = Host(num_pages=3, page_size=4)
    with pytest.raises(RequestError, match=r"12 tokens.*at most 11: the cache has 3 pages of 4 tokens"):
        host.add(request(prompt=12))
    (sequence,) = host.add(request(prompt=11))
    host.run()
    assert sequence.num_output == 2  # the last token needs no page: 3 * 4 computed, one more sampled


@pytest.mark.parametrize(
    ("field", "value"),
    [("token_budget", 0), ("max_num_seqs", 0), ("page_size", 0), ("max_model_len", 0), ("max_prefill_chunk", 0)],
)
def test_limits_below_one_are_refused_by_name(field, value):
    good = {"token_budget": 8, "max_num_seqs": 2, "page_size": 4, "max_model_len": 40}
    with pytest.raises(ValueError, match=f"{field} = 0"):
        Limits(**{**good, field: value})


def test_a_budget_below_the_number_of_rows_is_refused():
    with pytest.raises(ValueError, match=r"token_budget = 3: must be >= max_num_seqs \(4\)"):
        Limits(token_budget=3, max_num_seqs=4, page_size=4, max_model_len=40)


def test_a_budget_beyond_the_largest_padded_size_is_refused():
    with pytest.raises(ValueError, match=r"padding.sizes = \(4, 7\): the last must be >= 8"):
        Limits(token_budget=8, max_num_seqs=2, page_size=4, max_model_len=40, padding=Padding((4, 7)))


def test_pool_and_limits_must_agree_on_the_page_size():
    limits = Limits(token_budget=8, max_num_seqs=2, page_size=8, max_model_len=40)
    with pytest.raises(ValueError, match="page_size = 8: the page pool has pages of 4"):
        Scheduler(limits, PagePool(4, 4), NoPrefixCache())


def test_check_notices_a_leaked_page():
    host = Host()
    host.pool.allocate(1)
    with pytest.raises(AssertionError, match="1 pages leaked"):
        host.scheduler.check()


def test_check_notices_a_page_in_two_sequences():
    host = Host(caching=False)
    (one,) = host.add(request(id="a", max_tokens=9))
    (two,) = host.add(request(id="b", max_tokens=9))
    host.step()
    host.pool.free(two.pages)
    two.pages = list(one.pages)
    with pytest.raises(AssertionError, match="2 users, 1 holders"):
        host.scheduler.check()


def test_check_notices_a_lost_row():
    host = Host()
    sequence = Sequence(request())
    host.scheduler.add(sequence)
    host.step()
    sequence.row = 5
    with pytest.raises(AssertionError, match="rows are lost"):
        host.scheduler.check()
