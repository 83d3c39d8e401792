"""Fit the planner's costs to recorded runs, and write the device's data file with those runs and their errors.

    python -m tools.calibrate_planner [--check]

In: benchmarks/results/*_h200/llm-*.json (benchmarks/llm.py made them) and the figures below, which were measured on
the same kind of card before this repository had an engine. Out: jaxllm/tools/devices/nvidia-h200.json and a table of
errors, each run's also when it is left out of the fit. --check writes nothing and fails when the file would change.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.tools.planner import Costs, Run, decode_terms
from pallas_kernels.roofline import H200, MODELS, prefill_floor
from sharding.axes import MeshConfig

ROOT = Path(__file__).parent.parent
OUT = ROOT / "jaxllm" / "tools" / "devices" / "nvidia-h200.json"
REDUCE_S = 25e-6
LINKS = {
    "all_reduce_s": REDUCE_S,
    "bytes_per_s": 450e9,
    "source": "a captured NCCL all-reduce of 16 KiB between 2 or 4 H200s, about 25 us each in a decode step (stock JAX "
    "0.11.2, 2026-11-20); bandwidth is the datasheet's, one direction. benchmarks/links.py measures both",
}
STOCK = "stock JAX 0.11.2 step without an engine, one H200 or two, 2026-11-20"
STOCK_RUNS = (  # (batch, context, tp, ms)
    (1, 1024, 1, 4.38),
    (64, 1024, 1, 11.3),
    (256, 1024, 1, 40.7),
    (1, 1024, 2, 3.96),
    (32, 1024, 2, 5.41),
)


def recorded() -> tuple[list[Run], list[Run]]:
    """(decode steps, prefills) of benchmarks/llm.py's result files; the newest file of a shape and kernels wins."""
    runs: dict[Any, Run] = {}
    prefills: dict[Any, Run] = {}
    for path in sorted(ROOT.glob("benchmarks/results/*_h200/llm-*.json")):
        raw = json.loads(path.read_text())
        if "rows" not in raw or raw.get("shape") not in MODELS:
            continue
        tp = int(raw.get("tensor", 1))
        for row in raw["rows"]:
            common = {"costs": raw["kernels"], "model": raw["shape"], "tp": tp, "source": str(path.relative_to(ROOT))}
            if row["what"] == "decode":
                run = Run(batch=row["batch"], context=row["ctx"], tpot_ms=row["step_ms"], **common)
                runs[run.costs, run.model, run.batch, run.context, tp] = run
            elif row["what"] == "prefill":
                run = Run(batch=1, context=row["tokens"], tpot_ms=row["ttft_ms"], **common)
                prefills[run.costs, run.model, run.context, tp] = run
    stock = [Run("stock", "llama-3.1-8b", batch, context, ms, tp, STOCK) for batch, context, tp, ms in STOCK_RUNS]
    return [*runs.values(), *stock], list(prefills.values())


def columns(run: Run) -> tuple[np.ndarray, float]:
    """What each cost multiplies, and what no cost does."""
    terms = decode_terms(MODELS[run.model], run.batch, run.context, H200, MeshConfig(tensor=run.tp))
    return np.array(
        [1.0, terms.layers, terms.rows, terms.weights_s, terms.kv_s]
    ), terms.reduces * REDUCE_S + terms.moved_s


def fit(runs: list[Run]) -> np.ndarray:
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


def predicted_ms(run: Run, found: np.ndarray) -> float:
    row, fixed = columns(run)
    return float(row @ found + fixed) * 1e3


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
    for name in dict.fromkeys(run.costs for run in runs):
        mine = [run for run in runs if run.costs == name]
        found = fit(mine)
        host, share = fit_prefill([run for run in prefills if run.costs == name])
        shares = [round(1 / float(value), 4) for value in found[3:]]
        own = [round(float(value), 9) for value in found[:3]]
        costs[name] = Costs(
            host_s=own[0],
            layer_s=own[1],
            row_s=own[2],
            weight_share=shares[0],
            kv_share=shares[1],
            prefill_host_s=round(host, 6),
            prefill_share=round(share, 4),
        )
        for run in mine:
            left_out = fit([other for other in mine if other is not run])
            error, other = (predicted_ms(run, f) / run.tpot_ms - 1 for f in (found, left_out))
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
