"""Our server and vLLM's under one client, in turn, on one machine, beside our own offline rate: one JSON, one table.

    python benchmarks/compare_serve.py MODEL_DIRECTORY --peer .peer --concurrency 64,256 --out results/compare_serve

The client is vLLM's `vllm bench serve`: closed loop, random prompts of --input tokens, --output tokens each, greedy,
end tokens ignored, the same prompts for both servers. `--client jaxllm` takes ours, which has the same names for the
same numbers, where vLLM is not installed. Each server runs alone in a process group of its own, with random weights and
no prefix cache, and has ended, its memory with it, before the next begins. Offline is `LLM.generate`, as many requests
at once as the concurrency, without a server. The model directory needs a tokenizer: prompts travel as text.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from jaxllm.tools.figures import machine  # noqa: E402

NAME = "m"  # of the served model
SHOWN = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "median_itl_ms", "p99_itl_ms")
OFFLINE = "OFFLINE "
READY = {"jaxllm": "/ready", "vllm": "/health"}  # 200 once requests are answered
FREE_MIB = 4096  # a device that holds less has been given back


@dataclass(frozen=True)
class Plan:
    model: Path
    peer: Path
    client: str  # vllm or jaxllm
    concurrency: tuple[int, ...]
    waves: int  # requests = waves x concurrency
    input_len: int
    output_len: int
    max_model_len: int
    settings: tuple[tuple[str, str], ...]  # of our engine, with a server and without, by the names of its flags
    limit_s: float  # of one server's start, and of one client
    folder: Path  # logs, and the client's own JSON


# ---- commands ----


def in_peers_site(plan: Plan, words: list[str]) -> list[str]:
    """A vLLM command where setup.sh has unpacked vLLM."""
    setup = f". {shlex.quote(str(plan.peer / 'setup.sh'))} {shlex.quote(str(plan.peer))}"
    return ["bash", "-c", f"{setup} && exec python3 -m vllm.entrypoints.cli.main {shlex.join(words)}"]


def server_command(engine: str, plan: Plan, port: int) -> list[str]:
    flags = ["serve", str(plan.model), "--served-model-name", NAME, "--load-format", "dummy", "--port", str(port)]
    flags += ["--max-model-len", str(plan.max_model_len), "--max-num-seqs", str(max(plan.concurrency))]
    flags += ["--no-enable-prefix-caching"]
    if engine == "vllm":
        return in_peers_site(plan, [*flags, "--gpu-memory-utilization", "0.9"])
    further = [word for name, value in plan.settings for word in (f"--{name.replace('_', '-')}", value)]
    return [sys.executable, "-W", "ignore", "-m", "serve.cli", *flags, *further]


def client_command(plan: Plan, url: str, concurrency: int, result: Path) -> list[str]:
    words = ["bench", "serve", "--base-url", url, "--model", NAME, "--dataset-name", "random"]
    words += ["--random-input-len", str(plan.input_len), "--random-output-len", str(plan.output_len), "--ignore-eos"]
    words += ["--temperature", "0", "--num-prompts", str(plan.waves * concurrency), "--seed", "0"]
    words += ["--max-concurrency", str(concurrency), "--metric-percentiles", "50,90,99"]
    if plan.client == "jaxllm":
        return [sys.executable, "-m", "serve.cli", *words, "--result-filename", str(result)]
    words += ["--backend", "openai", "--endpoint", "/v1/completions", "--tokenizer", str(plan.model)]
    words += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--save-result"]
    words += ["--result-dir", str(result.parent), "--result-filename", result.name]
    return in_peers_site(plan, words)


# ---- processes ----


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def end(process: subprocess.Popen[bytes]) -> None:
    """The whole group: first asked, then made to."""
    for number, patience in ((signal.SIGTERM, 30.0), (signal.SIGKILL, 30.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what outlived its parent holds the device


@contextlib.contextmanager
def running(engine: str, plan: Plan) -> Iterator[tuple[str, float]]:
    """(address, seconds to ready) of a server that ends with the context; RuntimeError if it does not start."""
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", plan.folder / f"{engine}.log"
    cwd = plan.peer if engine == "vllm" else ROOT  # not ours for vLLM: our packages' names are generic
    began = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(
            server_command(engine, plan, port), stdout=out, stderr=out, cwd=cwd, start_new_session=True
        )
        try:
            while not answers(url + READY[engine]):
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended with code {process.returncode}; see {log.name}")
                if time.perf_counter() - began > plan.limit_s:
                    raise RuntimeError(f"the server was not ready within {plan.limit_s:g} s; see {log.name}")
                time.sleep(0.2)
            yield url, time.perf_counter() - began
        finally:
            end(process)
            await_memory()


def used_mib() -> float | None:
    """Of the first device; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None


def await_memory(patience_s: float = 30.0) -> None:
    """The next server measures what is free."""
    deadline = time.monotonic() + patience_s
    while (used := used_mib()) is not None and used > FREE_MIB and time.monotonic() < deadline:
        time.sleep(0.5)


def measure(plan: Plan, engine: str, url: str, concurrency: int) -> dict[str, Any]:
    """What the client wrote, or why it did not."""
    result, log = plan.folder / f"{engine}-{concurrency}.json", plan.folder / "client.log"
    result.unlink(missing_ok=True)
    cwd = plan.peer if plan.client == "vllm" else ROOT
    with log.open("ab") as out:
        process = subprocess.Popen(
            client_command(plan, url, concurrency, result), stdout=out, stderr=out, cwd=cwd, start_new_session=True
        )
        try:
            code = process.wait(plan.limit_s)
        except subprocess.TimeoutExpired:
            return {"error": f"the client took more than {plan.limit_s:g} s"}
        finally:
            end(process)
    try:
        return read_result(json.loads(result.read_text()), plan, concurrency)
    except (OSError, ValueError) as error:
        return {"error": f"the client ended with code {code}; see {log.name} ({type(error).__name__})"}


def read_result(raw: dict[str, Any], plan: Plan, concurrency: int) -> dict[str, Any]:
    """The figures; a run that did less than it was asked is an error, whatever its rate."""
    asked = plan.waves * concurrency
    found = {name: raw.get(name) for name in ("completed", "duration", "total_input_tokens", "total_output_tokens")}
    if raw.get("completed") != asked:
        return {**found, "error": f"{raw.get('completed')} of {asked} requests were answered"}
    if raw.get("total_output_tokens") != asked * plan.output_len:
        return {**found, "error": f"{raw.get('total_output_tokens')} tokens instead of {asked * plan.output_len}"}
    figures = {name: raw.get(name) for name in SHOWN}
    missing = [name for name, value in figures.items() if not isinstance(value, int | float)]
    return {**found, **figures} | ({"error": f"no {', '.join(missing)}"} if missing else {})


# ---- without a server ----


def offline_main(model: str, concurrency: str, input_len: str, output_len: str, *settings: str) -> None:
    """One line a concurrency, after a short round that nobody times."""
    import random

    from jaxllm.core import SamplingParams
    from jaxllm.llm import LLM

    given: dict[str, Any] = dict(one.split("=", 1) for one in settings)
    llm, source = LLM(model, **{name: json.loads(value) for name, value in given.items()}), random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=int(output_len), ignore_eos=True, detokenize=False)
    llm.generate([[10] * 16], params.replace(max_tokens=8), use_tqdm=False)
    for count in map(int, concurrency.split(",")):
        prompts = [[source.randrange(10, 8000) for _ in range(int(input_len))] for _ in range(count)]
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        tokens = sum(len(one.outputs[0].token_ids) for one in outputs)
        print(OFFLINE + json.dumps({"concurrency": count, "tokens": tokens, "seconds": seconds}), flush=True)


def offline(plan: Plan) -> dict[int, dict[str, Any]]:
    settings = {"load_format": "dummy", "max_model_len": plan.max_model_len, "max_num_seqs": max(plan.concurrency)}
    words = [f"{name}={json.dumps(value)}" for name, value in (settings | {"prefix_cache": False}).items()]
    words += [f"{name}={value}" for name, value in plan.settings]
    levels = ",".join(map(str, plan.concurrency))
    command = [sys.executable, "-W", "ignore", __file__, "offline", str(plan.model), levels]
    command += [str(plan.input_len), str(plan.output_len), *words]
    with (plan.folder / "offline.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, start_new_session=True
        )
        try:
            said, _ = process.communicate(timeout=plan.limit_s)
        except subprocess.TimeoutExpired:
            said = ""
        finally:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
            process.communicate()
    return read_offline(said, plan)


def read_offline(said: str, plan: Plan) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for line in said.splitlines():
        if line.startswith(OFFLINE):
            raw = json.loads(line.removeprefix(OFFLINE))
            rate = raw["tokens"] / raw["seconds"]
            whole = raw["tokens"] == raw["concurrency"] * plan.output_len
            found[raw["concurrency"]] = {"output_throughput": rate} if whole else {"error": f"{raw['tokens']} tokens"}
    return {each: found.get(each, {"error": "no figure; see offline.log"}) for each in plan.concurrency}


# ---- together ----

Results = dict[str, dict[int, dict[str, Any]]]  # by engine, by concurrency


def verdicts(results: Results, concurrency: int) -> list[tuple[str, str, bool | None]]:
    """(bar, what was found, whether it was met) of issue 5, line 4; None where a figure is missing."""

    def of(engine: str, name: str) -> float | None:
        return results.get(engine, {}).get(concurrency, {}).get(name)

    ours, theirs = ({name: of(engine, name) for name in SHOWN} for engine in ("jaxllm", "vllm"))
    alone = of("offline", "output_throughput")
    rows: list[tuple[str, float | None, float | None, float, bool]] = [
        ("output tokens/s over our offline rate, at least 0.97", ours["output_throughput"], alone, 0.97, True),
        (
            "output tokens/s over vLLM's, at least 1.2",
            ours["output_throughput"],
            theirs["output_throughput"],
            1.2,
            True,
        ),
        ("median TTFT over vLLM's, at most 1", ours["median_ttft_ms"], theirs["median_ttft_ms"], 1.0, False),
        ("p99 ITL over vLLM's, at most 1", ours["p99_itl_ms"], theirs["p99_itl_ms"], 1.0, False),
    ]
    found = []
    for bar, mine, other, limit, above in rows:
        if mine is None or not other:
            found.append((bar, "not measured", None))
        else:
            share = mine / other
            found.append((bar, f"{share:.3f}", share >= limit if above else share <= limit))
    return found


def table(plan: Plan, results: Results) -> str:
    lines = ["| concurrency | engine | " + " | ".join(SHOWN) + " |", "|" + "---|" * (len(SHOWN) + 2)]
    for concurrency in plan.concurrency:
        for engine, found in results.items():
            figures = found.get(concurrency, {})
            cells = [f"{figures[name]:,.2f}" if figures.get(name) is not None else "" for name in SHOWN]
            told = f"{engine}: {figures['error']}" if "error" in figures else engine
            lines.append(f"| {concurrency} | {told} | " + " | ".join(cells) + " |")
    lines += ["", "| concurrency | bar | found | met |", "|---|---|---|---|"]
    for concurrency in plan.concurrency:
        for bar, share, met in verdicts(results, concurrency):
            lines.append(f"| {concurrency} | {bar} | {share} | {'' if met is None else 'yes' if met else '**no**'} |")
    return "\n".join(lines) + "\n"


def write(plan: Plan, out: Path, results: Results, starts: dict[str, float], commit: str) -> None:
    """After every step, so that an interrupted comparison keeps what it had."""
    about = {
        **machine(),
        "commit": commit,
        "command": shlex.join(["python", *sys.argv]),
        "client": plan.client,
        "ready_s": {name: round(seconds, 1) for name, seconds in starts.items()},
    }
    raw = {name: {str(level): figures for level, figures in found.items()} for name, found in results.items()}
    out.with_suffix(".json").write_text(json.dumps({**about, "results": raw}, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(plan, results))


def compare(plan: Plan, engines: list[str], out: Path, commit: str) -> Results:
    results: Results = {}
    starts: dict[str, float] = {}
    for engine in engines:
        if engine == "offline":
            results[engine] = offline(plan)
        else:
            found = results[engine] = {}
            try:
                with running(engine, plan) as (url, seconds):
                    starts[engine] = seconds
                    for concurrency in plan.concurrency:
                        found[concurrency] = measure(plan, engine, url, concurrency)
                        write(plan, out, results, starts, commit)
            except RuntimeError as error:
                found |= {each: {"error": str(error)} for each in plan.concurrency if each not in found}
        write(plan, out, results, starts, commit)
        print(f"{engine}: {json.dumps(results[engine])}", flush=True)
    return results


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--engines", default="jaxllm,vllm,offline")
    parser.add_argument("--client", default="vllm", choices=("vllm", "jaxllm"))
    parser.add_argument("--peer", type=Path, default=Path(".peer"))
    parser.add_argument("--concurrency", default="64,256")
    parser.add_argument("--waves", type=int, default=2, help="requests a unit of concurrency")
    parser.add_argument("--input", type=int, default=1024)
    parser.add_argument("--output", type=int, default=1024)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--limit", type=float, default=200.0, help="seconds of one start, and of one client")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of our engine; repeatable")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.json, OUT.md and logs beside them")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    names = given.engines.split(",")
    if unknown := set(names) - {"jaxllm", "vllm", "offline"}:
        raise SystemExit(f"--engines: unknown {', '.join(sorted(unknown))}; there are jaxllm, vllm, offline")
    folder = given.out.parent.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        given.model.resolve(),
        given.peer.resolve(),
        given.client,
        tuple(int(each) for each in given.concurrency.split(",")),
        given.waves,
        given.input,
        given.output,
        given.max_model_len,
        tuple((name, value) for name, _, value in (one.partition("=") for one in given.set)),
        given.limit,
        folder,
    )
    compare(plan, names, given.out, given.commit)
    print(given.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    if sys.argv[1:2] == ["offline"]:
        offline_main(*sys.argv[2:])
    else:
        main()
