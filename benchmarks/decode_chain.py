"""What lies between two attentions on a GPU: overlapping CUDA launches, the same in turn, XLA's products; us a layer.

In: nothing but a GPU and nvcc (or libraries that lie in the cache). Out: JSON lines on the terminal. Weights of the
layers are distinct, so the L2 cache holds none of them. Times are of one jitted call of all layers, host clock over
several calls in a row, the best of four.

    python -m benchmarks.decode_chain [SHAPE] [ROWS,ROWS,...]
"""

from __future__ import annotations

import functools
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compiled import NVCC, built
from pallas_kernels.decode_chain import cuda
from pallas_kernels.decode_chain.api import Dense, Following
from pallas_kernels.decode_chain.reference import decode_chain as reference

IN_TURN = (*NVCC, "-DJAXLLM_IN_TURN")
BF, F32 = jnp.bfloat16, jnp.float32
SHAPES = {"llama-8b": (8, 4096, 4096, 14336, 6144), "qwen3-0.6b": (28, 1024, 2048, 3072, 4096)}  # L, D, O, F, Q
Layer = tuple[Dense, Following]


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def best(run: Callable[..., Any], *args: Any, reps: int = 20) -> float:
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(4):
        start = time.perf_counter()
        outs = [run(*args) for _ in range(reps)]
        jax.block_until_ready(outs[-1])
        times.append((time.perf_counter() - start) / reps)
    return min(times)


@functools.partial(jax.jit, static_argnames=("shape", "scale", "shift"))
def normal(key: jax.Array, shape: tuple[int, ...], scale: float, shift: float = 0.0) -> jax.Array:
    return (jax.random.normal(key, shape, F32) * scale + shift).astype(BF)


def layer_weights(seed: int, D: int, O: int, F: int, Q: int) -> Layer:  # noqa: E741
    k = jax.random.split(jax.random.key(seed), 6)
    norms = normal(k[4], (2, D), 0.1, 1.0)
    dense = Dense(
        normal(k[0], (D, O), O**-0.5), norms, normal(k[1], (2 * F, D), D**-0.5), normal(k[2], (D, F), F**-0.5)
    )
    return dense, Following(normal(k[5], (2, D), 0.1, 1.0), normal(k[3], (Q, D), D**-0.5))


def stack(chain: Callable[..., Any]) -> Callable[..., Any]:
    """All layers; attention's part is played by one array."""

    @jax.jit
    def run(x: jax.Array, mixed: jax.Array, layers: Sequence[Layer]) -> Any:
        all_qkv = []
        for dense, following in layers:
            x, qkv = chain(x, mixed, dense, following, eps=1e-5)
            all_qkv.append(qkv)
        return x, all_qkv

    return run


def error(got: Any, want: Any) -> float:
    g, w = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(g - w) / np.linalg.norm(w))


def measure(shape: str, T: int, layers: Sequence[Layer]) -> None:
    _, D, O, F, Q = SHAPES[shape]  # noqa: E741
    x, mixed = normal(jax.random.key(5), (T, D), 1.0), normal(jax.random.key(6), (T, O), 1.0)
    plain = stack(reference)
    want = jax.tree.map(np.asarray, plain(x, mixed, layers[:1]))
    megabytes = 2e-6 * (D * O + 3 * D * F + Q * D)
    us = best(plain, x, mixed, layers) * 1e6 / len(layers)
    say(shape=shape, rows=T, what="XLA, plain", us=round(us, 1), TBps=round(megabytes / us, 2))
    ways: dict[str, Callable[..., Any]] = {"ours": cuda.decode_chain}
    try:
        ways["ours, in turn"] = in_turn()
    except NotImplementedError as reason:
        say(what="ours, in turn", failed=str(reason))
    for what, way in ways.items():
        try:
            run = stack(way)
            got = run(x, mixed, layers[:1])
            errors = [round(error(g, w), 5) for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)]
            again = [run(x, mixed, layers[:1]) for _ in range(20)]
            same = all(
                np.array_equal(a, b)
                for each in again
                for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(each), strict=True)
            )
            us = best(run, x, mixed, layers) * 1e6 / len(layers)
            say(
                shape=shape, rows=T, what=what, us=round(us, 1), TBps=round(megabytes / us, 2), errors=errors, same=same
            )
        except Exception as fault:  # each choice's failure is reported, and the rest still measured
            traceback.print_exc(limit=-2)
            say(shape=shape, rows=T, what=what, failed=str(fault)[:300])


@functools.cache
def in_turn() -> Callable[..., Any]:
    """The same launches, each after the end of the one ahead of it."""
    loaded = cuda.load(built(cuda.SOURCE, cuda.INCLUDES, IN_TURN))
    cuda.register(loaded, f"{cuda.TARGET}_in_turn")
    blocks = jax.devices()[0].core_count // 2 * 2
    return functools.partial(cuda.call, f"{cuda.TARGET}_in_turn", loaded, blocks)


def main() -> None:
    shape = sys.argv[1] if len(sys.argv) > 1 else "llama-8b"
    L, *dims = SHAPES[shape]
    layers = [layer_weights(i, *dims) for i in range(L)]
    for T in map(int, sys.argv[2].split(",")) if len(sys.argv) > 2 else (16, 32, 64, 96, 128, 160, 192, 256):
        measure(shape, T, layers)


if __name__ == "__main__":
    main()
