"""Matrix products with weights stored [out, in]; the accumulator is f32 whatever the weights are.

In: activations [..., in] and a weight leaf. Out: [..., out]. This is the one place where a weight's leaf type
chooses its matmul; models call `linear` and `project` and never look at a dtype.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def project(x: Float[Array, "... I"], weight: Float[Array, "O I"]) -> Float[Array, "... O"]:
    """x @ weight.T in f32, not cast back."""
    # A GPU would run f32 operands as TF32 by default: three digits, not seven.
    precision = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, precision=precision, preferred_element_type=jnp.float32)


def linear(
    x: Float[Array, "... I"], weight: Float[Array, "O I"], bias: Float[Array, " O"] | None = None
) -> Float[Array, "... O"]:
    """x @ weight.T + bias, cast back to x's dtype after the bias."""
    out = project(x, weight)
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    return out.astype(x.dtype)
