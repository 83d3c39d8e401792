"""Matrix products with weights stored [out, in]; the accumulator is f32 whatever the weights are.

In: activations [..., in] and a weight leaf: an array, or a quantised weight that brings its own product. Out:
[..., out]. This is the one place where a weight's leaf type chooses its matmul; models call `linear` and `project` and
never look at a dtype.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.graph.quant.leaf import QuantisedWeight
from pallas_kernels.gated_matmul.api import gated_matmul

# How XLA cuts the products of a few rows on a Hopper GPU (benchmarks/step_kernels.py shows it), so that it need not.
FEW_ROWS, LEAST_DEPTH = 128, 256
PARTS = ((4096, 8), (8192, 4))  # outputs up to so many: parts

_gated_matmul = jax.jit(gated_matmul)  # layers of one shape share one trace


def project(x: Float[Array, "... I"], weight: Float[Array, "O I"] | QuantisedWeight) -> Float[Array, "... O"]:
    """x @ weight.T in f32, not cast back."""
    return weight.project(x) if isinstance(weight, QuantisedWeight) else _project(x, weight)


@jax.custom_vjp
def _project(x: Float[Array, "... I"], weight: Float[Array, "O I"]) -> Float[Array, "... O"]:
    """x @ weight.T in f32, not cast back."""
    # A GPU would run f32 operands as TF32 by default: three digits, not seven.
    precision = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, precision=precision, preferred_element_type=jnp.float32)


def _forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _project(x, weight), (x, weight)


def _backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    # JAX's own rule would multiply the f32 gradient with bf16 operands, which is an f32 product on a GPU.
    x, weight = saved
    narrow = gradient.astype(weight.dtype)
    lead = tuple(range(x.ndim - 1))
    to_weight = jax.lax.dot_general(narrow, x, ((lead, lead), ((), ())), preferred_element_type=jnp.float32)
    return _project(narrow, weight.T).astype(x.dtype), to_weight.astype(weight.dtype)


_project.defvjp(_forward, _backward)


def linear(
    x: Float[Array, "... I"], weight: Float[Array, "O I"] | QuantisedWeight, bias: Float[Array, " O"] | None = None
) -> Float[Array, "... O"]:
    """x @ weight.T + bias, cast back to x's dtype after the bias."""
    if bias is None and isinstance(weight, QuantisedWeight):
        return weight.project(x, x.dtype)  # its kernel casts
    if bias is None and not isinstance(weight, QuantisedWeight) and x.dtype == weight.dtype != jnp.float32:
        # The matmul sums in f32 and rounds its result itself: a pass over f32 results costs 10% of a long prefill.
        contract = (((x.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(x, weight, contract, preferred_element_type=x.dtype)
    out = project(x, weight)
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    return out.astype(x.dtype)


def gated(
    x: Float[Array, "... I"], weight: Float[Array, "O I"] | QuantisedWeight, bias: Float[Array, " O"] | None = None
) -> Float[Array, "... F"]:
    """silu(gate) * up of x, formed in f32 and cast once; the weight's rows are all of gate, then all of up."""
    if bias is None and not isinstance(weight, QuantisedWeight) and x.dtype == weight.dtype:
        return _gated_matmul(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[0] // 2)
    gate, up = jnp.split(linear(x, weight, bias).astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(x.dtype)


def in_parts(x: Float[Array, "T I"], weight: Float[Array, "O I"] | QuantisedWeight) -> Float[Array, "S T O"] | None:
    """x @ weight.T as f32 partial sums over S cuts of I; None where it is better whole."""
    if isinstance(weight, QuantisedWeight) or weight.dtype == jnp.float32 or x.shape[0] > FEW_ROWS:
        return None
    outputs, depth = weight.shape
    count = next((parts for most, parts in PARTS if outputs <= most), 1)
    while count > 1 and (depth % count or depth // count < LEAST_DEPTH):
        count //= 2
    if count == 1:
        return None
    cut = x.reshape(x.shape[0], count, -1), weight.reshape(outputs, count, -1)
    return jax.lax.dot_general(*cut, (((2,), (2,)), ((1,), (1,))), preferred_element_type=jnp.float32)
