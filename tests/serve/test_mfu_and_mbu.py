"""MFU and MBU as they are exported: shares made by hand of counters and peaks, absent where there is no peak."""

import pytest
from helpers.server import Server
from prometheus_client.parser import text_string_to_metric_families

from serve.utilisation import Utilisation

PEAK = {"peak_flops_per_s": 1000.0, "peak_bytes_per_s": 200.0, "devices": 2, "kv_token_bytes": 16.0}


def stats(steps, **counters):
    zero = {f"{phase}_{what}": 0.0 for phase in ("prefill", "decode") for what in ("step_s", "flops", "bytes")}
    return {"steps": steps, **zero, **counters}


def shown(view):
    return {
        (family.name, sample.labels["phase"]): sample.value for family in view.collect() for sample in family.samples
    }


def test_shares_are_work_over_what_the_steps_time_allowed():
    view = Utilisation(lambda: PEAK)
    view.beat(stats(0), 0.0)
    view.beat(stats(9, decode_step_s=2.0, decode_flops=500.0, decode_bytes=300.0), 5.0)
    assert shown(view) == {("jaxllm_mfu", "decode"): 0.25, ("jaxllm_mbu", "decode"): 0.75}


def test_only_the_last_ten_seconds_count_and_a_phase_without_steps_is_absent():
    view = Utilisation(lambda: PEAK)
    early = dict(prefill_step_s=1.0, prefill_flops=900.0, prefill_bytes=1.0)
    view.beat(stats(0), 0.0)
    view.beat(stats(1, **early), 1.0)
    assert shown(view)["jaxllm_mfu", "prefill"] == pytest.approx(0.9)
    for second in range(2, 12):
        view.beat(stats(second, **early, decode_step_s=second - 1.0, decode_flops=100.0 * (second - 1)), float(second))
    assert shown(view) == {("jaxllm_mfu", "decode"): pytest.approx(0.1), ("jaxllm_mbu", "decode"): 0.0}


def test_a_new_engine_counts_from_zero_and_is_not_mixed_with_the_one_before():
    view = Utilisation(lambda: PEAK)
    view.beat(stats(100, decode_step_s=50.0, decode_flops=1.0), 0.0)
    view.beat(stats(0), 1.0)
    assert shown(view) == {}
    view.beat(stats(4, decode_step_s=1.0, decode_flops=500.0), 2.0)
    assert shown(view)["jaxllm_mfu", "decode"] == 0.5


def test_without_a_known_peak_there_is_no_share():
    view = Utilisation(lambda: {"devices": 1})
    view.beat(stats(0), 0.0)
    view.beat(stats(9, decode_step_s=2.0, decode_flops=500.0), 5.0)
    assert list(view.collect()) == []


@pytest.mark.parametrize("peaks", [PEAK, {}], ids=["a known device", "a CPU"])
def test_a_server_exports_both_phases_where_its_device_is_known_and_its_work_everywhere(peaks):
    with Server() as server:
        server.front.client.health.ready.facts.update(peaks)
        server.until(lambda: server.front.client.health.beat.stats)  # shares are of differences between heartbeats
        server.complete(max_tokens=12)
        server.until(lambda: server.front.client.health.beat.stats.get("finished_length") == 1)
        text = server.http.get("/metrics").text
    found = {
        (sample.name, sample.labels.get("phase")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    for phase in ("prefill", "decode"):
        for what in ("flops", "bytes", "step_s"):
            assert found[f"jaxllm_engine_{phase}_{what}_total", None] > 0
        assert (("jaxllm_mfu", phase) in found) == bool(peaks)
        assert (("jaxllm_mbu", phase) in found) == bool(peaks)
