"""The product under Pallas's interpreter, with race detection, by one program (see decode_chain/interpreted.py)."""

from __future__ import annotations

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.matmul import mosaic_sm90
from pallas_kernels.matmul.streamed_sm90 import Blocks

MOST_WEIGHTS = 2**19


def matmul(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    if weight.size > MOST_WEIGHTS:
        raise NotImplementedError(f"a weight of {weight.shape} would keep the interpreter busy for minutes")
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return mosaic_sm90.matmul(x, weight, bias, blocks=Blocks(programs=1, slots=4, x_slots=3), interpret=interpret)
