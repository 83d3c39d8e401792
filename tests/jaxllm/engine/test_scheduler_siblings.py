"""n > 1: the sequences of one request."""

from helpers.fake_runner import Host, expected_tokens
from helpers.requests import request

from jaxllm.core import FinishReason, Sequence


def test_siblings_share_the_pages_of_the_prompt():
    host = Host(num_pages=40)
    siblings = host.add(request(prompt=range(33), n=4, max_tokens=3))
    host.step()
    host.step()
    assert len({tuple(s.pages[:8]) for s in siblings}) == 1
    assert host.pool.num_held == 8 + 4
    host.run()
    assert [s.num_cached for s in siblings] == [0, 32, 32, 32]


def test_siblings_wait_until_the_first_has_computed_the_prompt():
    host = Host(token_budget=16)
    host.add(request(prompt=range(33), n=3, max_tokens=3))
    host.run()
    assert [[s.index for s in plan.admitted] for plan in host.plans[:4]] == [[0], [], [], [1, 2]]
    assert host.runner.num_computed_tokens == 33 + 1 + 1 + 3 * 2


def test_a_sibling_that_comes_after_the_prompt_was_computed_does_not_wait():
    host = Host()
    (first,) = host.add(request(prompt=range(10), max_tokens=9))
    host.step()
    late = Sequence(first.request, 1)
    host.scheduler.add(late)
    host.step()
    assert host.plans[-1].admitted == (late,)
    assert late.num_cached == 8


def test_others_go_ahead_of_siblings_that_wait():
    host = Host(token_budget=16)
    host.add(request(id="many", prompt=range(33), n=3))
    host.add(request(id="one", prompt=2))
    for _ in range(3):
        host.step()
    assert "one" in {row.sequence.request.id for row in host.plans[-1].rows}
    host.run()


def test_each_sibling_is_a_stream_of_its_own():
    host = Host()
    siblings = host.add(request(prompt=range(10), n=3, max_tokens=6))
    host.run()
    for sibling in siblings:
        assert sibling.output_token_ids == expected_tokens(range(10), 6, index=sibling.index)
    assert len({tuple(s.output_token_ids) for s in siblings}) == 3


def test_siblings_do_not_wait_without_a_cache():
    host = Host(caching=False)
    host.add(request(prompt=range(10), n=3))
    host.step()
    assert len(host.plans[-1].admitted) == 3
    host.run()


def test_siblings_do_not_wait_for_a_prompt_with_no_page_to_share():
    host = Host(page_size=4)
    host.add(request(prompt=range(4), n=3))
    host.step()
    assert len(host.plans[-1].admitted) == 3
    host.run()


def test_when_the_first_fails_the_next_computes_the_prompt():
    host = Host(token_budget=8)
    siblings = host.add(request(id="a", prompt=range(10), n=3))
    host.step()
    host.scheduler.finish(siblings[0], FinishReason.ERROR)
    host.scheduler.check()
    host.run()
    assert [[s.index for s in plan.admitted] for plan in host.plans[1:4]] == [[1], [], [2]]
    assert siblings[2].num_cached == 8
    assert [s.finish_reason for s in siblings] == [FinishReason.ERROR, FinishReason.LENGTH, FinishReason.LENGTH]


def test_aborting_a_request_ends_all_its_siblings():
    host = Host(token_budget=8)
    siblings = host.add(request(prompt=range(30), n=5))
    host.step()
    assert host.scheduler.abort("a") == siblings
    host.scheduler.check()
    assert all(s.finish_reason is FinishReason.ABORT for s in siblings)
    assert not host.scheduler.has_work
    assert host.pool.num_held == 0


def test_siblings_survive_the_preemption_of_the_first():
    host = Host(num_pages=14, token_budget=8, max_num_seqs=8)
    host.add(request(id="long", prompt=8, max_tokens=40))
    siblings = host.add(request(id="many", prompt=range(24), n=3, max_tokens=16))
    host.run()
    assert host.scheduler.metrics.preemptions > 0
    for sibling in siblings:
        assert sibling.output_token_ids == expected_tokens(range(24), 16, index=sibling.index)


def test_log_probabilities_of_the_prompt_come_with_the_first_sibling_alone():
    host = Host()
    host.add(request(prompt=range(10), n=3, prompt_logprobs=1))
    host.run()
    speakers = {out.sequence.index for out in host.outputs if out.prompt_logprobs}
    heard = [entry.token_id for out in host.outputs for entry in out.prompt_logprobs]
    assert speakers == {0}
    assert heard == list(range(1, 10))
