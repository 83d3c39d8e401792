"""The GPU kernel of this room under Pallas's interpreter, for tests on a CPU. In and out as the kernel."""

from __future__ import annotations

import jax

from pallas_kernels.norm import triton


def add_norm(
    x: jax.Array, delta: jax.Array, weights: jax.Array, which: int, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """triton.add_norm, interpreted."""
    return triton.add_norm(x, delta, weights, which, eps=eps, interpret=True)
