"""The GPU kernels of this room on a CPU, for tests: Pallas's interpreter, and draw.cu's threads as fibers (emulator.h).

In and out as the kernels.
"""

from __future__ import annotations

import ctypes
from typing import Any

import jax

from pallas_kernels.compiled import GXX, built, once
from pallas_kernels.sampling import adjust, cuda, triton

MOST_ROWS = 24
MOST_EMULATED = 64


def sample(*arrays: jax.Array, truncates: bool = True) -> jax.Array:
    """triton.sample, interpreted."""
    if arrays[0].shape[0] > MOST_ROWS:
        raise NotImplementedError(f"{arrays[0].shape[0]} rows would keep the interpreter busy for minutes")
    return triton.sample(*arrays, truncates=truncates, interpret=True)


def adjusted(*arrays: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """adjust.adjusted, interpreted."""
    return adjust.adjusted(*arrays, interpret=True)


def greedy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """adjust.greedy, interpreted."""
    return adjust.greedy(logits, interpret=True)


def draw(*arrays: jax.Array, truncates: bool = True) -> tuple[jax.Array, jax.Array]:
    """cuda.draw, emulated."""
    del truncates
    if arrays[0].shape[0] > MOST_EMULATED:
        raise NotImplementedError(f"{arrays[0].shape[0]} rows would keep the emulator busy for minutes")
    cuda.refuse(arrays[0])
    target = f"{cuda.TARGET}_emulated"
    cuda.register(library(), target, "cpu")
    return cuda.call(target, cuda.BLOCKS, *arrays)


@once
def library() -> ctypes.CDLL:
    return ctypes.cdll.LoadLibrary(str(built(cuda.SOURCE, cuda.INCLUDES, (*GXX, "-DJAXLLM_EMULATED"))))
