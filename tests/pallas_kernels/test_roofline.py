import random
import subprocess
import sys

import pytest

from pallas_kernels import roofline
from pallas_kernels.roofline import (
    H200,
    H200_DATASHEET,
    H200_FOR_SECONDS,
    MODELS,
    Work,
    decode_floor,
    prefill_floor,
    workload_floor,
)


def ms(floor):
    return floor.step_s * 1e3


def test_an_8b_decode_step_moves_the_bytes_counted_by_hand():
    attention = 4096 * 128 * (32 + 8 + 8 + 32)  # q, k, v and output projections
    mlp = 3 * 4096 * 14336
    head = 4096 * 128256
    kv = 1024 * 32 * 2 * 8 * 128 * 2  # tokens, layers, K and V, heads, head dim, bytes
    floor = decode_floor(MODELS["llama-3.1-8b"], 1, 1024)
    assert floor.weight_bytes == 2 * (32 * (attention + mlp) + head) == 15_009_316_864
    assert floor.kv_bytes == kv == 134_217_728
    assert floor.step_s == pytest.approx((15_009_316_864 + 134_217_728) / 4.3e12)
    assert floor.tokens_per_s == pytest.approx(284, abs=0.5)
    assert floor.all_reduce_s == 0


@pytest.mark.parametrize(
    ("model", "floors_ms"),
    [
        ("llama-3.1-8b", {1: 3.52, 8: 3.74, 32: 4.49, 64: 5.49, 128: 7.49, 256: 12.85}),
        ("qwen3-0.6b", {1: 0.30, 8: 0.50, 32: 1.15, 64: 2.03, 128: 3.77, 256: 7.38}),
        ("qwen3-30b-a3b", {1: 1.44, 32: 13.1, 128: 17.1}),
    ],
)
def test_decode_floors_at_context_1k_are_the_published_ones(model, floors_ms):
    for batch, expected in floors_ms.items():
        assert ms(decode_floor(MODELS[model], batch, 1024)) == pytest.approx(expected, rel=4e-3, abs=5e-3)


@pytest.mark.parametrize(
    ("options", "expected_ms"),
    [
        ({"weights": "fp8"}, 1.90),
        ({"weights": "fp8", "kv_bytes": 1}, 1.88),
        ({"weights": "int4"}, 1.11),
        ({"tp": 2}, 1.76),
        ({"device": H200_DATASHEET}, 3.155),
    ],
)
def test_quantised_and_parallel_floors_of_8b_are_the_published_ones(options, expected_ms):
    assert ms(decode_floor(MODELS["llama-3.1-8b"], 1, 1024, **options)) == pytest.approx(expected_ms, abs=5.1e-3)


def test_for_seconds_256_rows_of_8b_are_bound_by_arithmetic_and_128_by_memory():
    model = MODELS["llama-3.1-8b"]
    steps = [decode_floor(model, rows, 1152, H200_FOR_SECONDS).step_s * 1e3 for rows in (128, 256)]
    assert steps == pytest.approx([8.00, 14.92], abs=5e-3)
    streams = workload_floor(model, [(1024, 1024)] * 256, H200_FOR_SECONDS)
    assert streams.tokens_per_s == pytest.approx(10_888, abs=1)


def test_a_large_batch_is_bound_by_arithmetic():
    model = MODELS["llama-3.1-8b"]
    arithmetic = (2 * model.dense_weights * 1024) / 790e12 + (2 * model.head_weights * 1024) / 790e12
    memory = 1024 * 16 * model.kv_token_bytes() / 4.3e12
    assert decode_floor(model, 1024, 16).step_s == pytest.approx(arithmetic + memory)


def test_70b_needs_two_devices_and_its_tp4_floor_is_the_published_one():
    model = MODELS["llama-3.3-70b"]
    assert model.weight_bytes() == pytest.approx(141.1e9, rel=1e-3)
    assert not decode_floor(model, 1, 1024).fits
    four = decode_floor(model, 1, 1024, tp=4)
    assert four.fits
    assert ms(four) == pytest.approx(8.1, abs=0.1)
    assert four.all_reduce_s == pytest.approx(160 * (5e-6 + 2 * 8192 * 2 / 450e9))


def test_prefill_floors_are_the_published_ones():
    assert ms(prefill_floor(MODELS["qwen3-30b-a3b"], 1024)) == pytest.approx(14.7, abs=0.05)
    model, T = MODELS["llama-3.1-8b"], 1024
    linear = 2 * model.dense_weights * T + 2 * model.head_weights
    attention = 4 * (T * (T + 1) / 2) * 32 * 32 * 128
    assert prefill_floor(model, T).step_s == pytest.approx((linear + attention) / 790e12)


def test_model_sizes_are_the_published_ones():
    sizes = {name: round(model.weight_bytes() / 1e9, 1) for name, model in MODELS.items()}
    assert sizes == {
        "llama-3.1-8b": 16.1,
        "qwen3-0.6b": 1.2,
        "qwen3-30b-a3b": 61.1,
        "llama-3.3-70b": 141.1,
        "deepseek-v2-lite": 31.4,
    }
    kilobytes = {name: round(model.kv_token_bytes() / 1e3, 1) for name, model in MODELS.items()}
    assert list(kilobytes.values()) == [131.1, 114.7, 98.3, 327.7, 31.1]


@pytest.mark.parametrize("window", [None, 1, 7, 30, 1000])
def test_attention_work_equals_a_count_of_every_pair(window):
    rows, N, K, H = ((1, 1), (0, 9), (1, 50), (12, 12), (25, 60), (40, 45)), 8, 2, 16
    pairs, keys = 0, 0
    for queries, length in rows:
        seen = set()
        for i in range(length - queries, length):
            visible = [j for j in range(length) if j <= i and (window is None or j > i - window)]
            pairs += len(visible)
            seen |= set(visible)
        keys += len(seen)
    work = roofline.paged_attention(rows, N=N, K=K, H=H, window=window, q_bytes=4, kv_bytes=1)
    assert work.flops == 4 * pairs * N * H
    assert work.bytes == keys * 2 * K * H + sum(queries for queries, _ in rows) * N * H * 2 * 4


def test_a_decode_batch_of_the_prototypes_bench_takes_its_floor():
    work = roofline.paged_attention([(1, 8192)] * 32, N=32, K=8, H=128)
    assert work.bytes == 32 * (8192 * 8 * 128 * 2 * 2 + 32 * 128 * 2 * 2)
    assert work.floor_s(H200) == pytest.approx(work.bytes / 4.3e12)


def test_small_ops_count_what_they_move():
    assert roofline.page_write(16, K=8, H=128) == Work(16 * 8 * 128 * 2 * 2 * 2, 0)
    assert roofline.sampling(64, 152064).bytes == 64 * 152064 * 4
    assert roofline.linear(3, 10, 20) == Work(400, 1200)
    assert Work(1, 2) + Work(3, 4) == Work(4, 6)


def test_the_module_needs_no_jax():
    code = "import sys, pallas_kernels.roofline; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_workload_is_its_prefills_and_the_decode_steps_of_what_is_unfinished():
    model = MODELS["llama-3.1-8b"]
    whole = roofline.workload_floor(model, [(100, 3), (200, 2)])
    steps = [
        prefill_floor(model, 100),
        prefill_floor(model, 200),
        decode_floor(model, 2, 151),
        decode_floor(model, 1, 102),
    ]
    assert whole.step_s == pytest.approx(sum(step.step_s for step in steps))
    assert whole.tokens_per_s == pytest.approx(5 / whole.step_s)


def test_the_peers_workload_has_the_published_floor():
    source = random.Random(0)
    prompts = [[source.randint(0, 10_000) for _ in range(source.randint(100, 1024))] for _ in range(256)]
    lengths = [(len(prompt), source.randint(100, 1024)) for prompt in prompts]
    assert roofline.workload_floor(MODELS["llama-3.1-8b"], lengths).tokens_per_s == pytest.approx(13_242, rel=2e-3)
    assert roofline.workload_floor(MODELS["qwen3-0.6b"], lengths).tokens_per_s == pytest.approx(36_130, rel=2e-3)


SMALL = roofline.ModelDims(L=2, D=4, N=2, K=1, H=2, F=8, V=10, tied=True)


def test_a_steps_work_is_counted_by_hand():
    attention = 4 * 2 * 2 + 4 * 2 * 1 * 2 + 2 * 2 * 4  # q, k and v, o
    linear, head = 2 * (attention + 3 * 4 * 8), 4 * 10
    assert SMALL.dense_weights == linear == 288
    kv_token = 2 * 2 * 1 * 2 * 2  # layers, K and V, heads, head dim, bytes
    cost = roofline.StepCost(SMALL, ((None, 2),))
    # Three rows decode with 5, 6 and 9 keys each.
    found = cost(3, 3, [(20, 20)], decode=True)
    assert found.bytes == 2 * (linear + head) + (20 + 3) * kv_token == 656 + 368
    assert found.flops == 3 * 2 * linear + 3 * 2 * head + 4 * 20 * 2 * 2 * 2 == 1728 + 240 + 640
    # A prompt's last three tokens beside one that decodes: 4 + 5 + 6 pairs, and 9.
    found = cost(4, 2, [(6 + 9, 15 + 9)], decode=False)
    assert found.bytes == 656 + (15 + 4) * kv_token
    assert found.flops == 4 * 2 * linear + 2 * 2 * head + 4 * 24 * 2 * 2 * 2


def test_windows_weigh_their_layers_and_bytes_a_weight_are_those_held():
    cost = roofline.StepCost(SMALL, ((None, 1), (4, 1)), linear_bytes=1, head_bytes=2, kv_bytes=1)
    found = cost(1, 1, [(10, 10), (4, 4)], decode=True)
    assert cost.kv_token_bytes == 8
    assert found.bytes == 288 + 2 * 40 + (1 + 10 / 2 + 4 / 2) * 8
    assert found.flops == 2 * 288 + 2 * 40 + 4 * (10 + 4) * 2 * 2


def test_sparsity_is_how_many_times_its_own_weights_a_token_s_step_reads():
    experts = roofline.Experts(E=8, k=2, F=8)
    model = roofline.ModelDims(L=1, D=4, N=2, K=1, H=2, F=0, V=10, tied=True, experts=experts)
    assert model.token_weights == 48 + 2 * 96  # attention; of 96 weights an expert
    assert model.sparsity == (48 + 8 * 96) / (48 + 2 * 96)
    assert SMALL.sparsity == 1


def test_a_step_reads_the_experts_that_uniform_routing_touches():
    experts = roofline.Experts(E=4, k=2, F=8)
    model = roofline.ModelDims(L=1, D=4, N=2, K=1, H=2, F=0, V=10, tied=True, experts=experts)
    one, two = (roofline.StepCost(model, ((None, 1),))(n, n, [(0, 0)], decode=True) for n in (1, 2))
    expert = 3 * 4 * 8
    assert two.bytes - one.bytes == pytest.approx((3 - 2) * expert * 2 + 8)  # 4 (1 - 1/2^2) = 3 experts, one more token
    assert one.flops == 2 * (48 + 4 * 4 + 2 * expert) + 2 * 40  # attention, router, two experts; the head


@pytest.mark.parametrize(("batch", "context"), [(1, 1024), (32, 1024)])
def test_a_decode_step_costs_what_the_floor_says_and_the_tokens_it_writes(batch, context):
    model = MODELS["llama-3.1-8b"]
    floor, cost = decode_floor(model, batch, context), roofline.StepCost(model, ((None, model.L),))
    found = cost(batch, batch, [(batch * context, batch * context)], decode=True)
    assert found.bytes == pytest.approx(floor.weight_bytes + floor.kv_bytes + batch * model.kv_token_bytes())


def test_peaks_are_datasheets_by_jaxs_name_and_a_cpu_has_none():
    h200 = roofline.peak_of("NVIDIA H200")
    assert h200 is not None
    assert (h200.bf16_flops_per_s, h200.bytes_per_s) == (H200_DATASHEET.bf16_flops_per_s, H200_DATASHEET.bytes_per_s)
    assert roofline.peak_of("cpu") is None
