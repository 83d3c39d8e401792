"""What the gateway counts, as Prometheus text: outcomes, retries, choices, and each worker's state."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.gateway.balance import Balancer
from serve.gateway.worker import Worker


class Counters(Collector):
    def __init__(self, workers: Sequence[Worker], balancer: Balancer) -> None:
        self._workers, self._balancer = workers, balancer
        self.outcomes: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.retries = 0
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def outcome(self, name: str) -> None:
        self.outcomes[name] += 1

    def failure(self, worker: str) -> None:
        self.failures[worker] += 1

    def retry(self) -> None:
        self.retries += 1

    def collect(self) -> Iterable[Metric]:
        outcomes = CounterMetricFamily("jaxllm_gateway_requests", "proxied requests", labels=["outcome"])
        for name, count in self.outcomes.items():
            outcomes.add_metric([name], count)
        yield outcomes
        yield CounterMetricFamily("jaxllm_gateway_retries", "attempts after the first", value=self.retries)
        choices = CounterMetricFamily("jaxllm_gateway_choices", "why a worker was chosen", labels=["why"])
        for name, count in self._balancer.choices.items():
            choices.add_metric([name], count)
        yield choices
        yield GaugeMetricFamily(
            "jaxllm_gateway_remembered_blocks", "prompt blocks with a known worker", value=len(self._balancer.memory)
        )
        now = time.monotonic()
        for what, text, read in (
            ("usable", "1 when requests may go there", lambda w: float(w.usable(now))),
            ("in_flight", "requests under way", lambda w: float(w.in_flight)),
            ("load", "what it has to do, in requests", lambda w: w.burden),
        ):
            family = GaugeMetricFamily(f"jaxllm_gateway_worker_{what}", text, labels=["worker"])
            for worker in self._workers:
                family.add_metric([worker.name], read(worker))
            yield family
        failures = CounterMetricFamily("jaxllm_gateway_worker_failures", "attempts lost", labels=["worker"])
        for name, count in self.failures.items():
            failures.add_metric([name], count)
        yield failures

    def text(self) -> bytes:
        return generate_latest(self._registry)
