"""Products with quantised weights in plain jnp: the weight is widened, then multiplied. It is also the fallback.

In and out as api.py. With f32 activations everything is f32 at full precision; with bf16 ones the widened weight is
bf16, which XLA gives to its own matrix products, and the sum is f32. Knows no block sizes and promises no order of
sums.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quant_matmul import packing

E4M3_MAX = 448.0
FP8_BLOCK = 128  # inputs that share an activation scale where weights have scales of blocks


def int8_matmul(x: jax.Array, words: jax.Array, scale: jax.Array, *, out_dtype: Any) -> jax.Array:
    wide = packing.unpack(words, 8).astype(x.dtype)  # exact: the scale is applied to the sum
    return (_project(x, wide) * scale).astype(out_dtype)


def int4_matmul(
    x: jax.Array, words: jax.Array, scale: jax.Array, zero: jax.Array | None, *, out_dtype: Any
) -> jax.Array:
    return _project(x, int4_weight(words, scale, zero).astype(x.dtype)).astype(out_dtype)


def int4_weight(words: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
    """f32[N, K]: scale * (q - zero)."""
    values = packing.unpack(words, 4, signed=zero is None).astype(jnp.float32)
    N, K = values.shape
    grouped = values.reshape(N, scale.shape[0], -1)
    if zero is not None:
        grouped = grouped - zero.T[:, :, None].astype(jnp.float32)
    return (grouped * scale.T[:, :, None].astype(jnp.float32)).reshape(N, K)


def fp8_matmul(
    x: jax.Array, weight: jax.Array, scale: jax.Array, x_scale: jax.Array | None, *, out_dtype: Any
) -> jax.Array:
    narrow, x_scales = narrowed(x, scale.ndim == 2, x_scale)
    if scale.ndim == 1:
        # Products of e4m3 numbers are exact in f32, and XLA knows them as a matrix product of its own.
        contract = (((1,), (1,)), ((), ()))
        total = jax.lax.dot_general(narrow, weight, contract, preferred_element_type=jnp.float32)
        return (total * x_scales[:, None] * scale).astype(out_dtype)
    (M, K), N = x.shape, weight.shape[0]
    narrow = jax.lax.optimization_barrier(narrow)  # XLA on a GPU leaves a rounding out that is widened again
    wide_x = narrow.astype(jnp.float32).reshape(M, -1, FP8_BLOCK) * x_scales.T[:, :, None]
    wide = weight.astype(jnp.float32).reshape(N, -1, FP8_BLOCK) * scale.T[:, :, None]
    working = jnp.float32 if x.dtype == jnp.float32 else jnp.bfloat16
    return _project(wide_x.reshape(M, K).astype(working), wide.reshape(N, K).astype(working)).astype(out_dtype)


def narrowed(x: jax.Array, by_block: bool, x_scale: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """x in e4m3 and its scales: f32[M], or f32[K / 128, M] by blocks. A given scale is one for all rows."""
    wide = x.astype(jnp.float32)
    M, K = x.shape
    if by_block:
        parts = wide.reshape(M, K // FP8_BLOCK, FP8_BLOCK)
        scales = _scale_of(jnp.abs(parts).max(axis=2))
        narrow = (parts / scales[:, :, None]).reshape(M, K)
        return narrow.astype(jnp.float8_e4m3fn), scales.T
    scales = _scale_of(jnp.abs(wide).max(axis=1)) if x_scale is None else jnp.broadcast_to(x_scale, (M,))
    narrow = jnp.clip(wide / scales[:, None], -E4M3_MAX, E4M3_MAX)
    return narrow.astype(jnp.float8_e4m3fn), scales


def _scale_of(highest: jax.Array) -> jax.Array:
    return jnp.where(highest > 0, highest, 1.0) / E4M3_MAX


def _project(x: jax.Array, weight: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, precision=precision, preferred_element_type=jnp.float32)
