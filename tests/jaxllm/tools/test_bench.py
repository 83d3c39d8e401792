"""The benchmark's arithmetic over a generator that keeps a clock of its own, and its workload."""

import random
import sys

import pytest

from jaxllm.core import CompletionOutput, FinishReason, RequestOutput
from jaxllm.engine.metrics import Metrics
from jaxllm.graph.models.config import ExpertsConfig, ModelConfig
from jaxllm.tools import bench as tool
from jaxllm.tools.bench import Bench, BenchError, floors, startup, workload

CONFIG = ModelConfig(
    vocab_size=128256,
    num_layers=32,
    d_model=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    d_ff=14336,
    context_length=4096,
)


class Clock:
    """Generates by a formula: 1 us a prompt token, then a decode step of 1 ms and 10 us a row."""

    def __init__(self):
        self.now, self.calls, self.short = 0.0, [], 0

    def generate(self, prompts, params, *, use_tqdm=True):
        outs = [one.max_tokens for one in params]
        self.calls.append((list(map(len, prompts)), outs, params[0]))
        self.now += 1e-6 * sum(map(len, prompts))
        for made in range(1, max(outs)):
            self.now += 1e-3 + 1e-5 * sum(out > made for out in outs)
        return [
            RequestOutput(
                request_id=str(i),
                prompt=None,
                prompt_token_ids=list(prompt),
                outputs=[CompletionOutput(index=0, token_ids=[1] * (out - self.short))],
                finished=True,
            )
            for i, (prompt, out) in enumerate(zip(prompts, outs))
        ]


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(tool.time, "perf_counter", lambda: made.now)
    return made


def test_a_decode_step_is_free_of_prefill(clock):
    figures = list(Bench(clock, floors(CONFIG, "NVIDIA H200"), repeats=2).latency([1, 8], [1024], []))
    assert [figure.at for figure in figures] == ["batch 1, context 1024", "batch 8, context 1024"]
    assert [figure.value for figure in figures] == pytest.approx([1.01, 1.08])
    assert all(len(figure.repeats) == 2 for figure in figures)
    assert [figure.floor for figure in figures] == pytest.approx([3.522, 3.740], abs=2e-3)
    sampling = clock.calls[-1][2]
    assert (sampling.temperature, sampling.ignore_eos) == (0.0, True)


def test_a_known_prefix_is_timed_behind_a_new_one(clock):
    known, whole = set(), clock.generate

    def generate(prompts, params, *, use_tqdm=True):
        """What is cached costs nothing."""
        prefix = tuple(prompts[0][:1000])
        outputs = whole(prompts, params)
        if prefix in known:
            clock.now -= 1e-6 * 1000
            outputs[0].num_cached_tokens = 1000
        known.add(prefix)
        return outputs

    clock.generate = generate
    new, again = Bench(clock, floors(CONFIG, ""), repeats=2).shared_prefix([1000])
    assert (new.value, again.value) == pytest.approx((1.032, 0.032))
    assert len(again.repeats) == 2
    assert again.notes["times shorter"] == pytest.approx(1.032 / 0.032)
    assert [params.max_tokens for *_, params in clock.calls] == [1] * 6  # a warm-up and two repeats, of two prompts


def test_half_a_known_prefix_is_an_error(clock):
    whole = clock.generate

    def generate(prompts, params, *, use_tqdm=True):
        outputs = whole(prompts, params)
        outputs[0].num_cached_tokens = 500
        return outputs

    clock.generate = generate
    with pytest.raises(BenchError, match="500 of 1000 tokens were cached: is prefix_cache on"):
        list(Bench(clock, floors(CONFIG, "")).shared_prefix([1000]))


def test_what_the_device_waited_for_the_host_is_told_a_step(clock):
    metrics = Metrics()
    whole = clock.generate

    def generate(prompts, params, **how):
        metrics.exposed_host_s += 0.5 + 2e-4 * params[0].max_tokens  # the 0.5 stands for prefill
        return whole(prompts, params, **how)

    clock.generate = generate
    (figure,) = Bench(clock, floors(CONFIG, "some GPU"), metrics).latency([4], [16], [])
    assert figure.notes == {"exposed host, ms": pytest.approx(0.2)}


def test_how_many_steps_went_in_a_dispatch_is_told_where_it_was_more_than_one(clock):
    metrics = Metrics(steps=7, dispatches=7)
    whole = clock.generate

    def generate(prompts, params, **how):
        metrics.steps += params[0].max_tokens
        metrics.dispatches += params[0].max_tokens // 4
        return whole(prompts, params, **how)

    clock.generate = generate
    (figure,) = Bench(clock, floors(CONFIG, "some GPU"), metrics).latency([4], [16], [])
    assert figure.notes == {"steps a dispatch": 4}


def test_prefill_is_the_time_to_one_token_and_its_first_try_does_not_count(clock):
    (figure,) = Bench(clock, floors(CONFIG, "NVIDIA H200"), repeats=2).latency([], [], [1000])
    assert figure.value == pytest.approx(1.0)
    assert [lengths for lengths, _, _ in clock.calls[1:]] == [[1000]] * 3


def test_throughput_counts_output_tokens_over_the_whole_run(clock):
    figure = Bench(clock, floors(CONFIG, "some GPU")).throughput(4, (2, 5))
    lengths, outs, sampling = clock.calls[-1]
    seconds = 1e-6 * sum(lengths) + sum(1e-3 + 1e-5 * sum(out > made for out in outs) for made in range(1, max(outs)))
    assert figure.value == pytest.approx(sum(outs) / seconds)
    assert sampling.temperature == 0.6
    assert figure.floor is None


def test_throughput_tells_what_the_device_waited_for_the_host_in_one_run_of_the_workload(clock):
    metrics = Metrics(exposed_host_s=7.0)
    whole = clock.generate

    def generate(prompts, params, **how):
        metrics.exposed_host_s += 0.25 if len(prompts) == 4 else 100.0  # the latter: the one that warms up
        return whole(prompts, params, **how)

    clock.generate = generate
    figure = Bench(clock, floors(CONFIG, "some GPU"), metrics, repeats=2).throughput(4, (2, 5))
    assert figure.notes == {"exposed host, s": pytest.approx(0.25)}


def test_a_request_that_ends_early_is_no_measurement(clock):
    clock.short = 1
    with pytest.raises(BenchError, match="ended early"):
        list(Bench(clock, floors(CONFIG, "some GPU")).latency([1], [16], []))


def test_the_workload_is_the_peers_to_the_token():
    source = random.Random(0)
    theirs = [[source.randint(0, 10_000) for _ in range(source.randint(100, 1024))] for _ in range(256)]
    outs = [source.randint(100, 1024) for _ in range(256)]
    assert workload(256, (100, 1024), 128_256) == (theirs, outs)
    assert sum(outs) == 133_966


def test_the_workload_stays_within_a_small_vocabulary():
    prompts, _ = workload(8, (5, 9), 99)
    assert max(map(max, prompts)) <= 99


CHILD = """
import json, sys, time
print("noise")
phases = {"weights": 0.2, "compile": 0.25}
print("first-token:" + json.dumps({"ready": 0.25, **phases, "first token": 0.5, "at": time.time() + 1.0}))
open(sys.argv[1], "a").write("x")
"""


def test_start_up_is_timed_from_outside_cold_then_warm_and_the_rest_is_imports():
    cold, warm = startup([sys.executable, "-c", CHILD], repeats=2)
    assert [cold.at, warm.at] == ["cold cache", "warm cache"]
    assert [len(cold.repeats), len(warm.repeats)] == [1, 2]
    assert 1.0 < cold.value < 10.0
    assert cold.notes["imports, s"] == pytest.approx(cold.value - 0.75)
    assert list(cold.notes) == ["imports, s", "ready, s", "weights, s", "compile, s", "first token, s"]


def test_a_start_that_fails_says_why():
    with pytest.raises(BenchError, match="no such device"):
        startup([sys.executable, "-c", "raise SystemExit('no such device')"], repeats=1)


def test_an_error_of_a_request_is_told():
    class Failing(Clock):
        def generate(self, prompts, params, *, use_tqdm=True):
            failed = CompletionOutput(index=0, finish_reason=FinishReason.ERROR)
            return [
                RequestOutput(
                    request_id="7", prompt=None, prompt_token_ids=[], outputs=[failed], finished=True, error="sick"
                )
                for _ in prompts
            ]

    with pytest.raises(BenchError, match="request 7 ended early: sick"):
        Bench(Failing(), floors(CONFIG, "some GPU")).throughput(2, (2, 3))


def test_floors_know_experts_and_quantised_weights():
    sparse = ModelConfig(
        vocab_size=151936,
        num_layers=48,
        d_model=2048,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        d_ff=6144,
        experts=ExpertsConfig(count=128, per_token=8, d_ff=768),
    )
    assert floors(sparse, "NVIDIA H200").decode_ms(32, 1024) == pytest.approx(13.1, abs=0.05)
    assert floors(CONFIG, "NVIDIA H200", "int4").decode_ms(1, 1024) == pytest.approx(1.11, abs=5e-3)
    assert floors(CONFIG, "NVIDIA H200", "fp8").decode_ms(1, 1024) == pytest.approx(1.90, abs=5e-3)
