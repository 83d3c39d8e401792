"""OpenTelemetry spans of requests, for who asks for them (`--otlp-traces-endpoint`, extra `otel`).

In: ended streams. Out: one span each, with attributes that vLLM and the GenAI conventions name. Times of streams are
monotonic; a span's are the wall clock's, taken when it ended. Knows nothing of routes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from jaxllm.config import ConfigError
from serve.streams import Stream

Observer = Callable[[Stream], None]


def make_tracer(endpoint: str, service: str) -> tuple[Any, Callable[[], None]]:
    """A tracer that sends over OTLP/HTTP, and what ends it. ConfigError without the extra."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError("--otlp-traces-endpoint needs OpenTelemetry: pip install 'jaxllm[otel]'") from None
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    return provider.get_tracer("jaxllm"), provider.shutdown


def span_observer(tracer: Any, model: str) -> Observer:
    """What FrontMetrics tells of every ended stream."""

    def observe(stream: Stream) -> None:
        now, wall = time.monotonic(), time.time_ns()
        last = stream.last_s or now

        def at(moment_s: float) -> int:
            return wall - int((now - moment_s) * 1e9)

        span = tracer.start_span("llm_request", start_time=at(stream.began_s))
        span.set_attributes(attributes_of(stream, model, last))
        if stream.first_s is not None:
            span.add_event("first token", timestamp=at(stream.first_s))
        span.end(end_time=at(last))

    return observe


def attributes_of(stream: Stream, model: str, last_s: float) -> dict[str, Any]:
    params = stream.request.params
    found: dict[str, Any] = {
        "gen_ai.request.id": stream.id,
        "gen_ai.response.model": model,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.n": params.n,
        "gen_ai.usage.prompt_tokens": len(stream.request.prompt_token_ids),
        "gen_ai.usage.completion_tokens": stream.num_tokens,
        "gen_ai.latency.e2e": last_s - stream.began_s,
        "jaxllm.cached_tokens": stream.num_cached,
        "jaxllm.outcome": stream.outcome,
    }
    if params.max_tokens is not None:
        found["gen_ai.request.max_tokens"] = params.max_tokens
    if stream.first_s is not None:
        found["gen_ai.latency.time_to_first_token"] = stream.first_s - stream.began_s
    if stream.began_running_s is not None:
        found["gen_ai.latency.time_in_queue"] = stream.began_running_s - stream.began_s
    return found
