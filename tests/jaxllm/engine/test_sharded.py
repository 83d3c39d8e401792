"""Schedulers of shards as one: requests are dealt, steps are one, and no page is lost. Host only."""

import random

import pytest
from helpers.fake_runner import Host, expected_tokens
from helpers.requests import request

from jaxllm.core import FinishReason, RequestError, RowResult, Sequence
from jaxllm.engine.metrics import Metrics
from jaxllm.engine.sharded import ShardedScheduler


class Shards:
    """Two hosts behind one scheduler; the runner of each computes its part of a plan."""

    def __init__(self, **settings):
        self.hosts = [Host(**settings) for _ in range(2)]
        self.scheduler = ShardedScheduler(tuple(host.scheduler for host in self.hosts), Metrics())
        self.plans = []

    def add(self, wanted):
        sequences = [Sequence(wanted, index) for index in range(wanted.params.n)]
        for sequence in sequences:
            self.scheduler.add(sequence)
        return sequences

    def step(self):
        plan = self.scheduler.schedule()
        results = []
        for host, part in zip(self.hosts, plan.parts if plan else ()):
            results += host.runner.collect(host.runner.launch(part))
        self.scheduler.commit(plan, results)
        self.scheduler.check()
        self.plans.append(plan)

    def run(self):
        while self.scheduler.has_work:
            self.step()
        assert self.scheduler.pool.num_held == 0


def test_a_request_goes_to_the_shard_with_the_fewest_tokens_and_siblings_stay_together():
    shards = Shards(num_pages=40)
    shards.add(request("long", 30, max_tokens=20))
    shards.add(request("many", 5, n=3, max_tokens=3))
    shards.add(request("short", 3, max_tokens=3))
    assert [host.scheduler.num_waiting for host in shards.hosts] == [1, 4]
    assert shards.scheduler.num_waiting == 5
    shards.run()
    assert shards.scheduler.load_tokens(0) == shards.scheduler.load_tokens(1) == 0


def test_sequences_say_what_they_say_alone_whatever_comes_beside_them():
    shards, rng = Shards(num_pages=24, token_budget=16), random.Random(3)
    sequences = []
    for number in range(30):
        prompt = range(number * 100, number * 100 + rng.randint(1, 25))
        sequences.append((prompt, shards.add(request(f"r{number}", prompt, max_tokens=rng.randint(1, 9)))[0]))
        for _ in range(rng.randint(0, 3)):
            shards.step()
    shards.run()
    for prompt, sequence in sequences:
        assert sequence.output_token_ids == expected_tokens(prompt, sequence.num_output)
    assert sum(plan is not None and all(part.rows for part in plan.parts) for plan in shards.plans) > 10


def test_a_shard_without_work_has_an_empty_plan_and_both_idle_have_none():
    shards = Shards()
    shards.add(request("one", 5, max_tokens=2))
    shards.step()
    assert [len(part.rows) for part in shards.plans[-1].parts] == [1, 0]
    assert not shards.plans[-1].decode_only
    shards.run()
    assert shards.scheduler.schedule() is None


def test_aborted_and_finished_requests_are_forgotten_and_a_second_time_is_ignored():
    shards = Shards()
    (gone,), (ended,) = shards.add(request("gone", 5)), shards.add(request("ended", 5, max_tokens=50))
    shards.step()
    assert shards.scheduler.abort("gone") == [gone]
    assert shards.scheduler.abort("gone") == []
    shards.scheduler.finish(ended, FinishReason.STOP, "text")
    shards.scheduler.finish(ended, FinishReason.STOP, "text")
    shards.scheduler.check()
    assert not shards.scheduler.has_work
    assert (gone.finish_reason, ended.stop_reason) == (FinishReason.ABORT, "text")
    assert shards.scheduler.metrics.finished[FinishReason.ABORT] == 1


def test_a_request_that_can_never_run_is_refused_and_leaves_nothing():
    shards = Shards(num_pages=4, page_size=4)
    with pytest.raises(RequestError, match="pages of 4 tokens"):
        shards.add(request("big", 40))
    shards.scheduler.check()
    assert not shards.scheduler.has_work


def test_what_shards_count_is_summed_and_a_step_of_all_is_one():
    shards = Shards()
    for name in "abcd":
        shards.add(request(name, 5, max_tokens=3))
    shards.scheduler.counted.exposed_host_s = 0.5
    shards.run()
    counted = shards.scheduler.metrics
    assert (counted.generated_tokens, counted.prompt_tokens, counted.steps) == (12, 20, 3)
    assert counted.finished[FinishReason.LENGTH] == 4
    assert counted.exposed_host_s == 0.5
    assert shards.scheduler.metrics is counted


def test_results_that_do_not_fit_the_plan_are_refused():
    shards = Shards()
    shards.add(request("a", 5))
    plan = shards.scheduler.schedule()
    with pytest.raises(ValueError, match="2 results for 1"):
        shards.scheduler.commit(plan, [RowResult(), RowResult()])
