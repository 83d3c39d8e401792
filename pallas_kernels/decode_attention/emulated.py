"""decode_attention.cu on a CPU: the same source, its threads as fibers run in random turns (see emulator.h).

For tests: slow, but indices, copies, barriers and folds are the kernel's own. Copies land late, memory nobody wrote
is NaN, and a wait that nobody will end is an error. `machine` plays other numbers of multiprocessors and slots.
"""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.compiled import GXX, built, once
from pallas_kernels.decode_attention import cuda

PROGRAMS, SLOTS = 3, 5


@once
def machine(programs: int = PROGRAMS, slots: int = SLOTS) -> cuda.Kernel:
    flags = ("-DJAXLLM_EMULATED", f"-DJAXLLM_SLOTS={slots}")
    loaded, target = cuda.load(built(cuda.SOURCE, cuda.INCLUDES, (*GXX, *flags))), "_".join((cuda.TARGET, *flags[1:]))
    cuda.register(loaded, target, "cpu")
    return cuda.Kernel(target, loaded, programs)


def decode_heads(*arrays: Any, **options: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """cuda.decode_heads, emulated."""
    return cuda.decode_heads(*arrays, kernel=machine(), **options)


def paged_attention_decode(*arrays: jax.Array, **options: Any) -> jax.Array:
    """cuda.paged_attention_decode, emulated."""
    return cuda.paged_attention_decode(*arrays, kernel=machine(), **options)


def decode_among(*arrays: jax.Array, **options: Any) -> jax.Array:
    """cuda.decode_among, emulated."""
    return cuda.decode_among(*arrays, kernel=machine(), **options)
