"""A span for each request, as OpenTelemetry's own exporter sees it."""

import pytest
from helpers.server import Server

from serve.tracing import make_tracer, span_observer

memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="the extra otel")


def test_a_request_becomes_one_span_with_its_times_and_tokens():
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    exporter, provider = memory.InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with Server() as server:
        server.front.metrics.observers.append(span_observer(provider.get_tracer("test"), "byte"))
        server.complete("hello", max_tokens=7)
        server.until(lambda: exporter.get_finished_spans())
    (span,) = exporter.get_finished_spans()
    found = dict(span.attributes)
    assert span.name == "llm_request"
    assert (found["gen_ai.usage.prompt_tokens"], found["gen_ai.usage.completion_tokens"]) == (5, 7)
    assert found["jaxllm.outcome"] == "finished"
    assert 0 <= found["gen_ai.latency.time_in_queue"] <= found["gen_ai.latency.time_to_first_token"]
    assert found["gen_ai.latency.time_to_first_token"] <= found["gen_ai.latency.e2e"]
    assert span.start_time < span.events[0].timestamp <= span.end_time


def test_a_tracer_is_made_and_ended():
    tracer, end = make_tracer("http://127.0.0.1:9/v1/traces", "jaxllm")
    assert tracer is not None
    end()
