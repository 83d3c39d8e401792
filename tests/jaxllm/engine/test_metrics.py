from helpers.fake_runner import Host
from helpers.requests import request

from jaxllm.core import FinishReason
from jaxllm.engine.metrics import Metrics


def test_what_the_scheduler_does_is_counted():
    host = Host(num_pages=16)
    host.add(request(id="a", prompt=range(10), max_tokens=3))
    host.run()
    host.add(request(id="b", prompt=range(10), max_tokens=3))
    host.run()
    metrics = host.scheduler.metrics
    assert metrics.steps == 6
    assert metrics.prompt_tokens == 20
    assert metrics.generated_tokens == 6
    assert metrics.scheduled_tokens == host.runner.num_computed_tokens == 10 + 2 + 2 + 2
    assert (metrics.prefix_hit_tokens, metrics.prefix_query_tokens) == (8, 20)
    assert metrics.prefix_hit_rate == 0.4
    assert metrics.finished[FinishReason.LENGTH] == 2


def test_gauges_show_the_state_after_the_last_step():
    host = Host(num_pages=16, max_num_seqs=2)
    for name in "abc":
        host.add(request(id=name, prompt=5, max_tokens=3))
    host.step()
    metrics = host.scheduler.metrics
    assert (metrics.running, metrics.waiting) == (2, 1)
    assert metrics.free_pages + metrics.cached_pages + metrics.held_pages == 16
    assert metrics.held_pages == 4
    host.run()
    assert (metrics.running, metrics.waiting, metrics.held_pages) == (0, 0, 0)


def test_preemptions_and_evictions_are_counted():
    host = Host(num_pages=12)
    for name in "abc":
        host.add(request(id=name, prompt=9, max_tokens=12))
    host.run()
    assert host.scheduler.metrics.preemptions == sum(s.num_preempted for s in host.finished) > 0
    assert host.scheduler.metrics.evicted_pages == host.cache.stats.evicted_pages > 0


def test_metrics_can_be_printed_flat():
    flat = Metrics(steps=3).as_dict()
    assert flat["steps"] == 3
    assert flat["finished_stop"] == 0
    assert all(isinstance(value, int | float) for value in flat.values())


def test_a_rate_of_nothing_is_zero():
    assert Metrics().prefix_hit_rate == 0
