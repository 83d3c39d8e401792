"""Fit the planner's costs to recorded runs, and write the device's data file with those runs and their errors.

    python -m tools.calibrate_planner [--check]

In: what `jaxllm bench latency` wrote under benchmarks/results (RECORDINGS), and the figures below, which were measured
on the same kind of card before this repository had an engine. Out: jaxllm/tools/devices/nvidia-h200.json and a table of
errors, each run's also when it is left out of the fit. --check writes nothing and fails when the file would change.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxllm.tools.planner import SHARED, Costs, Run, decode_terms
from pallas_kernels.roofline import H200, MODELS, prefill_floor
from sharding.axes import MeshConfig

ROOT = Path(__file__).parent.parent
OUT = ROOT / "jaxllm" / "tools" / "devices" / "nvidia-h200.json"
RECORDINGS = (  # (file, model)
    ("launched_layers_h200/run5_llama-3.1-8b_latency.json", "llama-3.1-8b"),
    ("launched_layers_h200/run5_qwen3-0.6b_latency.json", "qwen3-0.6b"),
    ("meshes_h200/tp2_5345d4b.json", "llama-3.1-8b"),
    ("meshes_h200/tp4_5345d4b.json", "llama-3.1-8b"),
)
REDUCE_S = {"auto": 4e-6, "stock": 25e-6}
LINKS = {
    "all_reduce_s": REDUCE_S["auto"],
    "bytes_per_s": 450e9,
    "source": "our all-reduce of 8 KiB between 2 or 4 H200s, 3.7 and 4.3 us (benchmarks/results/tensor_parallel_h200, "
    "2026-11-21; NCCL in a stock decode step about 25); bandwidth is the datasheet's, one direction. "
    "benchmarks/links.py measures both",
}
STOCK = "stock JAX 0.11.2 step without an engine, one H200 or two, 2026-11-20"
STOCK_RUNS = (  # (batch, context, tp, ms)
    (1, 1024, 1, 4.38),
    (64, 1024, 1, 11.3),
    (256, 1024, 1, 40.7),
    (1, 1024, 2, 3.96),
    (32, 1024, 2, 5.41),
)


def costs_name(run: Run) -> str:
    """Layers of ours that devices share are other kernels."""
    return run.costs + SHARED * (run.tp > 1 and run.costs == "auto")


def readings(path: Path, model: str) -> Iterator[tuple[str, Run]]:
    """("decode" or "prefill", run) of one recording; a prompt's length is its context."""
    source, raw = str(path.relative_to(ROOT)), json.loads(path.read_text())
    tp = int(raw["mesh"].removeprefix("tp")) if raw["mesh"].startswith("tp") else 1
    for row in raw["figures"]:
        numbers, value = [int(number) for number in re.findall(r"\d+", row["at"])], round(row["value"], 3)
        if row["what"] == "decode step":
            batch, context = numbers
            yield "decode", Run("auto", model, batch, context, value, tp, source)
        elif row["what"].startswith("prefill") and tp == 1:
            yield "prefill", Run("auto", model, 1, numbers[0], value, source=source)


def recorded() -> tuple[list[Run], list[Run]]:
    """(decode steps, prefills)."""
    found: dict[str, list[Run]] = {"decode": [], "prefill": []}
    for name, model in RECORDINGS:
        for what, run in readings(ROOT / "benchmarks" / "results" / name, model):
            found[what].append(run)
    stock = [Run("stock", "llama-3.1-8b", batch, context, ms, tp, STOCK) for batch, context, tp, ms in STOCK_RUNS]
    return [*found["decode"], *stock], found["prefill"]


def columns(run: Run) -> tuple[np.ndarray, float]:
    """What each cost multiplies, and what no cost does."""
    terms = decode_terms(MODELS[run.model], run.batch, run.context, H200, MeshConfig(tensor=run.tp))
    return np.array([1.0, terms.layers, terms.rows, terms.weights_s, terms.kv_s]), terms.reduces * REDUCE_S[
        run.costs
    ] + terms.moved_s


def fit(runs: list[Run]) -> tuple[float, np.ndarray]:
    """(the least a step takes, the costs): of every run's time as the least, the one that leaves the smallest error.

    Runs that are no longer than the least say nothing of the device.
    """
    best, best_error = (0.0, fit_costs(runs)), np.inf
    for least in (0.0, *(run.tpot_ms / 1e3 for run in runs)):
        longer = [run for run in runs if run.tpot_ms / 1e3 > least * 1.05]
        if len(longer) < 5:
            continue
        found = least, fit_costs(longer)
        error = sum((predicted_ms(run, *found) / run.tpot_ms - 1) ** 2 for run in runs)
        if error < best_error - 1e-9:
            best, best_error = found, error
    return best


def fit_costs(runs: list[Run]) -> np.ndarray:
    """Least squares of relative errors, no cost below nothing and no share above one: every subset of free costs."""
    rows, fixed = zip(*(columns(run) for run in runs))
    seconds = np.array([run.tpot_ms for run in runs]) / 1e3
    least = np.array([0.0, 0.0, 0.0, 1.0, 1.0])  # a share is at most one
    target = (seconds - np.array(fixed) - np.array(rows) @ least) / seconds
    matrix = np.array(rows) / seconds[:, None]
    best, best_error = np.zeros(5), float(target @ target)
    for size in range(1, 6):
        for free in itertools.combinations(range(5), size):
            found = np.linalg.lstsq(matrix[:, free], target, rcond=1e-9)[0]
            error = float(((matrix[:, free] @ found - target) ** 2).sum())
            if (found >= 0).all() and error < best_error - 1e-9:
                best, best_error = np.zeros(5), error
                best[list(free)] = found
    return best + least


def predicted_ms(run: Run, least: float, found: np.ndarray) -> float:
    row, fixed = columns(run)
    return max(least, float(row @ found + fixed)) * 1e3


def fit_prefill(runs: list[Run]) -> tuple[float, float]:
    """(host seconds, share of the peak) from two or more prompts; one prompt gives a share alone."""
    if not runs:
        return 0.0, 0.5
    floors = np.array([prefill_floor(MODELS[run.model], run.context).step_s for run in runs])
    seconds = np.array([run.tpot_ms for run in runs]) / 1e3
    matrix = np.stack([np.ones(len(runs)), floors], axis=1) / seconds[:, None]
    host, slope = np.linalg.lstsq(matrix, np.ones(len(runs)), rcond=None)[0] if len(runs) > 1 else (0.0, 0.0)
    if host < 0 or slope < 1:
        host, slope = 0.0, max(1.0, float(np.mean(seconds / floors)))
    return float(host), 1 / float(slope)


def main(arguments: list[str]) -> int:
    runs, prefills = recorded()
    costs: dict[str, Costs] = {}
    for name in dict.fromkeys(costs_name(run) for run in runs):
        mine, kind = [run for run in runs if costs_name(run) == name], name.removesuffix(SHARED)
        least, found = fit(mine)
        host, share = fit_prefill([run for run in prefills if run.costs == kind])
        shares = [round(1 / float(value), 4) for value in found[3:]]
        own = [round(float(value), 9) for value in found[:3]]
        costs[name] = Costs(
            least_s=round(least, 6),
            host_s=own[0],
            layer_s=own[1],
            row_s=own[2],
            weight_share=shares[0],
            kv_share=shares[1],
            prefill_host_s=round(host, 6),
            prefill_share=round(share, 4),
            reduce_s=REDUCE_S[kind],
        )
        for run in mine:
            left_out = fit([other for other in mine if other is not run])
            error, other = (predicted_ms(run, *f) / run.tpot_ms - 1 for f in ((least, found), left_out))
            label = f"{name} {run.model} tp{run.tp} batch {run.batch} context {run.context}"
            print(f"{label:48s} {run.tpot_ms:7.2f} ms  error {error:+6.1%}  left out {other:+6.1%}")
    ceilings = {f.name: getattr(H200, f.name) for f in dataclasses.fields(H200) if not f.name.startswith("link_")}
    data = {
        "command": "python -m tools.calibrate_planner",
        "ceilings": ceilings,
        "links": LINKS,
        "costs": {name: dataclasses.asdict(value) for name, value in costs.items()},
        "runs": [dataclasses.asdict(run) for run in runs],
        "prefills": [dataclasses.asdict(run) for run in prefills],
    }
    text = json.dumps(data, indent=1) + "\n"
    if "--check" in arguments:
        return int(not OUT.exists() or OUT.read_text() != text)
    OUT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
