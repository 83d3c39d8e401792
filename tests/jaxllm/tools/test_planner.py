"""The planner: its arithmetic by hand, its fit on recorded runs, its refusals, and the recipe it writes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.config import ConfigError, EngineConfig, load
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.dims import dims_of
from jaxllm.tools import planner
from jaxllm.tools.planner import Goal, errors, memory_use, parse_gpus, parse_time, rank, read_device
from pallas_kernels.roofline import MODELS, decode_floor
from serve.cli import main
from sharding.axes import MeshConfig
from tools import calibrate_planner

ROOT = Path(__file__).parents[3]
LLAMA = MODELS["llama-3.1-8b"]
BIG = MODELS["llama-3.3-70b"]
MOE = MODELS["qwen3-30b-a3b"]


@pytest.fixture(scope="module")
def h200():
    return read_device("H200")


def goal(gpus=8, **changes):
    return Goal(gpus, "H200", **changes)


# ---- calibration ----


def test_recorded_decode_steps_are_predicted_within_15_percent(h200):
    found = errors(h200)
    good = [run for run, _, error in found if abs(error) <= 0.15]
    assert len({(run.model, run.tp, run.batch) for run in good if run.costs == "auto"}) >= 8
    assert len(good) == len(found), [(run, error) for run, _, error in found if abs(error) > 0.15]
    assert {run.model for run in good} >= {"llama-3.1-8b", "qwen3-0.6b"}
    assert {run.tp for run in good} >= {1, 2, 4}


def test_the_recorded_runs_are_those_of_the_result_files(h200):
    """Read again here, by a reader of its own."""
    ours = [run for run in h200.runs if run.source.startswith("benchmarks/")]
    assert len(ours) >= 8
    for run in ours:
        raw = json.loads((ROOT / run.source).read_text())
        at = f"batch {run.batch}, context {run.context}"
        (value,) = [row["value"] for row in raw["figures"] if row["what"] == "decode step" and row["at"] == at]
        assert run.tpot_ms == pytest.approx(value, abs=5e-4)
        assert raw["device"] == h200.ceilings.name
        assert raw["mesh"] == ("one device" if run.tp == 1 else f"tp{run.tp}")


def test_the_data_file_is_what_the_calibration_makes_of_the_recordings(capsys):
    assert calibrate_planner.main(["--check"]) == 0
    assert capsys.readouterr().out.count("left out") >= 8


def test_no_cost_is_negative_and_no_share_above_one(h200):
    for costs in h200.costs.values():
        values = dataclasses.asdict(costs)
        assert all(value >= 0 for value in values.values()), values
        assert costs.weight_share <= 1
        assert costs.kv_share <= 1


# ---- arithmetic ----


def test_perfect_costs_give_the_roofline(h200):
    perfect = planner.Costs(0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0)
    for batch in (1, 32, 128):
        floor = decode_floor(LLAMA, batch, 1024)
        assert planner.tpot_s(LLAMA, h200, MeshConfig(), batch, 1024, perfect) == pytest.approx(floor.step_s)
        floor = decode_floor(MOE, batch, 1024)
        assert planner.tpot_s(MOE, h200, MeshConfig(), batch, 1024, perfect) == pytest.approx(floor.step_s)


def test_memory_of_a_device_is_what_is_counted_by_hand():
    layer = 4096 * 128 * (32 + 8 + 8 + 32) + 3 * 4096 * 14336
    ends = 2 * 4096 * 128256
    config = EngineConfig()
    assert memory_use(LLAMA, MeshConfig(), config).weights_bytes == 2 * (32 * layer + ends)
    assert memory_use(LLAMA, MeshConfig(tensor=4), config).weights_bytes == (32 * layer + ends) / 2
    assert memory_use(LLAMA, MeshConfig(pipe=2), config).weights_bytes == 2 * (16 * layer + ends / 2)
    assert memory_use(LLAMA, MeshConfig(), config).kv_token_bytes == 131_072
    assert memory_use(LLAMA, MeshConfig(tensor=8), config).kv_token_bytes == 16_384
    assert memory_use(LLAMA, MeshConfig(tensor=16), config).kv_token_bytes == 16_384, "kv heads are repeated"
    assert memory_use(LLAMA, MeshConfig(seq=2, pipe=2), config).kv_token_bytes == 32_768


def test_shards_of_attention_hold_all_but_the_experts_of_which_spare_slots_are_more():
    config, one = EngineConfig(), 48 * 3 * 2048 * 768  # of one expert in all layers
    whole = memory_use(MOE, MeshConfig(), config).weights_bytes
    cut = memory_use(MOE, MeshConfig(expert=4), config)
    shards = memory_use(MOE, MeshConfig(expert=4, attention_data=True), config)
    spare = memory_use(MOE, MeshConfig(expert=4, redundant_experts=8), config)
    assert cut.weights_bytes == pytest.approx(whole / 4)
    assert shards.weights_bytes == pytest.approx(whole - 2 * 128 * one * 3 / 4)
    assert spare.weights_bytes == pytest.approx(cut.weights_bytes + 2 * one * 8 / 4)
    assert shards.kv_token_bytes == 4 * cut.kv_token_bytes, "of a token on the shard that has it"


def test_the_bundled_model_has_the_sizes_of_its_config():
    model = ModelConfig.from_directory(ROOT / "jaxllm" / "models" / "first-light")
    dims = dims_of(model)
    weights = (ROOT / "jaxllm" / "models" / "first-light" / "model.safetensors").stat().st_size
    assert dims.weight_bytes() == pytest.approx(weights, rel=0.01)


def test_more_devices_for_one_replica_are_faster_and_less_efficient(h200):
    costs = h200.costs["auto"]
    times = [planner.tpot_s(BIG, h200, MeshConfig(tensor=tp), 8, 1024, costs) for tp in (2, 4, 8)]
    assert times == sorted(times, reverse=True)
    assert times[0] / times[2] < 4


# ---- ranking ----


def test_a_model_that_fits_one_device_is_replicated_and_goals_choose_the_batch(h200):
    free = rank(LLAMA, h200, goal(), EngineConfig())
    tight = rank(LLAMA, h200, goal(tpot_s=0.012), EngineConfig())
    assert str(free.plans[0].mesh) == "dp8"
    assert all(plan.mesh.size == 8 for plan in free.plans)
    assert tight.plans[0].batch < free.plans[0].batch
    assert tight.plans[0].tokens_per_s < free.plans[0].tokens_per_s


def test_what_does_not_fit_is_refused_with_its_sum(h200):
    found = rank(BIG, h200, goal(gpus=1), EngineConfig())
    assert not found.plans
    (_, why) = found.refused[0]
    assert "needs 136" in why
    assert "126.4 usable" in why


def test_a_split_that_does_not_divide_is_refused_with_its_arithmetic(h200):
    found = rank(LLAMA, h200, goal(gpus=3), EngineConfig())
    whys = {str(mesh): why for mesh, why in found.refused}
    assert "32 = 3 x 10 + 2" in whys["tp3"]
    assert [str(plan.mesh) for plan in found.plans] == ["dp3", "pp3"]


def test_goals_that_nothing_keeps_say_by_how_much(h200):
    found = rank(BIG, h200, goal(tpot_s=0.002, gpus=4), EngineConfig())
    assert not found.plans
    assert any("is over 2 ms" in why for _, why in found.refused)
    slow = rank(BIG, h200, goal(ttft_s=0.01, gpus=4), EngineConfig())
    assert any("TTFT" in why and "is over 10 ms" in why for _, why in slow.refused)


def test_experts_are_split_only_where_there_are_some(h200):
    assert not any(plan.mesh.expert > 1 for plan in rank(LLAMA, h200, goal(), EngineConfig()).plans)
    assert any(plan.mesh.expert > 1 for plan in rank(MOE, h200, goal(), EngineConfig()).plans)


def test_context_parallelism_is_for_long_prompts(h200):
    assert not any(plan.mesh.seq > 1 for plan in rank(LLAMA, h200, goal(), EngineConfig()).plans)
    long = rank(LLAMA, h200, goal(prompt=100_000, gpus=4), EngineConfig())
    assert any(plan.mesh.seq > 1 for plan in long.plans)


# ---- the command ----


@pytest.mark.parametrize(("text", "found"), [("8xH200", (8, "H200")), ("1xh200", (1, "h200"))])
def test_gpus_are_counted_and_named(text, found):
    assert parse_gpus(text) == found


@pytest.mark.parametrize("text", ["8", "H200", "0xH200", "8 H200", "-1xH200"])
def test_what_names_no_gpus_is_refused(text):
    with pytest.raises(ConfigError, match="must be like 8xH200"):
        parse_gpus(text)


def test_times_have_units():
    assert parse_time("--ttft", "500ms") == 0.5
    assert parse_time("--ttft", "0.5s") == 0.5
    with pytest.raises(ConfigError, match="--tpot '20'"):
        parse_time("--tpot", "20")


def run(capsys, *arguments):
    try:
        main(["plan", *arguments])
    except SystemExit as end:
        return end.code, capsys.readouterr()
    raise AssertionError("the command did not end")


def test_the_best_mesh_becomes_a_recipe_that_launch_takes(capsys, tmp_path):
    out = tmp_path / "recipe.toml"
    code, said = run(capsys, "first-light", "--gpus", "2xH200", "-o", str(out))
    assert code == 0
    assert f"wrote {out}: dp2" in said.out
    config = load(out)
    assert (config.mesh.data, config.model.path) == (2, "first-light")
    with pytest.raises(SystemExit):
        main(["launch", "--dry-run", "-c", str(out)])
    assert "replica 1" in capsys.readouterr().out


def test_errors_are_shown_beside_every_recorded_run(capsys, h200):
    code, said = run(capsys, "llama-3.1-8b", "--gpus", "8xH200", "--ttft", "500ms", "--tpot", "20ms", "--errors")
    assert code == 0
    assert said.out.count("context 1024") == len(h200.runs)
    assert "off by at most" in said.out


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["llama-3.1-8b", "--gpus", "8xA100"], 2, "there is data for H200"),
        (["no-such-model"], 2, "Known shapes: llama-3.1-8b"),
        (["first-light", "--prompt", "4k"], 2, "the model's context is 2048"),
        (["llama-3.3-70b", "--gpus", "1xH200"], 1, ""),
        (["llama-3.1-8b", "--costs", "wishes"], 2, "must be one of auto"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(capsys, arguments, code, told):
    found, said = run(capsys, *arguments)
    assert found == code
    assert told in said.err
    assert len(said.err.splitlines()) <= 1


def test_planning_imports_no_jax():
    script = "import sys; sys.modules['jax'] = None\nfrom serve.cli import main\nmain(['plan', 'first-light'])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
