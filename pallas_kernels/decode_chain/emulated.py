"""decode_chain.cu on a CPU, for tests: the same source, its threads as fibers in random turns (emulator.h).

Tiles land late, products are done when they are waited for, memory nobody wrote is NaN, and a wait that nobody will end
is an error.
"""

from __future__ import annotations

import ctypes
from typing import Any

import jax

from pallas_kernels.compiled import GXX, built, once
from pallas_kernels.decode_chain import cuda
from pallas_kernels.decode_chain.api import Dense, Following

TARGET = "jaxllm_decode_chain_emulated"
BLOCKS = 8  # multiprocessors of the machine that is played
MOST_WEIGHTS = 2**19  # numbers in all weights


def decode_chain(
    x: jax.Array, mixed: jax.Array, layer: Dense, following: Following | None, **options: Any
) -> tuple[jax.Array, jax.Array | None]:
    """See api.decode_chain."""
    cuda.refuse(x, mixed, layer, following)
    if layer.gate_up.size + layer.down.size > MOST_WEIGHTS:
        raise NotImplementedError(f"a gate_up of {layer.gate_up.shape} would keep the emulator busy for minutes")
    cuda.register(library(), TARGET, "cpu")
    return cuda.call(TARGET, library(), BLOCKS, x, mixed, layer, following, **options)


@once
def library() -> ctypes.CDLL:
    return cuda.load(built(cuda.SOURCE, cuda.INCLUDES, (*GXX, "-DJAXLLM_EMULATED")))
