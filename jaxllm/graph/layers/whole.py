"""All layers of a decode step as one op, where they are plain: dense, alike, attending to everything. Weights may be
quantised, as far as nothing about them is odd. Steps of few rows read twins of the weights in 12 bits, where there are.

In: a model, the residual stream after the embedding, a step's rows and the pages. Out: the logits and the pages, or the
residual stream where the head is not plain; None where a layer is of another kind or no kernel takes this shape. Then
the layers run one by one.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.graph.inputs import StepInputs
from jaxllm.graph.kv_cache import KVCache
from jaxllm.graph.layers.mlp import MLP
from jaxllm.graph.layers.rope import rotations
from jaxllm.graph.models.decoder import Decoder, Layer
from jaxllm.graph.quant.cutting import INPUT_TILE, OUTPUT_TILE
from jaxllm.graph.quant.leaf import Fp8Weight, Int4Weight, Int8Weight, QuantisedWeight
from pallas_kernels.decode_layers.api import Few, Head, LayerWeights, Weight, decode_layers
from sharding.collectives import ALONE, Exchange, Spread

log = logging.getLogger(__name__)
PACKED_ROWS = range(9, 33)  # with fewer, another kernel reads bf16 in less time; with more, so does the same


class Through(NamedTuple):
    out: jax.Array  # f32[B, V]: logits; or [B, D] after the last layer
    headed: bool  # the former
    kv: KVCache


Groups = tuple[tuple[int, ...], ...]


def sharing(exchange: Exchange) -> Groups | None:
    """Groups of devices that share all layers, none where one has them all; None where they meet in other ways."""
    if exchange is ALONE:
        return ()
    if isinstance(exchange, Spread) and not (exchange.scatter or exchange.apart or exchange.dispatch):
        return exchange.groups
    return None


def through_all(
    model: Decoder,
    x: jax.Array,
    inputs: StepInputs,
    kv: KVCache,
    groups: Groups,
    by: str | None = None,
    packed: dict[str, Any] | None = None,
) -> Through | None:
    """One query token a row. x[B, D]. `groups`: as `sharing` says; `by`: the one implementation to ask; `packed`: twins
    of the weights, as jaxllm.graph.weights.packed makes them."""
    config = model.config
    found = [_weights(layer) for layer in model.layers]
    layers = [layer for layer in found if layer is not None]
    if len(layers) < len(found) or any(config.windows) or kv[0][0].dtype == jnp.float8_e4m3fn:
        log.info("layers run one by one: a window, fp8 pages, or weights of another form than the kernel's")
        return None
    cosines, sines = rotations(inputs.positions, config.rope, config.head_dim)
    rows = inputs.page_table, inputs.kv_lens, cosines, sines
    run = functools.partial(
        decode_layers, eps=config.norm_eps, scale=config.attention_scale, groups=groups, implementation=by
    )
    forms = [(layers, None if groups else _head(model, layers[0].qkv))]
    if packed is not None and len(x) in PACKED_ROWS:
        forms = [(_twins(layers, packed), forms[0][1]), *forms]
    done = None
    for number, (form, head) in enumerate(forms, start=1):
        if done is None:
            try:
                out, pages = run(x, form, kv, *rows, head=head)
                done = Through(out, head is not None, pages)
            except* NotImplementedError as reasons:
                instead = "layers run one by one" if number == len(forms) else f"{len(x)} rows: not with these twins"
                log.info("%s: %s", instead, "; ".join(map(str, reasons.exceptions)))
    return done


def _twins(layers: list[LayerWeights], packed: dict[str, Any]) -> list[LayerWeights]:
    return [
        replace(layer, **{name: Few(words, None) for name, words in packed["layers"][number].items()})
        for number, layer in enumerate(layers)
    ]


def _head(model: Decoder, beside: Weight) -> Head | None:
    """None where it is not of the kind of the layers' weights, such as `beside`."""
    table = model.embed if model.head is None else model.head
    assert table is not None, "a part without its last end"
    assert model.final_norm is not None, "a part without its last end"
    weight = _plain(table[...])
    if weight is not None and _kind(weight) == _kind(beside):
        return Head(model.final_norm[...], weight)
    log.info("final norm and head run by themselves: the head's weights are not of the layers' kind")
    return None


def _kind(weight: Weight) -> str:
    return weight.kind if isinstance(weight, Few) else "plain"


def _plain(weight: jax.Array | QuantisedWeight) -> Weight | None:
    """As the op takes it; None where a leaf has padding, zero points, an order, or scales of blocks or activations."""
    if isinstance(weight, jax.Array):
        return weight
    if weight.outputs % OUTPUT_TILE or weight.inputs % INPUT_TILE:
        return None
    match weight:
        case Int4Weight(zero=None, order=None) if weight.scale.dtype in (jnp.bfloat16, jnp.float16):
            return Few(weight.words, weight.scale)
        case Int8Weight():
            return Few(weight.words, weight.scale)
        case Fp8Weight(x_scale=None, along=()) if weight.scale.ndim == 1:
            return Few(weight.values, weight.scale)
        case _:
            return None


def _weights(layer: Layer) -> LayerWeights | None:
    attention, mlp = layer.attention, layer.mlp
    if not isinstance(mlp, MLP) or mlp.gate_up_bias is not None:
        return None
    qkv, o, gate_up, down = map(_plain, (attention.qkv[...], attention.o[...], mlp.gate_up[...], mlp.down[...]))
    if qkv is None or o is None or gate_up is None or down is None:
        return None
    given = attention.qkv_bias, attention.o_bias, attention.qk_norms
    qkv_bias, o_bias, qk_norms = (None if each is None else each[...] for each in given)
    return LayerWeights(qkv, o, layer.norms[...], gate_up, down, qkv_bias, o_bias, qk_norms)
