"""One product as a chain of one stage (streamed_sm90.py)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.streamed_sm90 import Blocks, Stage, blocks_for, chain, refuse


def matmul(
    x: jax.Array,  # [T, I]
    weight: jax.Array,  # [O, I]
    bias: jax.Array | None,
    *,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> jax.Array:
    for array in (x, weight, bias):
        if array is not None and array.dtype != jnp.bfloat16:
            raise NotImplementedError(f"everything must be bfloat16, got {array.dtype}")
    stages = (Stage(0, x.shape[1], weight.shape[0], bias=bias is not None),)
    blocks = blocks or blocks_for(x.shape[0])
    refuse(x.shape[0], stages, blocks)
    return chain([x], [weight], [None], [bias], stages, blocks=blocks, interpret=interpret)[0][0]
