"""/metrics: what it exports, what the Grafana dashboard and the web page ask of it, and vLLM's names beside ours."""

import json
import re
from pathlib import Path

import pytest
from helpers.server import Server
from prometheus_client.parser import text_string_to_metric_families

from serve.metrics import VLLM, FrontMetrics, Gaps

ROOT = Path(__file__).parent.parent.parent
DASHBOARD = ROOT / "configs" / "grafana" / "jaxllm.json"
FUNCTIONS = {"histogram_quantile", "sum", "by", "rate", "le", "outcome"}


@pytest.fixture(scope="module")
def exported():
    """Sample names after some traffic."""
    with Server() as server:
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
    assert len(panels) == 12
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
    gaps = Gaps(["gap_seconds"])
    for seconds in (0.001, 0.0011, 100.0):
        gaps.observe(seconds)
    (family,) = gaps.collect()
    buckets = {sample.labels["le"]: sample.value for sample in family.samples if sample.name.endswith("_bucket")}
    assert (buckets["0.001"], buckets["0.005"], buckets["80.0"], buckets["+Inf"]) == (1, 2, 2, 3)


def test_vllms_names_stand_beside_ours_when_asked_for():
    with Server() as server:
        metrics = FrontMetrics("byte")
        metrics.bind(server.front.client, server.front.admission)
        text = metrics.text().decode()
    for name, (kind, _) in VLLM.items():
        assert f"vllm:{name}{'_total' if kind == 'counter' else ''}{{model_name=" in text, name
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "request_queue_time_seconds"):
        assert f"vllm:{name}_bucket" in text
    assert "vllm:kv_cache_usage_perc" in text
