"""Products x @ W.T with quantised weights W [N, K]: argument checks, then the best implementation that accepts.

In: activations [M, K] and a weight as packing.py or plain e4m3 holds it, with its scales. Out: [M, N] in `out_dtype`;
sums are f32. Three ops, one a kind of weight. N is a multiple of 64 and K of 128: whoever packs pads. This module does
not know where weights come from, nor layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch, imported, register
from pallas_kernels.quant_matmul import packing

GROUPS = (32, 64, 128)
_ROOM = "pallas_kernels.quant_matmul"
for _kind in ("int8", "int4", "fp8"):
    _op = f"quant_matmul.{_kind}"
    register(_op, "mosaic_sm90", imported(f"{_ROOM}.mosaic_sm90:{_kind}_matmul"), platforms=("gpu",))
    register(_op, "mosaic_sm90_interpret", imported(f"{_ROOM}.interpreted:{_kind}_matmul"), platforms=("interpret",))
    if _kind != "fp8":
        register(_op, "widen_sm90", imported(f"{_ROOM}.widen_sm90:{_kind}_matmul"), platforms=("gpu",))
        register(
            _op, "widen_sm90_interpret", imported(f"{_ROOM}.interpreted:{_kind}_widened"), platforms=("interpret",)
        )
    if _kind == "int4":
        register(_op, "jax_triton", imported(f"{_ROOM}.jax_triton:int4_matmul"), platforms=("gpu",))
    register(_op, "reference", imported(f"{_ROOM}.reference:{_kind}_matmul"))


def int8_matmul(
    x: jax.Array,  # [M, K]
    words: jax.Array,  # i32[N / 64, K / 64, 8, 128]
    scale: jax.Array,  # f32[N]
    *,
    out_dtype: Any = jnp.float32,
    implementation: str | None = None,
    platform: str | None = None,
) -> jax.Array:
    """W = scale * q, one scale an output."""
    N = _check_packed(x, words, 8)
    if scale.shape != (N,) or scale.dtype != jnp.float32:
        raise ValueError(f"scale must be f32[N] = f32[{N}], got {scale.dtype}{list(scale.shape)}")
    return dispatch("quant_matmul.int8", implementation=implementation, platform=platform)(
        x, words, scale, out_dtype=out_dtype
    )


def int4_matmul(
    x: jax.Array,  # [M, K]
    words: jax.Array,  # i32[N / 64, K / 64, 4, 128]
    scale: jax.Array,  # [K / group, N]
    zero: jax.Array | None = None,  # [K / group, N]
    *,
    out_dtype: Any = jnp.float32,
    implementation: str | None = None,
    platform: str | None = None,
) -> jax.Array:
    """W = scale * (q - zero) with q in 0..15, or, without `zero`, W = scale * q with q in -8..7."""
    N = _check_packed(x, words, 4)
    K = x.shape[1]
    groups = scale.shape[0] if scale.ndim == 2 else 0
    if groups == 0 or K % groups or K // groups not in GROUPS or scale.shape[1] != N:
        raise ValueError(
            f"scale must be [K / group, N] with group in {GROUPS} for K = {K} and N = {N}, got {list(scale.shape)}"
        )
    if scale.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"scale must be bfloat16, float16 or float32, got {scale.dtype}")
    if zero is not None and (zero.shape != scale.shape or zero.dtype != scale.dtype):
        raise ValueError(f"zero {zero.dtype}{list(zero.shape)} must agree with scale {scale.dtype}{list(scale.shape)}")
    return dispatch("quant_matmul.int4", implementation=implementation, platform=platform)(
        x, words, scale, zero, out_dtype=out_dtype
    )


def fp8_matmul(
    x: jax.Array,  # [M, K]
    weight: jax.Array,  # e4m3[N, K]
    scale: jax.Array,  # f32[N], or f32[K / 128, N]: a scale a block of 128 inputs
    x_scale: jax.Array | None = None,  # f32[]: fixed beforehand; without it, one a row (a block of a row) from its data
    *,
    out_dtype: Any = jnp.float32,
    implementation: str | None = None,
    platform: str | None = None,
) -> jax.Array:
    """x is rounded to e4m3 first, by row, or by row and block of 128 inputs where the weight has scales of blocks."""
    if x.ndim != 2 or weight.ndim != 2 or 0 in x.shape or 0 in weight.shape or x.shape[1] != weight.shape[1]:
        raise ValueError(f"need x[M, K] and weight[N, K], none empty; got {x.shape}, {weight.shape}")
    N, K = weight.shape
    _check_sizes(x, N, K)
    if weight.dtype != jnp.float8_e4m3fn:
        raise ValueError(f"weight must be float8_e4m3fn, got {weight.dtype}")
    if scale.shape not in ((N,), (K // 128, N)) or scale.dtype != jnp.float32:
        raise ValueError(f"scale must be f32[{N}] or f32[{K // 128}, {N}], got {scale.dtype}{list(scale.shape)}")
    if x_scale is not None and (x_scale.shape != () or x_scale.dtype != jnp.float32 or scale.ndim == 2):
        raise ValueError(f"x_scale must be f32[] beside f32[N] scales, got {x_scale.dtype}{list(x_scale.shape)}")
    return dispatch("quant_matmul.fp8", implementation=implementation, platform=platform)(
        x, weight, scale, x_scale, out_dtype=out_dtype
    )


def _check_packed(x: jax.Array, words: jax.Array, bits: int) -> int:
    rows = packing.rows_of(bits)
    if x.ndim != 2 or 0 in x.shape or words.ndim != 4 or words.shape[2:] != (rows, packing.LANES):
        raise ValueError(
            f"need x[M, K], not empty, and words[N / 64, K / 64, {rows}, 128]; got {x.shape}, {words.shape}"
        )
    N, K = words.shape[0] * packing.TILE, words.shape[1] * packing.TILE
    if words.dtype != jnp.int32 or x.shape[1] != K:
        raise ValueError(f"words {words.dtype}{list(words.shape)} hold [N, K] = [{N}, {K}], x is {list(x.shape)}")
    _check_sizes(x, N, K)
    return N


def _check_sizes(x: jax.Array, N: int, K: int) -> None:
    if N % packing.TILE or K % FP8_BLOCK:
        raise ValueError(f"N must be a multiple of {packing.TILE} and K of {FP8_BLOCK}, got N = {N}, K = {K}")
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"x must be bfloat16, float16 or float32, got {x.dtype}")


FP8_BLOCK = 128
