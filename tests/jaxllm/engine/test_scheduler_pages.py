"""Scarce pages: preemption, resumption, headroom; and shared ones: prefix hits."""

import random

import pytest
from helpers.fake_runner import Host, expected_tokens
from helpers.requests import request


def mixed_requests(seed=0, count=24):
    rng = random.Random(seed)
    return [
        request(id=str(n), prompt=rng.randint(1, 40), max_tokens=rng.randint(1, 30), priority=rng.randint(0, 2))
        for n in range(count)
    ]


def tokens_of(host, requests):
    sequences = [host.add(made)[0] for made in requests]
    host.run()
    for sequence in sequences:
        assert host.emitted(sequence) == sequence.output_token_ids
    return [sequence.output_token_ids for sequence in sequences]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_pool_of_30_percent_gives_the_tokens_of_a_full_one(caching, policy):
    full = 8 * 18  # 8 rows of up to 70 tokens
    requests = mixed_requests()
    plenty = Host(num_pages=full, caching=caching, policy=policy)
    scarce = Host(num_pages=full * 3 // 10, caching=caching, policy=policy)
    assert tokens_of(plenty, requests) == tokens_of(scarce, requests)
    assert plenty.scheduler.metrics.preemptions == 0
    assert scarce.scheduler.metrics.preemptions > 0


@pytest.mark.parametrize("num_pages", [18, 20, 25, 33, 60])
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_any_pool_and_chunk_give_the_tokens_of_a_lone_sequence(num_pages, chunk):
    requests = mixed_requests(seed=num_pages)
    host = Host(num_pages=num_pages, max_prefill_chunk=chunk, token_budget=16)
    for made, tokens in zip(requests, tokens_of(host, requests), strict=True):
        assert tokens == expected_tokens(made.prompt_token_ids, made.params.max_tokens)


def preempted(host):
    return [s.request.id for plan in host.plans if plan for s in plan.preempted]


def test_the_newest_is_preempted():
    host = Host(num_pages=12, caching=False)
    for name in "abc":
        host.add(request(id=name, prompt=9, max_tokens=12))
    host.run()
    assert preempted(host)[0] == "c"
    assert "a" not in preempted(host)
    assert [s.request.id for s in host.finished] == ["a", "b", "c"]


def test_the_lowest_priority_is_preempted_even_when_it_is_the_oldest():
    host = Host(num_pages=12, caching=False, policy="priority")
    for name, value in (("a", 9), ("b", 0), ("c", 0)):
        host.add(request(id=name, prompt=9, max_tokens=12, priority=value))
    host.run()
    assert preempted(host)[0] == "a"
    assert "b" not in preempted(host)
    assert host.finished[-1].request.id == "a"


def test_a_preempted_sequence_resumes_before_newer_waiting_ones():
    host = Host(num_pages=12, caching=False)
    for name in "abcd":
        host.add(request(id=name, prompt=9, max_tokens=12))
    host.run()
    admitted = [s.request.id for plan in host.plans if plan for s in plan.admitted]
    assert admitted.index("d") > len(admitted) - 1 - admitted[::-1].index("c")


def test_a_preempted_sequence_finds_its_own_pages_and_does_not_count_them_as_cached():
    host = Host(num_pages=12)
    sequences = [host.add(request(id=name, prompt=9, max_tokens=12))[0] for name in "abc"]
    host.run()
    victims = [s for s in sequences if s.num_preempted]
    assert victims
    wanted = sum(s.num_prompt + s.num_output - 1 for s in sequences)
    bare = Host(num_pages=12, caching=False)
    for name in "abc":
        bare.add(request(id=name, prompt=9, max_tokens=12))
    bare.run()
    assert wanted <= host.runner.num_computed_tokens < bare.runner.num_computed_tokens
    assert all(s.num_cached == 0 for s in sequences)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("num_pages", [20, 25, 30, 40])
def test_nobody_is_preempted_within_a_page_of_steps_after_an_admission(caching, num_pages):
    host = Host(num_pages=num_pages, caching=caching)
    for made in mixed_requests(seed=num_pages, count=40):
        host.add(made)
    host.run()
    admissions = [step for step, plan in enumerate(host.plans) if plan.admitted]
    preemptions = [step for step, plan in enumerate(host.plans) if plan.preempted]
    assert preemptions
    for step in preemptions:
        assert step - max(a for a in admissions if a < step) > host.pool.page_size


def test_a_step_that_preempts_admits_nobody():
    host = Host(num_pages=12, max_num_seqs=2, policy="priority")
    host.add(request(id="first", prompt=8, max_tokens=20))
    host.add(request(id="large", prompt=30, max_tokens=20, priority=9))
    host.step()
    host.add(request(id="small", prompt=2))
    host.run()
    (step,) = (step for step, plan in enumerate(host.plans) if plan.preempted)
    assert host.plans[step].admitted == ()
    assert [s.request.id for s in host.plans[step + 1].admitted] == ["small"]


def test_sequences_that_need_no_more_pages_may_fill_the_pool():
    host = Host(num_pages=4, page_size=4)
    for names in ("ab", "cd"):
        for name in names:
            host.add(request(id=name, prompt=2, max_tokens=3))
        host.step()
        assert len(host.plans[-1].admitted) == 2
    host.run()
    assert host.scheduler.metrics.preemptions == 0


def test_recomputation_stays_a_small_part_of_the_work():
    host = Host(num_pages=43, caching=False, max_num_seqs=8)
    for made in mixed_requests(seed=7, count=60):
        host.add(made)
    host.run()
    wanted = sum(s.num_prompt + s.num_output - 1 for s in host.finished)
    assert host.runner.num_computed_tokens < 1.5 * wanted


def test_the_oldest_of_the_highest_priority_is_never_preempted():
    host = Host(num_pages=20, policy="priority")
    requests = mixed_requests(seed=9, count=30)
    first = min(requests, key=lambda r: (r.priority, int(r.id)))
    for made in requests:
        host.add(made)
    host.run()
    assert preempted(host)
    assert first.id not in preempted(host)


def test_a_prefix_hit_gives_the_same_tokens_and_is_counted():
    shared = tuple(range(40))
    requests = [request(id=str(n), prompt=(*shared, 100 + n), max_tokens=6) for n in range(5)]

    def one_after_another(host):
        sequences = []
        for made in requests:
            sequences += host.add(made)
            host.run()
        return sequences

    cached, fresh = one_after_another(Host()), one_after_another(Host(caching=False))
    assert [s.output_token_ids for s in cached] == [s.output_token_ids for s in fresh]
    assert [s.num_cached for s in cached] == [0, 40, 40, 40, 40]
    assert [s.num_cached for s in fresh] == [0] * 5


def test_only_what_was_not_found_is_computed():
    host = Host()
    host.add(request(id="a", prompt=range(40), max_tokens=1))
    host.run()
    host.runner.num_computed_tokens = 0
    host.add(request(id="b", prompt=range(40), max_tokens=1))
    host.run()
    assert host.runner.num_computed_tokens == 4  # 9 of 10 pages: one token at least is computed
    metrics = host.scheduler.metrics
    assert (metrics.prefix_hit_tokens, metrics.prefix_query_tokens) == (36, 80)


def test_running_sequences_share_the_pages_they_found():
    host = Host(num_pages=16, max_num_seqs=4)
    prompt = tuple(range(25))
    host.add(request(id="first", prompt=prompt, max_tokens=2))
    host.run()
    sequences = [host.add(request(id=str(n), prompt=prompt, max_tokens=8))[0] for n in range(3)]
    host.step()
    assert len({tuple(s.pages[:6]) for s in sequences}) == 1
    assert host.pool.num_held == 6 + 3
    host.run()
    assert all(s.output_token_ids == expected_tokens(prompt, 8) for s in sequences)


def test_a_conversation_finds_what_was_generated_in_it():
    host = Host()
    (turn,) = host.add(request(id="a", prompt=range(10), max_tokens=12))
    host.run()
    (again,) = host.add(request(id="b", prompt=[*turn.tokens, 500, 501]))
    host.run()
    assert again.num_cached == 20  # of 22 tokens, the last of which was never computed


def test_salts_share_nothing():
    host = Host()
    host.add(request(id="a", prompt=range(20), salt="x"))
    host.run()
    (other,) = host.add(request(id="b", prompt=range(20), salt="y"))
    host.run()
    (same,) = host.add(request(id="c", prompt=range(20), salt="x"))
    host.run()
    assert (other.num_cached, same.num_cached) == (0, 16)
    assert other.output_token_ids == same.output_token_ids


def test_cached_pages_make_room_for_running_sequences():
    host = Host(num_pages=10)
    for number in range(6):
        (sequence,) = host.add(request(id=str(number), prompt=20, max_tokens=10))
        host.run()
        assert sequence.num_preempted == 0
    assert host.scheduler.metrics.evicted_pages > 0


def test_pages_that_a_new_sequence_found_are_not_evicted_for_it():
    host = Host(num_pages=10)
    host.add(request(id="a", prompt=range(20), max_tokens=1))
    host.run()
    host.add(request(id="b", prompt=range(500, 516), max_tokens=1))  # leaves 1 page free, 5 + 4 cached
    host.run()
    (again,) = host.add(request(id="c", prompt=[*range(20), *range(700, 718)], max_tokens=2))
    host.run()
    assert again.num_cached == 20
    assert again.output_token_ids == expected_tokens([*range(20), *range(700, 718)], 2)
