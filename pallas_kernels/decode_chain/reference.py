"""The chain in plain jnp: what the kernel must agree with, and what runs where no kernel accepts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.decode_chain.api import Dense, Following


def decode_chain(
    x: jax.Array, mixed: jax.Array, layer: Dense, following: Following | None, *, eps: float
) -> tuple[jax.Array, jax.Array | None]:
    x = x + _linear(mixed, layer.o, layer.o_bias)
    gate_up = _linear(rms_norm(x, layer.norms[1], eps), layer.gate_up, None)
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    x = x + _linear((jax.nn.silu(gate) * up).astype(x.dtype), layer.down, None)
    if following is None:
        return x, None
    return x, _linear(rms_norm(x, following.norms[0], eps), following.qkv, following.bias)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)


def _linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    out = jax.lax.dot_general(
        x.astype(weight.dtype), weight, contract, precision=precision, preferred_element_type=jnp.float32
    )
    return (out if bias is None else out + bias.astype(jnp.float32)).astype(x.dtype)
