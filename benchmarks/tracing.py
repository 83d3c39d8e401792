"""What of a start is Python: CPU seconds of tracing and lowering every executable, and of reading it back instead.

In: a shape of configs/models. Out: a table on the terminal, by kind of executable: lowered from Python; so and kept as
StableHLO, as a first start does; read from there, as later ones do. Lowered for an H200 from its textual description
(tools/gate.py); nothing is compiled. Needs a venv with jax[cuda13] and flax; no driver, no GPU.

    python -m benchmarks.tracing llama-3.1-8b
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.step_kernels import abstract_h200, model_of
from tools import gate

PAGES, PAGE_SIZE, WIDTH = 5000, 64, 20
DECODE_ROWS, MIXED_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (256, 512, 1024, 2048, 4096, 8192)


def jobs(shape: str) -> tuple[Any, list[Any]]:
    """A graph, and the executables of a start with these buckets."""
    import jax
    import jax.numpy as jnp

    from jaxllm.graph import compile as compiling
    from jaxllm.graph.models.decoder import abstract
    from jaxllm.graph.steps import Graph

    config = model_of(shape)
    graphdef, params = abstract(config, jnp.bfloat16)
    page = jax.ShapeDtypeStruct((PAGES, config.num_kv_heads, PAGE_SIZE, config.head_dim), jnp.bfloat16)
    counts = jax.ShapeDtypeStruct((DECODE_ROWS[-1] + 1, config.vocab_size), jnp.uint16)
    arrays = params, [(page, page)] * config.num_layers, counts
    arrays = jax.tree.map(functools.partial(gate.placed, gate.sharding()), arrays)
    graph = Graph(graphdef, config, PAGE_SIZE, PAGES)
    return graph, list(compiling.jobs_of(graph, compiling.Ladder(DECODE_ROWS, MIXED_TOKENS, WIDTH), *arrays))


def kind_of(key: tuple[Any, ...]) -> str:
    return key[0] if key[0] != "step" else f"step, {'decode' if key[1].decode else 'mixed'}"


def lowered(lower: Callable[[Any], object], jobs: list[Any]) -> dict[str, list[float]]:
    """The CPU seconds of each executable, by kind; nothing is left from the way before."""
    import jax

    jax.clear_caches()
    seconds: dict[str, list[float]] = {}
    for job in jobs:
        began = time.process_time()
        lower(job)
        seconds.setdefault(kind_of(job.key), []).append(time.process_time() - began)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tracing_") as directory:
        folder = Path(directory)
        gate.prepare(directory)
        from jaxllm.graph.traces import Traces

        with abstract_h200():
            graph, wanted = jobs(args.shape)
            kept = Traces(folder / "traces", graph).lower
            ways = [lowered(lower, wanted) for lower in (lambda job: job.lower(), kept, kept)]
        size = sum(path.stat().st_size for path in (folder / "traces").iterdir())
    print(f"{args.shape}: {len(wanted)} executables, {size / 2**20:.1f} MiB of StableHLO; CPU seconds\n")
    print("| executables | how many | traced | traced and kept | read back |\n| --- | --- | --- | --- | --- |")
    for kind, each in ways[0].items():
        print(f"| {kind} | {len(each)} | {' | '.join(f'{sum(way[kind]):.2f}' for way in ways)} |")
    totals = (sum(map(sum, way.values())) for way in ways)
    print(f"| all | {len(wanted)} | {' | '.join(f'{total:.2f}' for total in totals)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
