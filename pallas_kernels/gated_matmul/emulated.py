"""gated_matmul.cu on a CPU, for tests: the same source, its threads as fibers in random turns.

Tiles land late, products are done when they are waited for, memory nobody wrote is NaN, and a wait that nobody will end
is an error.
"""

from __future__ import annotations

import ctypes

import jax

from pallas_kernels.compiled import GXX, built, once
from pallas_kernels.gated_matmul import cuda

TARGET = "jaxllm_gated_matmul_emulated"
BLOCKS = 4  # multiprocessors of the machine that is played
MOST_PRODUCTS = 2**25


def gated_matmul(x: jax.Array, gate_up: jax.Array, cut: cuda.Cut | None = None) -> jax.Array:
    """See api.gated_matmul; `cut` instead of the one that the kernel would choose."""
    cuda.refuse(x, gate_up)
    if x.shape[0] * gate_up.size > MOST_PRODUCTS:
        raise NotImplementedError(f"{x.shape} by {gate_up.shape} would keep the emulator busy for minutes")
    cuda.register(library(), TARGET, "cpu")
    return cuda.call(TARGET, BLOCKS, x, gate_up, cut or cuda.cut_for(x.shape[0], gate_up.shape[0] // 2, BLOCKS))


@once
def library() -> ctypes.CDLL:
    return cuda.load(built(cuda.SOURCE, cuda.INCLUDES, (*GXX, "-DJAXLLM_EMULATED")))
