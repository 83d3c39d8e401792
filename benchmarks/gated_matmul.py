"""silu(gate) * up of many rows on a GPU: the CUDA kernel in every cut against XLA's product and SwiGLU, in us.

In: nothing but a GPU and nvcc (or a library that lies in the cache). Out: JSON lines on the terminal. Weights of the
calls are distinct, so the L2 cache holds none of them. Times are of one jitted call of all, host clock over several
calls in a row, the best of four: at many rows the card runs at its power limit meanwhile.

    python -m benchmarks.gated_matmul [SHAPE] [ROWS,ROWS,...] [check]
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gated_matmul import cuda, reference

BF, F32 = jnp.bfloat16, jnp.float32
SHAPES = {"llama-8b": (4096, 14336), "qwen3-0.6b": (1024, 3072), "llama-8b-tp2": (4096, 7168)}  # D, F
BYTES = 1 << 30  # of all weights together


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def best(run: Callable[..., Any], *args: Any) -> float:
    jax.block_until_ready(run(*args))
    times: list[float] = []
    for _ in range(4):
        start, count, out = time.perf_counter(), 0, None
        while count < 3 or (count < 20 and time.perf_counter() - start < 0.05):
            out, count = run(*args), count + 1
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / count)
    return min(times)


def normal(key: int, shape: tuple[int, ...], scale: float) -> jax.Array:
    return (jax.random.normal(jax.random.key(key), shape, F32) * scale).astype(BF)


def error(got: Any, want: Any) -> float:
    g, w = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(g - w) / np.linalg.norm(w))


def measure(shape: str, T: int) -> None:
    D, F = SHAPES[shape]
    count, blocks = max(2, min(8, BYTES // (4 * F * D))), jax.devices()[0].core_count
    weights = [normal(i, (2 * F, D), D**-0.5) for i in range(count)]
    xs = [normal(99 + i, (T, D), 1.0) for i in range(count)]  # XLA would join products of one x
    want = jax.jit(reference.gated_matmul)(xs[0], weights[0])

    def row(run: Callable[..., Any], **more: Any) -> None:
        us = best(jax.jit(lambda xs, ws: list(map(run, xs, ws))), xs, weights) * 1e6 / count
        rates = {"TFLOPs": round(4e-6 * T * F * D / us, 1), "TBps": round(4e-6 * F * D / us, 2)}
        say(shape=shape, rows=T, us=round(us, 1), **rates, **more)

    row(reference.gated_matmul, what="XLA")
    for cut in cuda.CUTS:
        if (cut.shared == "rows") != (T <= cuda.ROWS):
            continue
        ours = functools.partial(cuda.call, cuda.TARGET, blocks, cut=cut)
        found = round(error(jax.jit(ours)(xs[0], weights[0]), want), 5)
        row(ours, what="ours", width=cut.width, shared=cut.shared, chosen=cut == cuda.cut_for(T, F, blocks), err=found)


def check() -> None:
    """Odd sizes, against XLA in f32; every cut the same bits."""
    blocks = jax.devices()[0].core_count
    for T, F, D in ((1, 136, 64), (100, 2048, 256), (129, 14336, 128), (300, 520, 4096), (1000, 3080, 512)):
        x, w = normal(1, (T, D), 1.0), normal(2, (2 * F, D), D**-0.5)
        want = jax.jit(reference.gated_matmul)(x.astype(F32), w.astype(F32))
        one = jax.jit(cuda.call, static_argnums=(0, 1, 4))
        cuts = *cuda.CUTS, cuda.Cut(256, "weights", 1)
        got = [np.asarray(one(cuda.TARGET, blocks, x, w, cut)) for cut in cuts]
        say(check=[T, F, D], err=round(error(got[0], want), 5), same=all(np.array_equal(each, got[0]) for each in got))


def main(names: list[str]) -> None:
    cuda.register(cuda.library())
    if "check" in names:
        check()
    given = [name for name in names if name != "check"]
    shape, rows = [*given, *("llama-8b", "128,256,1024")[len(given) :]]
    for T in map(int, rows.split(",")):
        measure(shape, T)


if __name__ == "__main__":
    main(sys.argv[1:])
