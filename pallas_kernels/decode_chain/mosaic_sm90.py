"""The chain between two attentions as stages of the streamed kernel (matmul/streamed_sm90.py): one launch a layer.

In: arrays, already checked by api.py. Out: the residual stream and the next layer's qkv. A row's bits depend neither on
the other rows nor on their number.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.decode_chain.api import Dense, Following
from pallas_kernels.matmul.streamed_sm90 import Blocks, Stage, blocks_for, chain, padded, refuse


def decode_chain(
    x: jax.Array,  # [T, D]
    mixed: jax.Array,  # [T, O]
    layer: Dense,
    following: Following | None,
    *,
    eps: float,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array | None]:
    """x after the layer, and the next layer's qkv."""
    weights = [layer.o, layer.gate_up, layer.down]
    norms: list[jax.Array | None] = [layer.norm, None, None]
    biases = [layer.o_bias, None, None]
    if following is not None:
        weights.append(following.qkv)
        norms[2:] = [following.norm, None]
        biases.append(following.bias)
    for array in (x, mixed, *weights, *norms, *biases):
        if array is not None and array.dtype != jnp.bfloat16:
            raise NotImplementedError(f"everything must be bfloat16, got {array.dtype}")
    D, F = layer.down.shape
    stages = (
        Stage(0, mixed.shape[1], D, residual=1, normed=True, bias=layer.o_bias is not None),
        Stage(-1, D, F, gated=True, scaled_by=0),
        Stage(-2, F, D, residual=-1, normed=following is not None),
    )
    if following is not None:
        stages += (Stage(-3, D, following.qkv.shape[0], scaled_by=2, bias=following.bias is not None),)
    default = blocks or blocks_for(x.shape[0])
    refuse(x.shape[0], stages, default)
    key = f"D{D} F{F} rows {padded(x.shape[0])}"
    blocks = blocks or tuning.choose("decode_chain/mosaic_sm90", key, default)
    outs = chain([mixed, x], weights, norms, biases, stages, eps=eps, blocks=blocks, interpret=interpret)
    return outs[2][0], outs[3][0] if following is not None else None
