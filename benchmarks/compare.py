"""Ours, vLLM and transformers on one machine, in turn, in one process tree: one JSON and one Markdown table.

    python benchmarks/compare.py MODEL_DIRECTORY --peer .peer --batch 1,8,32 --rounds 2 --out results/compare

Each round runs every engine once, each alone on the GPU in a process of its own, in the given order and then in the
reverse one, so that a card that warms up favours nobody; a figure is the median over all rounds and repeats. The model
directory needs config.json and a tokenizer; weights are random on all sides. `--peer` is a folder with the peers'
scripts (`setup.sh`, `peer_vllm.py`, `peer_hf.py`) that print one "PEER {json}" line a figure. Start is the wall clock
from starting a process: ours to its first token, vLLM's only to a loaded engine. Compile caches are empty in the first
round and kept after it. `transformers` is its static cache and torch.compile, `generate` its plain call.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.tools.figures import RATE, Figure, as_json, comparison, from_json, machine, median_figure

ROOT = Path(__file__).parent.parent
PEER_LINE = "PEER "
START = "process start to first token (vLLM: to ready)"


@dataclass(frozen=True)
class Run:
    """What one process measured; `error` says why it ended early."""

    engine: str
    seconds: float
    figures: list[Figure]
    error: str = ""


@dataclass(frozen=True)
class Plan:
    """What to measure, for whichever engine."""

    model: Path
    peer: Path
    batches: str
    context: int
    prefills: str
    repeats: int
    hf_batches: str
    requests: int
    settings: tuple[str, ...]
    limit_s: float  # of one process


def lines_of(command: list[str], limit_s: float, log: Path, cwd: Path = ROOT) -> Generator[tuple[float, str]]:
    """(seconds since the start, line) of a child's stdout as they come, until it ends; its stderr goes to `log`."""
    with log.open("ab") as errors:
        start = time.perf_counter()
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=cwd, start_new_session=True
        )
        timer = threading.Timer(limit_s, os.killpg, (child.pid, signal.SIGKILL))
        timer.start()
        assert child.stdout is not None
        try:
            for line in child.stdout:
                yield time.perf_counter() - start, line.rstrip("\n")
        finally:
            timer.cancel()
            if child.poll() is None:  # the reader had enough
                os.killpg(child.pid, signal.SIGKILL)
            child.stdout.close()
            if child.wait() not in (0, -signal.SIGKILL):
                errors.write(f"\n{shlex.join(command)}: exit {child.returncode}\n".encode())


# ---- engines ----


def run_jaxllm(plan: Plan, log: Path) -> Run:
    settings = [word for setting in plan.settings for word in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, "-W", "ignore", "-m", "serve.cli", "bench", "latency", str(plan.model)]
        command += ["--batch", plan.batches, "--context", str(plan.context), "--prefill", plan.prefills]
        command += ["--repeats", str(plan.repeats), "--requests", str(plan.requests), "--out", str(out), *settings]
        start = time.perf_counter()
        for _ in lines_of(command, plan.limit_s, log):
            pass
        seconds = time.perf_counter() - start
        if not out.exists():
            return Run("jaxllm", seconds, [], f"no figures; see {log.name}")
        document = json.loads(out.read_text())
    phases = {f"{name}, s": seconds for name, seconds in document["start_phases_s"].items()}
    ready = median_figure(START, "", "s", [document["first_token_s"]], notes=phases)
    return Run("jaxllm", seconds, [*map(from_json, document["figures"]), ready])


def run_vllm(plan: Plan, log: Path) -> Run:
    script = [str(plan.peer / "peer_vllm.py"), str(plan.model), "--batch", plan.batches, "--ctx", str(plan.context)]
    script += ["--prefill", plan.prefills, "--reps", str(plan.repeats), "--throughput", str(int(plan.requests > 0))]
    return _run_peer("vllm", plan, script, log)


def run_transformers(plan: Plan, log: Path) -> Run:
    script = [str(plan.peer / "peer_hf.py"), str(plan.model), "--batch", plan.hf_batches, "--ctx", str(plan.context)]
    # Its continuous batching is no peer's best: the run ends with the last decode figure.
    return _run_peer("transformers", plan, script, log, last=plan.hf_batches.count(",") + 1)


def run_generate(plan: Plan, log: Path) -> Run:
    script = [str(ROOT / "benchmarks" / "peer_generate.py"), str(plan.model), "--batch", plan.hf_batches]
    return _run_peer("generate", plan, [*script, "--ctx", str(plan.context)], log)


def _run_peer(engine: str, plan: Plan, script: list[str], log: Path, last: int | None = None) -> Run:
    setup = (
        f". {shlex.quote(str(plan.peer / 'setup.sh'))} {shlex.quote(str(plan.peer))} && " if engine == "vllm" else ""
    )
    command = ["bash", "-c", f"{setup}exec python3 -P {shlex.join(script)}"]
    start, figures, errors = time.perf_counter(), list[Figure](), []
    lines = lines_of(command, plan.limit_s, log, cwd=plan.peer)  # not ours: our packages' names are generic
    for elapsed, line in lines:
        if not line.startswith(PEER_LINE):
            continue
        raw = json.loads(line.removeprefix(PEER_LINE))
        if "error" in raw:
            errors.append(raw["error"])
        elif (figure := peer_figure(raw, elapsed)) is not None:
            figures.append(figure)
        if last is not None and len(figures) + len(errors) >= last:
            break
    lines.close()
    return Run(engine, time.perf_counter() - start, figures, "; ".join(errors))


def peer_figure(raw: dict[str, Any], elapsed: float) -> Figure | None:
    """A peer's line as a Figure under our names."""
    match raw["what"]:
        case "decode":
            steps = raw.get("all_ms") or [raw["step_ms"]]
            return median_figure("decode step", f"batch {raw['batch']}, context {raw['ctx']}", "ms", steps)
        case "prefill":
            return median_figure("prefill, one prompt", f"{raw['tokens']} tokens", "ms", [raw["ttft_ms"]])
        case "throughput":
            at = f"{raw['requests']} requests, 100..1024 in and out, {raw['out_tokens']} out"
            return median_figure("throughput", at, RATE, [raw["out_tokens"] / raw["s"]])
        case "startup":
            return median_figure(START, "", "s", [elapsed])
    return None


ENGINES: dict[str, Callable[[Plan, Path], Run]] = {
    "jaxllm": run_jaxllm,
    "vllm": run_vllm,
    "transformers": run_transformers,
    "generate": run_generate,
}


# ---- together ----


def merged(runs: list[Run]) -> dict[str, list[Figure]]:
    """Each engine's figures over all its runs: medians of all repeats."""
    found: dict[str, dict[tuple[str, str], list[Figure]]] = {}
    for run in runs:
        for figure in run.figures:
            found.setdefault(run.engine, {}).setdefault((figure.what, figure.at), []).append(figure)
    return {engine: [_merge(same) for same in places.values()] for engine, places in found.items()}


def at_its_turn(run: Run, again: bool) -> Run:
    """The run with its start told apart: an engine's first one finds empty caches, later ones those it left."""
    caches = "caches of a run before" if again else "empty caches"
    told = [dataclasses.replace(figure, at=caches) if figure.what == START else figure for figure in run.figures]
    return dataclasses.replace(run, figures=told)


def _merge(same: list[Figure]) -> Figure:
    repeats = [value for figure in same for value in figure.repeats]
    last = same[-1]
    return median_figure(last.what, last.at, last.unit, repeats, floor=last.floor, notes=last.notes)


def gpu_state() -> str:
    """What nvidia-smi says of the card, or nothing."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"]
    try:
        ran = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return ran.stdout.strip()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--engines", default="jaxllm,vllm,transformers")
    parser.add_argument("--peer", type=Path, default=Path(".peer"))
    parser.add_argument("--batch", default="1,8,32,128,256")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefill", default="1024,8192")
    parser.add_argument("--requests", type=int, default=256, help="of the throughput workload; 0 = leave it out")
    parser.add_argument("--hf-batch", default="1,32", help="transformers: static cache and torch.compile")
    parser.add_argument("--repeats", type=int, default=1, help="in each process")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--once", default="transformers", help="engines that run in the first round only")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no process after so many")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds one process may take")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="NAME=VALUE", help="ours only")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.json, OUT.md and OUT.log")
    return parser.parse_args()


def order(engines: list[str], rounds: int, once: list[str]) -> list[str]:
    """Every engine once a round, the rounds alternately forward and backward; those of `once` in the first one only."""
    turns = [name for turn in range(rounds) for name in (engines if turn % 2 == 0 else engines[::-1])]
    return [name for place, name in enumerate(turns) if name not in once or name not in turns[:place]]


def report(options: argparse.Namespace, runs: list[Run], states: list[str], started: float) -> None:
    """Written after every run, so that an interrupted comparison keeps what it had."""
    engines = merged(runs)
    about = {
        **machine(states[0].split(",")[0] if states[0] else ""),
        "commit": options.commit,
        "command": shlex.join(["python", *sys.argv]),
        "gpu": states,
        "seconds": round(time.perf_counter() - started, 1),
        "runs": [{"engine": run.engine, "seconds": round(run.seconds, 1), "error": run.error} for run in runs],
    }
    document = {**about, "engines": {name: [as_json(f) for f in figures] for name, figures in engines.items()}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    if engines:
        options.out.with_suffix(".md").write_text(comparison(engines) + "\n")


def main() -> None:
    options = arguments()
    names = [name for name in options.engines.split(",") if name]
    unknown = set(names) - ENGINES.keys()
    if unknown:
        raise SystemExit(f"--engines: unknown {', '.join(sorted(unknown))}; there are {', '.join(ENGINES)}")
    plan = Plan(
        model=options.model.resolve(),
        peer=options.peer.resolve(),
        batches=options.batch,
        context=options.context,
        prefills=options.prefill,
        repeats=options.repeats,
        hf_batches=options.hf_batch,
        requests=options.requests,
        settings=tuple(options.settings),
        limit_s=options.limit,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        compare(options, names, dataclasses.replace(plan, settings=(f"cache_dir={json.dumps(cache)}", *plan.settings)))


def compare(options: argparse.Namespace, names: list[str], plan: Plan) -> None:
    started, runs, states = time.perf_counter(), list[Run](), [gpu_state()]
    for name in order(names, options.rounds, options.once.split(",")):
        if time.perf_counter() - started > options.seconds:
            print(f"{name}: not started, the time is up", flush=True)
            continue
        again = any(run.engine == name for run in runs)
        runs.append(at_its_turn(ENGINES[name](plan, options.out.with_suffix(".log")), again))
        states.append(gpu_state())
        report(options, runs, states, started)
        print(f"{name}: {runs[-1].seconds:.0f} s, {len(runs[-1].figures)} figures {runs[-1].error}", flush=True)
    print(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
