"""RMS norm in plain jnp, alone and after a sum. In: activations in any float dtype. Out: the same; sums are f32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.named_scope("norm")
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x[..., D] over its root mean square, times weight[D]."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)


def add_norm(
    x: jax.Array,  # [T, D]
    delta: jax.Array,  # [T, D], or f32[S, T, D]: partial sums
    weights: jax.Array,  # [n, D]
    which: int,
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """See api.add_norm."""
    x = x + summed(delta, x.ndim, None, x.dtype)
    return x, rms_norm(x, weights[which], eps)


def summed(product: jax.Array, ndim: int, bias: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A product as it is, or the sum of its parts, plus the bias, rounded once."""
    if product.ndim == ndim:
        return product
    total = product.sum(axis=0)
    return (total if bias is None else total + bias.astype(jnp.float32)).astype(dtype)
