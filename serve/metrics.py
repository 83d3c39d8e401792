"""What the front measures, and its exposition: prefix jaxllm_, and vLLM's names beside it when asked for.

In: ended streams, and the engine's own counters at scrape time. Out: Prometheus text. Times are monotonic differences.
Knows nothing of routes.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxllm.logs import StderrLog
from serve import vllm_metrics
from serve.admission import Admission
from serve.streams import Stream
from serve.utilisation import Utilisation

if TYPE_CHECKING:
    from serve.client import EngineClient

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
GAUGES = ("running", "waiting", "free_pages", "cached_pages", "held_pages", "total_pages", "expert_imbalance")
GAUGES += ("prefill_running", "prefill_waiting", "prefill_held_pages", "prefill_cached_pages", "prefill_total_pages")
GAUGES += ("prefill_workers", "replicas_serving")


class EngineCollector(Collector):
    """The engine's counters as of its last heartbeat."""

    def __init__(self, client: EngineClient, admission: Admission, dropped: Callable[[], int]) -> None:
        self._client, self._admission, self._dropped = client, admission, dropped

    def collect(self) -> Iterable[Metric]:
        health = self._client.health
        for name, value in health.beat.stats.items():
            kind = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
            yield kind(f"jaxllm_engine_{name}", f"engine: {name.replace('_', ' ')}", value=value)
        yield GaugeMetricFamily("jaxllm_up", "1 while the engine is warm", value=float(health.up))
        yield GaugeMetricFamily("jaxllm_stalled_seconds", "length of the running step", value=health.beat.stalled_s)
        yield CounterMetricFamily("jaxllm_engine_restarts", "engine restarts", value=health.restarts)
        yield CounterMetricFamily("jaxllm_requests_aborted", "requests taken back", value=self._client.aborted)
        yield CounterMetricFamily("jaxllm_requests_rejected", "requests refused at the queue", self._admission.rejected)
        yield GaugeMetricFamily("jaxllm_sequences_admitted", "sequences under way", value=self._admission.slots)
        yield CounterMetricFamily("jaxllm_log_lines_dropped", "log lines not written (disk full?)", self._dropped())
        yield GaugeMetricFamily("jaxllm_streams_open", "streams under way", value=len(self._client.streams))


class Gaps(Collector):
    """The histogram of the times between tokens. Counted once a token by one thread: a list, no locks."""

    def __init__(self, names: Iterable[tuple[str, dict[str, str]]]) -> None:
        """`names`: under which it is exported, each with its labels."""
        self._names, self._counts, self._sum = tuple(names), [0] * (len(SECONDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterable[Metric]:
        reached = list(itertools.accumulate(self._counts))
        buckets = [(str(float(edge)), float(count)) for edge, count in zip((*SECONDS, float("inf")), reached)]
        buckets[-1] = ("+Inf", buckets[-1][1])
        for name, labels in self._names:
            family = HistogramMetricFamily(name, "from one token of a stream to the next", labels=list(labels))
            family.add_metric(list(labels.values()), buckets, self._sum)
            yield family


class FrontMetrics:
    def __init__(self, vllm_model: str | None = None, log: StderrLog | None = None) -> None:
        self.registry = CollectorRegistry()
        self._vllm_model, self._log = vllm_model, log
        self.observers: list[Callable[[Stream], None]] = []  # told of every ended stream
        gaps: list[tuple[str, dict[str, str]]] = [("jaxllm_inter_token_latency_seconds", {})]
        if vllm_model is not None:
            gaps += [(name, {"model_name": vllm_model}) for name in vllm_metrics.GAPS]
        self.gaps = Gaps(gaps)
        self.registry.register(self.gaps)
        self.requests = Counter("jaxllm_requests", "ended requests", ["outcome"], registry=self.registry)
        self.tokens = Counter("jaxllm_tokens_delivered", "tokens given to clients", registry=self.registry)
        self._histograms = {
            what: [Histogram(f"jaxllm_{what}_seconds", text, buckets=SECONDS, registry=self.registry)]
            for what, text in {
                "time_to_first_token": "from arrival to the first token",
                "time_per_output_token": "mean gap between the tokens of a request",
                "e2e_request_latency": "from arrival to the last token",
                "request_queue_time": "from arrival to a place in the batch",
                "request_prefill_time": "from a place in the batch to the first token",
                "request_decode_time": "from the first token to the last",
            }.items()
        }
        if vllm_model is not None:
            self.observers.append(vllm_metrics.Requests(vllm_model, self.registry).ended)
            for what, name in vllm_metrics.HISTOGRAMS.items():
                theirs = Histogram(name, f"as vLLM's {name}", ["model_name"], buckets=SECONDS, registry=self.registry)
                self._histograms[what].append(theirs.labels(vllm_model))

    def bind(self, client: EngineClient, admission: Admission) -> None:
        client.on_gap = self.gaps.observe
        dropped = (lambda: 0) if self._log is None else (lambda log=self._log: log.dropped)
        self.registry.register(EngineCollector(client, admission, dropped))
        facts = lambda: {} if client.health.ready is None else client.health.ready.facts  # noqa: E731
        utilisation = Utilisation(facts)
        client.on_beat = lambda beat: utilisation.beat(beat.stats)
        self.registry.register(utilisation)
        if self._vllm_model is not None:
            self.registry.register(vllm_metrics.EngineView(self._vllm_model, lambda: client.health.beat.stats, facts))

    def ended(self, stream: Stream) -> None:
        self.requests.labels(stream.outcome).inc()
        self.tokens.inc(stream.num_tokens)
        for observer in self.observers:
            observer(stream)
        if stream.first_s is None or stream.last_s is None:
            return
        self._observe("time_to_first_token", stream.first_s - stream.began_s)
        self._observe("e2e_request_latency", stream.last_s - stream.began_s)
        self._observe("request_decode_time", stream.last_s - stream.first_s)
        if stream.began_running_s is not None:
            self._observe("request_queue_time", stream.began_running_s - stream.began_s)
            self._observe("request_prefill_time", stream.first_s - stream.began_running_s)
        each = stream.num_tokens / stream.request.params.n
        if each > 1:
            self._observe("time_per_output_token", (stream.last_s - stream.first_s) / (each - 1))

    def _observe(self, what: str, seconds: float) -> None:
        for histogram in self._histograms[what]:
            histogram.observe(max(0.0, seconds))

    def text(self) -> bytes:
        return generate_latest(self.registry)
