"""The product in plain jnp: XLA chooses how."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    contract = (((1,), (1,)), ((), ()))
    out = jax.lax.dot_general(x, weight, contract, precision=precision, preferred_element_type=jnp.float32)
    return (out if bias is None else out + bias.astype(jnp.float32)).astype(x.dtype)
