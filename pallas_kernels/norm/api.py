"""Residual sum and RMS norm in one op: argument checks, then the best implementation that accepts.

In: the residual stream, what a block adds to it, a layer's norm weights. Out: the new stream, and it normed. This
module knows no layers. A layer's norm weights come as one array: XLA keeps a kernel that gets a slice out of its CUDA
graphs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch, imported, register

_ROOM = "pallas_kernels.norm"
register("norm.add", "triton", imported(f"{_ROOM}.triton:add_norm"), platforms=("gpu",))
register("norm.add", "triton_interpret", imported(f"{_ROOM}.interpreted:add_norm"), platforms=("interpret",))
register("norm.add", "reference", imported(f"{_ROOM}.reference:add_norm"))


def add_norm(
    x: jax.Array,  # [T, D]
    delta: jax.Array,  # [T, D], or f32[S, T, D]: partial sums
    weights: jax.Array,  # [n, D]
    which: int,  # of the weights
    *,
    eps: float,
    implementation: str | None = None,
    platform: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-> (x + delta, RMS norm of that times weights[which]), both [T, D] in x's dtype; arithmetic is f32.

    Delta is rounded to x's dtype before the sum, and the sum before the norm.
    """
    if x.ndim != 2 or 0 in x.shape or delta.shape[-2:] != x.shape or delta.ndim not in (2, 3) or 0 in delta.shape:
        raise ValueError(f"need x[T, D] and delta[T, D] or [S, T, D], not empty; got {x.shape}, {delta.shape}")
    if delta.dtype != (x.dtype if delta.ndim == 2 else jnp.float32):
        raise ValueError(f"delta must be {x.dtype} like x, or float32 in parts; got {delta.dtype}")
    if weights.ndim != 2 or weights.shape[1] != x.shape[1] or not 0 <= which < weights.shape[0]:
        raise ValueError(f"weights must be [n, D = {x.shape[1]}] with n > {which}, got {weights.shape}")
    run = dispatch("norm.add", implementation=implementation, platform=platform)
    return run(x, delta, weights, which, eps=eps)
