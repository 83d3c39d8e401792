"""Residual sum and RMS norm in Pallas-Triton, a program a row; partial sums of a product are added on the way.

In: arrays as api.py checked them. Out: the new stream, and it normed. It does not know where the parts come from.

This is the lowering JAX 0.11 deprecates: the op is bound by launches (docs/adr/0026).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

WIDEST = 16384  # columns a program holds


def add_norm(
    x: jax.Array, delta: jax.Array, weights: jax.Array, which: int, *, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """See api.add_norm."""
    refuse(x, delta)
    T, D = x.shape
    row = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(
        functools.partial(_kernel, which=which, eps=eps),
        name="norm_add",
        grid=(T,),
        in_specs=[pl.no_block_spec] * 3,
        out_specs=[pl.no_block_spec] * 2,
        out_shape=[row, row],
        compiler_params=plt.CompilerParams(num_warps=16 if D > 2048 else 8, num_stages=1),
        interpret=interpret,
    )(x, delta, weights)


def refuse(x: jax.Array, delta: jax.Array) -> None:
    """NotImplementedError for what this implementation does not do."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x must be bfloat16 or float16, got {x.dtype}")
    if x.shape[1] > WIDEST:
        raise NotImplementedError(f"a row of {x.shape[1]} columns is more than a program holds ({WIDEST})")
    if delta.ndim == 2 and x.shape[0] > 1:
        raise NotImplementedError("XLA norms several rows in one kernel, with the sum of whole products before it")


def _kernel(x: Any, delta: Any, weights: Any, out: Any, normed: Any, *, which: int, eps: float) -> None:
    row, D = pl.program_id(0), x.shape[1]
    col = jnp.arange(pl.next_power_of_2(D))
    inside = col < D
    if len(delta.shape) == 2:
        added = plt.load(delta.at[row, col], mask=inside, other=0.0)
    else:
        added = plt.load(delta.at[0, row, col], mask=inside, other=0.0)
        for part in range(1, delta.shape[0]):
            added += plt.load(delta.at[part, row, col], mask=inside, other=0.0)
    added = added.astype(x.dtype).astype(jnp.float32)
    total = (plt.load(x.at[row, col], mask=inside, other=0.0).astype(jnp.float32) + added).astype(x.dtype)
    plt.store(out.at[row, col], total, mask=inside)
    wide = total.astype(jnp.float32)
    scale = lax.rsqrt((wide * wide).sum() / D + eps)
    weight = plt.load(weights.at[jnp.full_like(col, which), col], mask=inside, other=0.0).astype(jnp.float32)
    plt.store(normed.at[row, col], (wide * scale * weight).astype(x.dtype), mask=inside)
