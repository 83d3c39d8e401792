"""What steps did and how long they took, against sums made by hand; the clock is the test's."""

import pytest
from helpers.byte_model import build_engine

from jaxllm.core import Request, SamplingParams, ScheduledRow, Sequence, StepPlan
from jaxllm.engine.metrics import Metrics
from jaxllm.engine.utilisation import StepMeter, seen_by
from jaxllm.graph.models.config import ExpertsConfig, ModelConfig
from jaxllm.graph.models.dims import dims_of, step_cost
from jaxllm.graph.models.quantised import StoredQuantisation
from pallas_kernels.roofline import ModelDims, StepCost, visible

SIZES = dict(vocab_size=10, num_layers=2, d_model=4, num_heads=2, num_kv_heads=1, head_dim=2, d_ff=8)
LINEAR, HEAD, KV = 288, 40, 16  # weights, weights, bytes a token; see test_roofline
COST = StepCost(ModelDims(L=2, D=4, N=2, K=1, H=2, F=8, V=10, tied=True), ((None, 2),))


def row(start, count, sample=True):
    sequence = Sequence(Request(id="r", prompt_token_ids=(1,), params=SamplingParams()))
    return ScheduledRow(sequence, start, count, sample)


DECODE = StepPlan((row(4, 1), row(5, 1), row(8, 1)))  # 5, 6 and 9 keys
MIXED = StepPlan((row(3, 3), row(8, 1)))  # 4 + 5 + 6 pairs over 6 keys, and 9
UNFINISHED = StepPlan((row(0, 4, sample=False),))  # 1 + 2 + 3 + 4 pairs


def measured(*steps):
    """Of (plan, launched, collected)."""
    meter = StepMeter(COST, Metrics())
    for step in steps:
        meter.collected(*step)
    return meter.metrics


def test_a_decode_steps_bytes_flops_and_seconds_are_those_counted_by_hand():
    found = measured((DECODE, 10.0, 10.5))
    assert found.decode_step_s == 0.5
    assert found.decode_bytes == 2 * (LINEAR + HEAD) + (20 + 3) * KV
    assert found.decode_flops == 3 * 2 * (LINEAR + HEAD) + 4 * 20 * 2 * 2 * 2
    assert (found.prefill_step_s, found.prefill_flops, found.prefill_bytes) == (0, 0, 0)


def test_a_step_with_a_prompts_chunk_is_prefill_the_decoding_rows_in_it_included():
    found = measured((MIXED, 0.0, 1.0), (UNFINISHED, 1.0, 3.0))
    assert found.prefill_step_s == 3.0
    assert found.prefill_bytes == 2 * 2 * (LINEAR + HEAD) + (15 + 4) * KV + (4 + 4) * KV
    heads = 2 + 0  # a chunk that does not end its prompt samples nothing
    assert found.prefill_flops == (4 + 4) * 2 * LINEAR + heads * 2 * HEAD + 4 * (24 + 10) * 2 * 2 * 2
    assert found.decode_step_s == 0


def test_a_step_begins_when_the_one_before_ends_and_idle_time_is_nobodys():
    found = measured((DECODE, 0.0, 1.0), (DECODE, 0.5, 1.75), (DECODE, 9.0, 9.25))
    assert found.decode_step_s == pytest.approx(1.0 + 0.75 + 0.25)


@pytest.mark.parametrize("window", [None, 4, 7])
@pytest.mark.parametrize("plan", [DECODE, MIXED, UNFINISHED])
def test_the_quick_sum_is_the_sum_over_rows(plan, window):
    starts, counts = [one.start for one in plan.rows], [one.count for one in plan.rows]
    rows = [(count, start + count) for start, count in zip(starts, counts)]
    assert seen_by(starts, counts, window, decode=plan is DECODE) == visible(rows, window)[:2]


def test_an_engine_measures_every_step_it_accounts_for():
    engine, _ = build_engine()
    engine.meter = StepMeter(COST, engine.scheduler.metrics)
    engine.add(engine.make_request(list(range(32, 52)), SamplingParams(max_tokens=4, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    found = engine.scheduler.metrics
    # 20 tokens of a prompt in one step; then a step for each of three tokens with 21, 22 and 23 keys.
    assert found.prefill_flops == 20 * 2 * LINEAR + 2 * HEAD + 4 * 210 * 2 * 2 * 2
    assert found.decode_flops == 3 * 2 * (LINEAR + HEAD) + 4 * (21 + 22 + 23) * 2 * 2 * 2
    assert found.prefill_step_s > 0
    assert found.decode_step_s > 0


def test_dims_are_those_of_the_model_with_its_experts():
    experts = ExpertsConfig(count=8, per_token=2, d_ff=6, shared_d_ff=12)
    dims = dims_of(ModelConfig(**SIZES, experts=experts, sparse_layers=(False, True)))
    assert (dims.L, dims.D, dims.N, dims.K, dims.H, dims.F, dims.V) == (2, 4, 2, 1, 2, 8, 10)
    assert dims.experts is not None
    assert (dims.experts.E, dims.experts.k, dims.experts.F) == (8, 2, 6)
    assert (dims.experts.shared, dims.experts.dense_layers) == (2, 1)


@pytest.mark.parametrize(
    ("quantization", "model", "linear", "head"),
    [
        ("none", {}, 4, 4),
        ("int8", {}, 1, 1),
        ("int4", {}, 0.5 + 2 / 64, 1),
        ("fp8", {"tie_embeddings": True}, 1, 4),
        ("none", {"stored": StoredQuantisation(method="gptq", group=32)}, 0.5 + 2 / 32, 4),
        ("none", {"stored": StoredQuantisation(method="fp8")}, 1, 4),
    ],
)
def test_bytes_of_a_weight_follow_how_it_is_held(quantization, model, linear, head):
    cost = step_cost(ModelConfig(**SIZES, windows=(None, 3), **model), quantization, 64, 4)
    assert (cost.linear_bytes, cost.head_bytes, cost.kv_bytes) == (linear, head, 4)
    assert cost.windows == ((None, 1), (3, 1))
