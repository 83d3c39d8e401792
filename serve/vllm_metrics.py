"""What we measure under vLLM's names, for dashboards and alerts made for it: `--metrics-compat vllm`.

In: ended streams, the engine's counters and facts. Out: Prometheus metrics with vLLM's prefix and its model_name label.
Everything here is also exported under our own names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.streams import Stream

# vLLM's name -> (kind, ours)
ENGINE = {
    "num_requests_running": ("gauge", "running"),
    "num_requests_waiting": ("gauge", "waiting"),
    "num_preemptions": ("counter", "preemptions"),
    "prompt_tokens": ("counter", "prompt_tokens"),
    "generation_tokens": ("counter", "generated_tokens"),
    "prefix_cache_queries": ("counter", "prefix_query_tokens"),
    "prefix_cache_hits": ("counter", "prefix_hit_tokens"),
}
HISTOGRAMS = {  # ours -> vLLM's
    "time_to_first_token": "vllm:time_to_first_token_seconds",
    "time_per_output_token": "vllm:request_time_per_output_token_seconds",
    "e2e_request_latency": "vllm:e2e_request_latency_seconds",
    "request_queue_time": "vllm:request_queue_time_seconds",
    "request_prefill_time": "vllm:request_prefill_time_seconds",
    "request_decode_time": "vllm:request_decode_time_seconds",
}
GAPS = ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")  # its name now, and before 0.11
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)


class EngineView(Collector):
    def __init__(
        self, model: str, stats: Callable[[], Mapping[str, float]], facts: Callable[[], Mapping[str, Any]]
    ) -> None:
        self._model, self._stats, self._facts = model, stats, facts

    def _one(self, kind: str, name: str, value: float) -> Metric:
        family = GaugeMetricFamily if kind == "gauge" else CounterMetricFamily
        metric = family(f"vllm:{name}", f"as vLLM's {name}", labels=["model_name"])
        metric.add_metric([self._model], value)
        return metric

    def collect(self) -> Iterable[Metric]:
        stats, facts = self._stats(), self._facts()
        for name, (kind, ours) in ENGINE.items():
            yield self._one(kind, name, stats.get(ours, 0))
        yield self._one(
            "gauge", "kv_cache_usage_perc", stats.get("held_pages", 0) / max(1, stats.get("total_pages", 1))
        )
        flops, moved = (sum(stats.get(f"{phase}_{what}", 0) for phase in ("prefill", "decode")) for what in _WORK)
        devices = facts.get("devices", 1)
        written = stats.get("scheduled_tokens", 0) * facts.get("kv_token_bytes", 0)
        yield self._one("counter", "estimated_flops_per_gpu", flops / devices)
        yield self._one("counter", "estimated_read_bytes_per_gpu", max(0.0, moved - written) / devices)
        yield self._one("counter", "estimated_write_bytes_per_gpu", written / devices)


_WORK = ("flops", "bytes")


class Requests:
    """What vLLM counts of each ended request beside its times."""

    def __init__(self, model: str, registry: CollectorRegistry) -> None:
        self._model = model
        labels = ["model_name", "finished_reason"]
        self._success = Counter("vllm:request_success", "ended requests", labels, registry=registry)
        for reason in ("stop", "length", "abort"):  # a rate needs the zero
            self._success.labels(model, reason)
        self._sizes = [
            Histogram(name, f"as {name}", ["model_name"], buckets=TOKENS, registry=registry).labels(model)
            for name in ("vllm:request_prompt_tokens", "vllm:request_generation_tokens")
        ]

    def ended(self, stream: Stream) -> None:
        if stream.reason in ("stop", "length", "abort"):
            self._success.labels(self._model, stream.reason).inc()
            for histogram, size in zip(self._sizes, (len(stream.request.prompt_token_ids), stream.num_tokens)):
                histogram.observe(size)
