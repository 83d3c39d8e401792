"""Several decode steps in one dispatch beside single ones, on whatever device there is: alike, how fast, at whose cost.

In: a model directory, and how many steps to try. Out: a JSON line for each number: milliseconds a step, greedy and
sampled, steps a dispatch, the share of tokens that are those of the first number tried (a loop's products may be other
kernels than a single step's, so on a GPU this need not be 1), and the first-token time of a request that arrives while
others decode.

    python -m benchmarks.multi_step DIRECTORY --rows 1 --steps 1,4 [--kernels layers]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import time
from typing import Any

from jaxllm.config import load
from jaxllm.core import SamplingParams, Sequence
from jaxllm.engine.engine import Engine
from jaxllm.engine.startup import start

CONTEXT, OUT, ARRIVALS = 1024, 192, 20
KINDS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=OUT, ignore_eos=True),
    "temperature": SamplingParams(temperature=0.7, seed=1, max_tokens=OUT, ignore_eos=True),
    "top_p": SamplingParams(temperature=0.7, top_p=0.95, top_k=20, seed=1, max_tokens=OUT, ignore_eos=True),
}


def add(engine: Engine, salt: int, length: int, params: SamplingParams) -> Sequence:
    ids = random.Random(salt).choices(range(10, 10_000), k=length)
    return engine.add(engine.make_request(ids, params))[0]


def decode(engine: Engine, rows: int, params: SamplingParams) -> tuple[list[list[int]], float]:
    """The tokens, and milliseconds a step once all rows decode."""
    sequences = [add(engine, row, CONTEXT, params) for row in range(rows)]
    while min(sequence.num_output for sequence in sequences) < 8:
        engine.step()
    steps, began = engine.scheduler.metrics.steps, time.perf_counter()
    while engine.has_work:
        engine.step()
    seconds = time.perf_counter() - began
    return [sequence.output_token_ids for sequence in sequences], seconds / (
        engine.scheduler.metrics.steps - steps
    ) * 1e3


def arrival_ms(engine: Engine, rows: int) -> float:
    """The median first-token time of a short prompt that comes while `rows` decode."""
    dice, found = random.Random(0), []
    for number in range(ARRIVALS):
        others = [add(engine, row, 64, KINDS["greedy"]) for row in range(rows)]
        until = 12 + dice.randrange(8)
        while min(other.num_output for other in others) < until:
            engine.step()
        began = time.perf_counter()
        late = add(engine, 1000 + number, 64, KINDS["greedy"].replace(max_tokens=1))
        while not late.finished:
            engine.step()
        found.append((time.perf_counter() - began) * 1e3)
        while engine.has_work:
            engine.step()
    return statistics.median(found)


def measure(engine: Engine, rows: int, single: dict[str, Any]) -> dict[str, Any]:
    """`single` is filled with the tokens of single steps, or compared with."""
    found: dict[str, Any] = {"decode_steps": engine.config.scheduler.decode_steps, "rows": rows}
    before = dataclasses.replace(engine.scheduler.metrics)
    for kind, params in KINDS.items():
        decode(engine, rows, params)
        tokens, found[f"{kind} ms"] = decode(engine, rows, params)
        theirs = single.setdefault(kind, tokens)
        same = sum(a == b for ours, other in zip(tokens, theirs) for a, b in zip(ours, other))
        found[f"{kind} alike"] = same / (rows * OUT)
    after = engine.scheduler.metrics
    found["steps a dispatch"] = (after.steps - before.steps) / (after.dispatches - before.dispatches)
    found["arrival ms"] = arrival_ms(engine, max(1, rows - 1))
    return found | {"compiles_after_ready": after.compiles_after_ready, "preemptions": after.preemptions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--steps", default="1,4")
    parser.add_argument("--cache-dir", default="")
    parser.add_argument("--kernels", default="auto")
    given = parser.parse_args()
    single: dict[str, Any] = {}
    for steps in map(int, given.steps.split(",")):
        config = load(
            model=given.directory,
            load_format="dummy",
            decode_steps=steps,
            kernels=given.kernels,
            cache_dir=given.cache_dir,
            prefix_cache=False,
            max_model_len=2048,
            max_num_seqs=max(8, given.rows),
            num_pages=1024,
        )
        engine, report = start(config)
        assert isinstance(engine, Engine)
        started = {"start_s": round(report.total_s, 1), "executables": report.executables}
        print(json.dumps(measure(engine, given.rows, single) | started), flush=True)


if __name__ == "__main__":
    main()
