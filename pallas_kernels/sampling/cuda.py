"""From logits to tokens as one CUDA kernel (draw.cu), called through XLA's FFI and captured in the step's CUDA graph.

In: arrays that api.py has checked. Out: tokens, and which rows are bad. Built by nvcc on first use; declines without
it. A row lies in the shared memory of a cluster of BLOCKS multiprocessors, which is how long a vocabulary may be.
ADR 0029 says why this is no Pallas kernel. How many blocks there are is part of the bits.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compiled import NVCC, built, once

HERE = Path(__file__).parent
SOURCE = HERE / "draw.cu"
INCLUDES = (
    HERE / "cluster.h",
    HERE / "draw_launch.h",
    HERE.parent / "decode_layers" / "primitives.h",
    HERE.parent / "decode_layers" / "emulator.h",
)
TARGET = "jaxllm_sampling_draw"
BLOCKS = 8  # of a cluster: the most that every device takes
LONGEST = 48 * 1024 * BLOCKS  # tokens: 4 bytes each, and room for histogram and candidates


def draw(*arrays: jax.Array, truncates: bool = True, blocks: int = BLOCKS) -> tuple[jax.Array, jax.Array]:
    """See api.draw; what rows ask for decides, so `truncates` does not matter."""
    del truncates
    refuse(arrays[0])
    register(library())
    return call(TARGET, blocks, *arrays)


def refuse(logits: jax.Array | jax.ShapeDtypeStruct) -> None:
    """NotImplementedError for what the kernel does not do."""
    if logits.shape[1] > LONGEST:
        raise NotImplementedError(f"a vocabulary of {logits.shape[1]} tokens, at most {LONGEST}")


def call(target: str, blocks: int, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    B = arrays[0].shape[0]
    results = [jax.ShapeDtypeStruct((B,), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.bool_)]
    tokens, bad = jax.ffi.ffi_call(target, results)(*arrays, blocks=np.int64(blocks))
    return tokens, bad


@once
def library() -> ctypes.CDLL:
    return ctypes.cdll.LoadLibrary(str(built(SOURCE, INCLUDES, NVCC)))


@once
def register(loaded: ctypes.CDLL, target: str = TARGET, platform: str = "CUDA") -> None:
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(loaded.jaxllm_sampling_draw), platform=platform)
