"""Decode step, prefill and throughput of `LLM` with dummy weights, by the peers' protocol (shared/peers/peer_vllm.py).

    python benchmarks/llm.py llama-3.1-8b --batch 1,8,32 --prefill 1024 --out results.json

Decode step at context C = (t(192 tokens out) - t(64 out)) / 128, so that prefill cancels. Greedy, ignore_eos, random
token ids, prefix cache off. Writes one JSON with machine, commit and command; prints one line a figure.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

START = time.perf_counter()
HIGHEST_ID = 10_000


def arguments() -> argparse.Namespace:
    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help="a name under configs/models")
    parser.add_argument("--batch", type=integers, default=[1, 8, 32])
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--prefill", type=integers, default=[1024])
    parser.add_argument("--throughput", type=int, default=0, help="requests of the 100..1024 in/out workload")
    parser.add_argument("--reps", type=int, default=2)
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--kernels", choices=("auto", "reference"), default="auto")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        from benchmarks.shapes import make_model_directory
        from jaxllm.llm import LLM

        self.options, self.rows = options, []
        self.random = random.Random(0)
        longest = max(options.ctx + 256, *(n + 16 for n in options.prefill), 2100 if options.throughput else 0)
        batches = sorted({*options.batch, *([256] if options.throughput else [])})
        budget = max(options.token_budget, batches[-1])
        with tempfile.TemporaryDirectory() as folder:
            self.llm = LLM(
                str(make_model_directory(options.shape, Path(folder))),
                load_format="dummy",
                max_model_len=longest,
                max_num_seqs=batches[-1],
                decode_buckets=batches,
                max_num_batched_tokens=budget,
                token_buckets=sorted({min(1024, budget), budget}),
                enable_prefix_caching=False,
                kernels=options.kernels,
            )
        self.row("startup", s=round(time.perf_counter() - START, 1))

    def row(self, what: str, **values: object) -> None:
        self.rows.append({"what": what, **values})
        print(json.dumps(self.rows[-1]), flush=True)

    def prompts(self, lengths: list[int]) -> list[list[int]]:
        return [[self.random.randrange(10, HIGHEST_ID) for _ in range(length)] for length in lengths]

    def generate(self, prompt_lengths: list[int], out_lengths: list[int], temperature: float = 0.0) -> float:
        from jaxllm.core import SamplingParams

        params = [
            SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=n, detokenize=False)
            for n in out_lengths
        ]
        prompts = self.prompts(prompt_lengths)
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert [len(o.outputs[0].token_ids) for o in outputs] == out_lengths
        return seconds

    def decode(self, batch: int) -> None:
        ctx = self.options.ctx

        def total(out: int) -> float:
            return self.generate([ctx] * batch, [out] * batch)

        steps = sorted((total(192) - total(64)) / 128 * 1e3 for _ in range(self.options.reps))
        step_ms = statistics.median(steps)
        spread = [round(step, 3) for step in steps]
        self.row(
            "decode", batch=batch, ctx=ctx, step_ms=round(step_ms, 3), tok_s=round(batch / step_ms * 1e3), all_ms=spread
        )

    def prefill(self, tokens: int) -> None:
        times = [self.generate([tokens], [1]) * 1e3 for _ in range(self.options.reps + 1)][1:]
        self.row("prefill", tokens=tokens, ttft_ms=round(statistics.median(times), 2))

    def throughput(self, requests: int) -> None:
        lengths = random.Random(0)
        prompts, outs = [], []
        for _ in range(requests):
            prompts.append(lengths.randint(100, 1024))
            outs.append(lengths.randint(100, 1024))
        seconds = self.generate(prompts, outs, temperature=0.6)
        rate = round(sum(outs) / seconds)
        self.row("throughput", requests=requests, out_tokens=sum(outs), s=round(seconds, 2), out_tok_s=rate)

    def run(self) -> None:
        self.generate([64] * 2, [8] * 2)
        for batch in self.options.batch:
            self.decode(batch)
        for tokens in self.options.prefill:
            self.prefill(tokens)
        if self.options.throughput:
            self.throughput(self.options.throughput)


def choices() -> list[str]:
    """Which implementation each op was traced with, and why not another."""
    from pallas_kernels.dispatch import explain

    return explain().splitlines()


def machine() -> dict[str, object]:
    import jax

    device = jax.devices()[0]
    return {"device": device.device_kind, "jax": jax.__version__, "python": platform.python_version()}


def commit(given: str) -> str:
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return given or asked.stdout.strip() or "unknown"


def main() -> None:
    options = arguments()
    bench = Bench(options)
    bench.run()
    command = " ".join(["python", *sys.argv])
    about = {
        "shape": options.shape,
        "kernels": options.kernels,
        **machine(),
        "commit": commit(options.commit),
        "command": command,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**about, "dispatch": choices(), "rows": bench.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
