"""The chain between two attentions as stages of the streamed kernel (matmul/streamed_sm90.py): one launch a layer.

In: arrays, already checked by api.py. Out: the residual stream and the next layer's qkv. A row's bits depend neither on
the other rows nor on their number.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_chain.api import Dense, Following
from pallas_kernels.matmul.streamed_sm90 import Blocks, Stage, blocks_for, chain, refuse


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
    norms: list[jax.Array | None] = [layer.norms, None, None]
    biases = [layer.o_bias, None, None]
    if following is not None:
        weights.append(following.qkv)
        norms[2:] = [following.norms, None]
        biases.append(following.bias)
    for array in (x, mixed, *weights, *norms, *biases):
        if array is not None and array.dtype != jnp.bfloat16:
            raise NotImplementedError(f"everything must be bfloat16, got {array.dtype}")
    D, F = layer.down.shape
    stages = (
        Stage(0, mixed.shape[1], D, residual=1, normed=1, bias=layer.o_bias is not None),
        Stage(-1, D, F, gated=True, scaled_by=0),
        Stage(-2, F, D, residual=-1, normed=None if following is None else 0),
    )
    if following is not None:
        stages += (Stage(-3, D, following.qkv.shape[0], scaled_by=2, bias=following.bias is not None),)
    blocks = blocks or blocks_for(x.shape[0])
    refuse(x.shape[0], stages, blocks)
    outs = chain([mixed, x], weights, norms, biases, stages, eps=eps, blocks=blocks, interpret=interpret)
    return outs[2][0], outs[3][0] if following is not None else None
