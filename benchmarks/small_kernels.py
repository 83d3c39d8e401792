"""Sampling, greedy choice, page write and residual norms on a GPU: our kernels beside XLA's own, in us a call.

In: nothing but a GPU. Out: lines on the terminal, one JSON object each. Times are of calls chained inside one jitted
function, so that launches of the host do not count; every call reads memory that the one before did not leave in L2
where the sizes allow it.

    python -m benchmarks.small_kernels [greedy adjusted draw rope norm]
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compiled import NVCC, built
from pallas_kernels.norm.api import add_norm
from pallas_kernels.rope_page_write.api import rope_page_write
from pallas_kernels.rope_page_write.heads import Heads
from pallas_kernels.sampling import api, cuda

B, V, CHAIN = 256, 151936, 4
BF, F32 = jnp.bfloat16, jnp.float32
WAYS = ("triton", "reference")


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def us(run: Callable[..., Any], *args: Any) -> float:
    """Of one of CHAIN calls inside `run`, the best of five."""
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([run(*args) for _ in range(8)])
        times.append((time.perf_counter() - start) / 8 / CHAIN * 1e6)
    return round(min(times), 1)


def chained(call: Callable[[Any], Any], join: Callable[[Any, Any], Any], state: Any) -> Callable[[Any], Any]:
    """CHAIN calls, each waiting for the one before. XLA leaves out what nobody reads and copies what comes out."""

    def run(state: Any) -> Any:
        results = []
        for _ in range(CHAIN):
            results.append(call(state))
            state = join(state, results[-1])
        return results if join is after else state

    return jax.jit(run)


def after(state: Any, result: Any) -> Any:
    """The same state, once the result is there."""
    return jax.lax.optimization_barrier((state, result))[0]


def logits(std: float = 3.0) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (B, V), F32) * std


def greedy() -> None:
    found = logits()
    for way in WAYS:
        call = functools.partial(api.greedy, implementation=way)
        run = chained(call, after, found)
        say(what="greedy 256 x 151936", way=way, us=us(run, found), predicted={"triton": 42, "reference": 115}[way])


def asked() -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    counts = (rng.random((B + 1, V)) < 0.01).astype(np.uint16)
    words = np.full((B, -(-V // 32)), 2**32 - 1, np.uint32)
    ids = np.stack([rng.permutation(V)[:300] for _ in range(B)]).astype(np.int32)
    ones = np.ones(B, np.float32)
    arrays = counts, np.arange(B, dtype=np.int32), words, ids, rng.standard_normal((B, 300)).astype(np.float32)
    return tuple(jnp.asarray(each) for each in (*arrays, 1.1 * ones, 0.1 * ones, 0.1 * ones))


def adjusted() -> None:
    found, wanted = logits(), asked()
    for way in WAYS:
        run = chained(lambda x: api.adjusted(x, *wanted, implementation=way), lambda x, y: y[0], found)  # noqa: B023
        say(
            what="adjusted, everything on", way=way, us=us(run, found), predicted={"triton": 115, "reference": 330}[way]
        )


def shaped(name: str, threads: int, blocks: int) -> Callable[..., Any]:
    """The draw in CUDA with other numbers of threads and blocks."""
    target = f"{cuda.TARGET}_{name}"
    command = (*NVCC, f"-DJAXLLM_THREADS={threads}")
    loaded = ctypes.cdll.LoadLibrary(str(built(cuda.SOURCE, cuda.INCLUDES, command)))
    cuda.register(loaded, target)
    return lambda *arrays, truncates: cuda.call(target, blocks, *arrays)


def drawn(given: tuple[jax.Array, ...], run: Callable[..., Any], truncates: bool) -> Any:
    return run(*given, truncates=truncates)


def draw() -> None:
    wanted = asked()
    keys = jax.random.bits(jax.random.key(1), (B, 2), jnp.uint32)
    ways: dict[str, Callable[..., Any]] = {
        "cuda": functools.partial(api.draw, implementation="cuda"),
        "cuda, 4 blocks of 1024": shaped("4x1024", 1024, 4),
        "triton": functools.partial(api.draw, implementation="apart"),
        "reference": functools.partial(api.draw, implementation="reference"),
    }
    drawing = {  # compiled once for all parameters
        (way, truncates): chained(functools.partial(drawn, run=run, truncates=truncates), after, None)
        for way, run in ways.items()
        for truncates in (False, True)
    }
    rows: dict[str, tuple[tuple[float, int, float, float, bool], int, int]] = {  # what is asked, rows, predicted
        "everything on": ((0.8, 50, 0.95, 0.02, True), B, 140),
        "top_p alone": ((0.8, 0, 0.9, 0.0, True), B, 165),
        "temperature alone": ((0.8, 0, 1.0, 0.0, False), B, 150),
        "temperature 0": ((0.0, 0, 1.0, 0.0, True), B, 100),
        "flat, top_p alone: all rows slow": ((8.0, 0, 0.9, 0.0, True), B, 700),
        "everything on, 1 row": ((0.8, 50, 0.95, 0.02, True), 1, 15),
    }
    whole = logits()
    for name, ((temperature, top_k, top_p, min_p, truncates), number, guess) in rows.items():
        of_row = [jnp.full((number,), value, dtype) for value, dtype in ((temperature, F32), (top_k, jnp.int32))]
        of_row += [jnp.full((number,), value, F32) for value in (top_p, min_p)]
        given = whole[:number], wanted[0], *(each[:number] for each in wanted[1:]), keys[:number], *of_row
        tokens = {}
        for way in ways:
            if way == "reference" and number < B:
                continue
            run = drawing[way, truncates]
            tokens[way] = np.asarray(run(given)[0][0])
            predicted = guess if way == "cuda" else None
            say(what=f"draw, {name}", way=way, us=us(run, given), predicted=predicted)
        differ = {way: int((each != tokens["cuda"]).sum()) for way, each in tokens.items() if way != "cuda"}
        say(what=f"draw, {name}", rows_that_differ_from_cuda=differ)


def rope() -> None:
    for tokens, N, norms in ((8192, 32, False), (1024, 32, False), (8192, 16, True)):
        K, H, page_size = 8, 128, 16
        qkv = jax.random.normal(jax.random.key(0), (tokens, (N + 2 * K) * H), BF)
        angle = jnp.ones((tokens, H // 2), F32)
        weights = jnp.ones((2, H), BF) if norms else None
        slots = jnp.arange(tokens, dtype=jnp.int32)
        for way in WAYS:
            pages = jnp.zeros((tokens // page_size + 64, K, page_size, H), BF)

            def call(state: Any, way: str = way, weights: Any = weights, angle: Any = angle, slots: Any = slots) -> Any:
                heads = Heads(state[0], angle, angle, weights, K=8, dtype=jnp.dtype(BF))
                return rope_page_write(heads, state[1], state[2], slots, implementation=way)

            def join(state: Any, found: Any) -> Any:
                return state[0].at[0, 0].add(found[0][0, 0, 0]), found[1], found[2]

            state = qkv, pages, pages + 0
            say(
                what=f"rope and page write, {tokens} tokens, {N} heads",
                way=way,
                us=us(chained(call, join, state), state),
                predicted={("triton", 8192): 55, ("triton", 1024): 8, ("reference", 8192): 170}.get((way, tokens)),
            )


def norm() -> None:
    for T, parts in ((1, 0), (1, 8), (32, 8)):
        x, weights = jnp.ones((T, 4096), BF), jnp.ones((2, 4096), BF)
        delta = jnp.ones((parts, T, 4096), F32) if parts else x
        for way in WAYS:
            call = lambda x: add_norm(x, delta, weights, 1, eps=1e-5, implementation=way)  # noqa: B023, E731
            say(
                what=f"residual and norm, {T} rows, {parts} parts",
                way=way,
                us=us(chained(call, lambda x, y: (y[0] + y[1]).astype(BF), x), x),
            )


if __name__ == "__main__":
    for name in sys.argv[1:] or ("greedy", "adjusted", "draw", "rope", "norm"):
        globals()[name]()
