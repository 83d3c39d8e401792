"""The chain's kernel under Pallas's interpreter, with race detection, for tests on a CPU.

The interpreter has no semaphores, so one program does all tiles: what programs hand each other (pieces of tiles, the
ends of stages) is only tested on a GPU.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_chain import mosaic_sm90
from pallas_kernels.decode_chain.api import Dense, Following
from pallas_kernels.matmul.streamed_sm90 import Blocks

MOST_WEIGHTS = 2**19  # numbers in all weights


def decode_chain(
    x: jax.Array, mixed: jax.Array, layer: Dense, following: Following | None, **options: Any
) -> tuple[jax.Array, jax.Array | None]:
    if layer.gate_up.size + layer.down.size > MOST_WEIGHTS:
        raise NotImplementedError(f"a gate_up of {layer.gate_up.shape} would keep the interpreter busy for minutes")
    blocks = Blocks(programs=1, slots=3, x_slots=3)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return mosaic_sm90.decode_chain(x, mixed, layer, following, blocks=blocks, interpret=interpret, **options)
