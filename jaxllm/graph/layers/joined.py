"""What lies between two attentions, a product at a time, with each residual sum and the norm behind it as one op.

In and out as `decoder.plainly`, with the op bound first. With `parts`, a few rows' products that end in such an op, or
in attention, stay the partial sums they are computed in, and the op adds them up: a launch less each.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from jaxllm.graph.layers.linear import in_parts, linear
from jaxllm.graph.layers.mlp import MLP
from jaxllm.graph.models.decoder import Layer, plainly

# add_norm, or a jitted form of it
AddNorm = Callable[..., tuple[jax.Array, jax.Array]]


def joined(
    add_norm: AddNorm, parts: bool, layer: Layer, following: Layer | None, x: jax.Array, mixed: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """From one attention to the next."""
    if x.ndim != 2:
        return plainly(layer, following, x, mixed)
    attention, mlp = layer.attention, layer.mlp
    o_bias = None if attention.o_bias is None else attention.o_bias[...]
    delta = _product(mixed, attention.o[...], o_bias, parts)
    x, read = add_norm(x, delta, layer.norms[...], 1, eps=layer.norm_eps)
    if isinstance(mlp, MLP) and following is not None:
        down_bias = None if mlp.down_bias is None else mlp.down_bias[...]
        delta = _product(mlp.hidden(read), mlp.down[...], down_bias, parts)
    else:
        delta = mlp(read)
    if following is None:
        return x + delta, None
    x, read = add_norm(x, delta, following.norms[...], 0, eps=following.norm_eps)
    qkv = in_parts(read, following.attention.qkv[...]) if parts else None
    return x, following.attention.project(read) if qkv is None else qkv


def _product(x: jax.Array, weight: jax.Array, bias: jax.Array | None, parts: bool) -> jax.Array:
    found = in_parts(x, weight) if parts and bias is None else None
    return linear(x, weight, bias) if found is None else found
