"""The layers in plain jnp, from the references of their parts: what the kernel must agree with.

Weights in few bits are widened to f32, those without loss to bf16, and multiplied with activations as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import bf12
from pallas_kernels.decode_chain.api import Dense, Following
from pallas_kernels.decode_chain.reference import decode_chain, rms_norm
from pallas_kernels.decode_layers.api import Few, Head, LayerWeights, Pages, Weight
from pallas_kernels.page_write.reference import page_write
from pallas_kernels.paged_attention.reference import paged_attention_decode
from pallas_kernels.quant_matmul import packing
from pallas_kernels.quant_matmul.reference import int4_weight


def decode_layers(
    x: jax.Array,
    layers: Sequence[LayerWeights],
    pages: Sequence[Pages],
    page_table: jax.Array,
    kv_lens: jax.Array,
    cosines: jax.Array,
    sines: jax.Array,
    *,
    eps: float,
    scale: float,
    head: Head | None = None,
    groups: tuple[tuple[int, ...], ...] = (),
) -> tuple[jax.Array, list[Pages]]:
    if groups:
        raise NotImplementedError("layers that devices share")
    P, K, page_size, H = pages[0][0].shape
    B, NH = x.shape[0], layers[0].o.shape[1]
    position = jnp.maximum(kv_lens - 1, 0)
    page = jnp.take_along_axis(page_table, (position // page_size)[:, None], axis=1)[:, 0]
    slots = jnp.where(kv_lens > 0, page * page_size + position % page_size, P * page_size)
    first = layers[0]
    qkv: jax.Array | None = _linear(rms_norm(x, first.norms[0], eps), widened(first.qkv), first.qkv_bias)
    written = list[Pages]()
    for layer, own, following in zip(layers, pages, [*layers[1:], None], strict=True):
        assert qkv is not None, "only the last layer has no next"
        q, k, v = jnp.split(qkv, [NH, NH + K * H], axis=1)
        q, k, v = q.reshape(B, -1, H), k.reshape(B, K, H), v.reshape(B, K, H)
        if layer.qk_norms is not None:
            q, k = rms_norm(q, layer.qk_norms[0], eps), rms_norm(k, layer.qk_norms[1], eps)
        q, k = _rotate(q, cosines, sines), _rotate(k, cosines, sines)
        written.append(page_write(*own, k, v, slots))
        mixed = paged_attention_decode(
            q, *written[-1], page_table, kv_lens, scale=scale, window=None, soft_cap=None
        ).reshape(B, NH)
        dense = Dense(widened(layer.o), layer.norms, gates_and_ups(layer), widened(layer.down), layer.o_bias)
        after = None if following is None else Following(following.norms, widened(following.qkv), following.qkv_bias)
        x, qkv = decode_chain(x, mixed, dense, after, eps=eps)
    return x if head is None else _product(rms_norm(x, head.norm, eps), widened(head.table)), written


def widened(weight: Weight) -> jax.Array:
    """[outputs, inputs]: a plain weight as it is, bf12 as the bf16 that it was, others in f32."""
    if not isinstance(weight, Few):
        return weight
    if weight.scale is None:
        return bf12.unpack(weight.values)
    if weight.kind == "int4":
        return int4_weight(weight.values, weight.scale, None)
    values = packing.unpack(weight.values, 8) if weight.kind == "int8" else weight.values
    return values.astype(jnp.float32) * weight.scale[:, None]


def gates_and_ups(layer: LayerWeights) -> jax.Array:
    """[2F, D]: all gates, then all ups."""
    turned = isinstance(layer.gate_up, Few) and layer.gate_up.kind == "bf12"
    return bf12.in_order(widened(layer.gate_up)) if turned else widened(layer.gate_up)


def _linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    out = _product(x, weight)
    return (out if bias is None else out + bias.astype(jnp.float32)).astype(x.dtype)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    x = x.astype(weight.dtype)
    return jax.lax.dot_general(
        x, weight, (((x.ndim - 1,), (1,)), ((), ())), precision, preferred_element_type=jnp.float32
    )


def _rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    c, s = cosines[:, None], sines[:, None]
    return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1).astype(x.dtype)
