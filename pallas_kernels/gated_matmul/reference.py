"""The product by XLA, then SwiGLU.

In and out: see api.py. Gate and up are rounded to x's dtype before they are multiplied.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def gated_matmul(x: jax.Array, gate_up: jax.Array) -> jax.Array:
    """See api.gated_matmul."""
    # A GPU would run f32 operands as TF32 by default: three digits, not seven.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract = (((1,), (1,)), ((), ()))
    both = jax.lax.dot_general(x, gate_up, contract, precision=precision, preferred_element_type=x.dtype)
    gate, up = jnp.split(both.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(x.dtype)
