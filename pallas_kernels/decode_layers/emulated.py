"""decode_layers.cu on a CPU: the same source, its threads as fibers that one thread runs in random turns (emulator.h).

For tests: slow, but the indices, the barriers and the order of stages are the kernel's own. Copies land late, memory
that nobody wrote is NaN, and a wait that nobody will end is an error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import jax

from pallas_kernels.compiled import GXX, built, once
from pallas_kernels.decode_layers import cuda
from pallas_kernels.decode_layers.api import Head, LayerWeights, Pages

TARGET = "jaxllm_decode_layers_emulated"
PROGRAMS = 4  # multiprocessors of the machine that is played


def decode_layers(
    x: jax.Array,
    layers: Sequence[LayerWeights],
    pages: Sequence[Pages],
    *rows: jax.Array,
    eps: float,
    scale: float,
    head: Head | None = None,
) -> tuple[jax.Array, list[Pages]]:
    """See api.decode_layers."""
    cuda.refuse(x, layers, pages, head)
    cuda.register(library(), TARGET, "cpu")
    return cuda.call(TARGET, library(), PROGRAMS, x, layers, pages, *rows, eps=eps, scale=scale, head=head)


@once
def library() -> ctypes.CDLL:
    return cuda.load(built(cuda.SOURCE, cuda.INCLUDES, (*GXX, "-DJAXLLM_EMULATED")))
