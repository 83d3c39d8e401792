"""/metrics: what it exports, what the Grafana dashboard and the web page ask of it, and vLLM's names beside ours."""

import json
import re
from pathlib import Path

import pytest
from helpers.server import Server
from prometheus_client.parser import text_string_to_metric_families

from serve.metrics import FrontMetrics, Gaps
from serve.vllm_metrics import ENGINE, GAPS, HISTOGRAMS

ROOT = Path(__file__).parent.parent.parent
DASHBOARD = ROOT / "configs" / "grafana" / "jaxllm.json"
FUNCTIONS = {"histogram_quantile", "sum", "by", "rate", "le", "outcome"}


@pytest.fixture(scope="module")
def exported():
    """Sample names after some traffic."""
    with Server() as server:
        server.front.client.health.ready.facts.update(peak_flops_per_s=1e12, peak_bytes_per_s=1e12)
        server.until(lambda: server.front.client.health.beat.stats)
        server.streamed_text(max_tokens=12)
        server.complete(max_tokens=4)
        server.until(lambda: server.front.client.health.beat.stats.get("finished_length") == 2)
        text = server.http.get("/metrics").text
    return {sample.name: sample for family in text_string_to_metric_families(text) for sample in family.samples}


def asked(expression):
    """Metric names in a PromQL expression."""
    bare = re.sub(r"\[[^]]*]|\{\{[^}]*}}|\$\w+", "", expression)
    return set(re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", bare)) - FUNCTIONS


def test_the_dashboard_asks_only_for_what_is_exported(exported):
    panels = json.loads(DASHBOARD.read_text())["panels"]
    names = {name for panel in panels for target in panel["targets"] for name in asked(target["expr"])}
    assert len(panels) == 14
    assert len(names) > 20
    assert names <= exported.keys(), names - exported.keys()
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_stage_of_a_request_is_measured(exported):
    for stage in ("time_to_first_token", "time_per_output_token", "e2e_request_latency", "request_queue_time"):
        assert exported[f"jaxllm_{stage}_seconds_count"].value == 2, stage
    for stage in ("request_prefill_time", "request_decode_time"):
        assert exported[f"jaxllm_{stage}_seconds_count"].value == 2
    assert 1 <= exported["jaxllm_inter_token_latency_seconds_count"].value <= 14
    assert exported["jaxllm_tokens_delivered_total"].value == 16


def test_gaps_are_counted_in_the_bucket_they_belong_to():
    gaps = Gaps([("gap_seconds", {})])
    for seconds in (0.001, 0.0011, 100.0):
        gaps.observe(seconds)
    (family,) = gaps.collect()
    buckets = {sample.labels["le"]: sample.value for sample in family.samples if sample.name.endswith("_bucket")}
    assert (buckets["0.001"], buckets["0.005"], buckets["80.0"], buckets["+Inf"]) == (1, 2, 2, 3)


def test_vllms_names_stand_beside_ours_with_its_label_when_asked_for():
    """Its dashboards choose by model_name: a series without the label would not be seen."""
    with Server() as server:
        server.front.metrics = metrics = FrontMetrics("byte")
        metrics.bind(server.front.client, server.front.admission)
        server.streamed_text(max_tokens=12)
        server.complete(max_tokens=4)
        stats = {**server.front.client.health.beat.stats, "decode_flops": 500.0, "prefill_flops": 100.0}
        stats |= {"decode_bytes": 900.0, "scheduled_tokens": 10.0}
        server.front.client.health.ready.facts.update(devices=2, kv_token_bytes=16.0)
        server.front.client.on_beat = lambda beat: None
        server.front.client.health.beat = type(server.front.client.health.beat)(0.0, False, False, stats)
        text = metrics.text().decode()
    theirs = {
        (sample.name, sample.labels.get("finished_reason"), sample.labels.get("le")): sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("vllm:")
    }
    assert all(sample.labels.get("model_name") == "byte" for sample in theirs.values())
    for name, (kind, _) in ENGINE.items():
        assert (f"vllm:{name}{'_total' if kind == 'counter' else ''}", None, None) in theirs, name
    for name in (*HISTOGRAMS.values(), *GAPS):
        assert (f"{name}_bucket", None, "+Inf") in theirs, name
    for name in HISTOGRAMS.values():
        assert theirs[f"{name}_count", None, None].value == 2
    assert theirs["vllm:request_success_total", "length", None].value == 2
    assert theirs["vllm:request_success_total", "stop", None].value == 0
    assert theirs["vllm:request_generation_tokens_sum", None, None].value == 16
    assert theirs["vllm:request_prompt_tokens_count", None, None].value == 2
    assert ("vllm:kv_cache_usage_perc", None, None) in theirs
    work = [
        theirs[f"vllm:estimated_{what}_per_gpu_total", None, None].value
        for what in ("flops", "read_bytes", "write_bytes")
    ]
    assert work == [600 / 2, (900 - 160) / 2, 160 / 2]
