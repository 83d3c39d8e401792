"""The GPU kernels of this room under Pallas's interpreter, for tests on a CPU: one small function a kernel.

In and out as the kernels. The interpreter looks for races (it prints and counts them) and takes a thread a warpgroup,
so large inputs are declined.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quant_matmul import mosaic_sm90, widen_sm90

MOST_PRODUCTS = 2**25  # M * N * K
MOST_WORDS = 2**16
PROGRAMS = 2


def int8_matmul(x: jax.Array, words: jax.Array, *rest: Any, **options: Any) -> jax.Array:
    return _run(mosaic_sm90.int8_matmul, words.shape[0] * mosaic_sm90.ROWS, 8, x, words, *rest, **options)


def int4_matmul(x: jax.Array, words: jax.Array, *rest: Any, **options: Any) -> jax.Array:
    return _run(mosaic_sm90.int4_matmul, words.shape[0] * mosaic_sm90.ROWS, 4, x, words, *rest, **options)


def fp8_matmul(x: jax.Array, weight: jax.Array, *rest: Any, **options: Any) -> jax.Array:
    return _run(mosaic_sm90.fp8_matmul, weight.shape[0], 8, x, weight, *rest, **options)


def int8_widened(x: jax.Array, words: jax.Array, scale: jax.Array, *, out_dtype: Any) -> jax.Array:
    return widen_sm90.int8_matmul(x, words, scale, out_dtype=out_dtype, **_small(x, words))


def int4_widened(
    x: jax.Array, words: jax.Array, scale: jax.Array, zero: jax.Array | None = None, *, out_dtype: Any
) -> jax.Array:
    return widen_sm90.int4_matmul(x, words, scale, zero, out_dtype=out_dtype, **_small(x, words))


def _small(x: jax.Array, words: jax.Array) -> dict[str, Any]:
    if words.size > MOST_WORDS:
        raise NotImplementedError(f"{words.size} words would keep the interpreter busy for minutes")
    return {"programs": PROGRAMS, "interpret": plgpu.InterpretGPUParams(detect_races=True)}


def _run(kernel: Callable[..., jax.Array], N: int, bits: int, x: jax.Array, *rest: Any, **options: Any) -> jax.Array:
    """By two interpreted programs with race detection, a ring of two stages and K cut in two."""
    M, K = x.shape
    if M * N * K > MOST_PRODUCTS:
        raise NotImplementedError(f"{M} x {N} x {K} would keep the interpreter busy for minutes")
    blocks = dataclasses.replace(mosaic_sm90.default_blocks(M, N, bits), programs=PROGRAMS, stages=2)
    splits = min(2, K // mosaic_sm90.BLOCK)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return kernel(x, *rest, blocks=blocks, splits=splits, interpret=interpret, **options)
