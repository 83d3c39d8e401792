"""The GPU kernels of this room under Pallas's interpreter, for tests on a CPU. In and out as the kernels."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.sampling import adjust, triton

MOST_ROWS = 24


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
