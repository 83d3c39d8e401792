"""What lies between two attentions as one op, where the layers are plain: dense, and their weights plain arrays.

In and out as `decoder.plainly`, with the op itself and another way bound first. Layers of other kinds, weights of leaf
types with their own matmul, and what no kernel takes go the other way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import jax

from jaxllm.graph.layers.mlp import MLP
from jaxllm.graph.models.decoder import Layer, Onward
from pallas_kernels.decode_chain.api import Dense, Following

log = logging.getLogger(__name__)

# decode_chain, or a jitted form of it
Chain = Callable[..., tuple[jax.Array, jax.Array | None]]


def chained(
    chain: Chain, otherwise: Onward, layer: Layer, following: Layer | None, x: jax.Array, mixed: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """From one attention to the next in one kernel if there is one for this."""
    dense = _dense(layer)
    after = None if following is None else _following(following)
    if dense is None or x.ndim != 2 or (following is not None and after is None):
        return otherwise(layer, following, x, mixed)
    try:
        return chain(x, mixed, dense, after, eps=layer.norm_eps)
    except* NotImplementedError as reasons:
        log.info("products one by one: %s", "; ".join(map(str, reasons.exceptions)))
    return otherwise(layer, following, x, mixed)


def _dense(layer: Layer) -> Dense | None:
    attention, mlp = layer.attention, layer.mlp
    if not isinstance(mlp, MLP) or mlp.gate_up_bias is not None:
        return None
    weights = attention.o[...], mlp.gate_up[...], mlp.down[...]
    if not all(isinstance(weight, jax.Array) for weight in weights):
        return None
    o, gate_up, down = weights
    bias = None if attention.o_bias is None else attention.o_bias[...]
    return Dense(o, layer.norms[...], gate_up, down, bias)


def _following(layer: Layer) -> Following | None:
    attention = layer.attention
    qkv = attention.qkv[...]
    if not isinstance(qkv, jax.Array):
        return None
    bias = None if attention.qkv_bias is None else attention.qkv_bias[...]
    return Following(layer.norms[...], qkv, bias)
