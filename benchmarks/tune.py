"""Time candidate block sizes on this GPU and write the best to pallas_kernels/tuned/<device>.json.

In: nothing but a GPU. Out: the file, and a line a candidate. Only knobs that leave bits alone are tried: stages of
loads in flight. A candidate must beat the heuristic by MARGIN to be written, so that noise writes nothing.

    python -m benchmarks.tune [--directory DIR]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels import CHAIN_BYTES, seconds
from pallas_kernels import tuning
from pallas_kernels.paged_attention import triton

MARGIN = 0.98
STAGES = (3, 5, 7)
SHAPES = [(8, 1024), (16, 1024), (32, 1024), (64, 1024), (128, 1024), (256, 1024)]  # rows and keys, 8 kv heads
N, K, H, PAGE = 32, 8, 128, 16


def arguments(B: int, S: int, calls: int) -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    pages = calls * B * S // PAGE
    order = np.random.default_rng(0).permutation(pages).reshape(calls, B, -1).astype(np.int32)
    return (
        jax.random.normal(keys[0], (B, N, H), jnp.bfloat16),
        jax.random.normal(keys[1], (pages, K, PAGE, H), jnp.bfloat16),
        jax.random.normal(keys[2], (pages, K, PAGE, H), jnp.bfloat16),
        [jnp.asarray(table) for table in order],
        jnp.full((B,), S, jnp.int32),
    )


def chain(q: Any, k: Any, v: Any, tables: Any, lens: Any, *, blocks: triton.Blocks) -> Any:
    call = functools.partial(triton.paged_attention_decode, scale=H**-0.5, blocks=blocks)
    return functools.reduce(lambda q, table: call(q, k, v, table, lens), tables, q)


def decode() -> dict[str, dict[str, Any]]:
    """Stages of the decode kernel, by how many rows share the device."""
    pool, best = ThreadPoolExecutor(12), {}
    compiled = {}
    for B, S in SHAPES:
        calls = int(max(2, min(16, CHAIN_BYTES // (2 * B * S * K * H * 2))))
        shapes = jax.eval_shape(functools.partial(arguments, B, S, calls))
        for stages in STAGES:
            blocks = dataclasses.replace(triton.default_blocks(B * K, -(-S // triton.SPLIT)), num_stages=stages)
            lowered = jax.jit(functools.partial(chain, blocks=blocks)).lower(*shapes)
            compiled[B, stages] = calls, pool.submit(lowered.compile)
    for B, S in SHAPES:
        made = arguments(B, S, compiled[B, STAGES[0]][0])
        times = {stages: seconds(compiled[B, stages][1].result(), made, 20) / len(made[3]) for stages in STAGES}
        for stages, each in times.items():
            print(f"decode {B}x{S} stages {stages}: {each * 1e6:.1f} us", flush=True)
        heuristic = triton.default_blocks(B * K, -(-S // triton.SPLIT)).num_stages
        winner = min(times, key=times.__getitem__)
        if times[winner] < MARGIN * times[heuristic]:
            best[triton.tuning_key(B * K, H)] = {"num_stages": winner}
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=tuning.DIRECTORY)
    options = parser.parse_args()
    device = tuning.device_name()
    if device is None:
        raise SystemExit("tuning needs a GPU")
    entries = {"paged_attention.decode/triton": decode()}
    print(tuning.save(entries, device, "python -m benchmarks.tune", options.directory))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
