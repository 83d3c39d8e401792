"""The first half of a gated feed-forward block: argument checks, then the best implementation that accepts.

In: rows of activations, and gate and up as one weight stored [out, in]. Out: silu(gate) * up in the activations' dtype.
Sums are f32. This module knows no model and no meshes.
"""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import dispatch, imported, register

_ROOM = "pallas_kernels.gated_matmul"
register("gated_matmul", "cuda", imported(f"{_ROOM}.cuda:gated_matmul"), platforms=("gpu",))
register("gated_matmul", "cuda_emulated", imported(f"{_ROOM}.emulated:gated_matmul"), platforms=("interpret",))
register("gated_matmul", "reference", imported(f"{_ROOM}.reference:gated_matmul"))


def gated_matmul(
    x: jax.Array,  # [T, D]
    gate_up: jax.Array,  # [2F, D]: all of gate, then up
    *,
    implementation: str | None = None,
    platform: str | None = None,
) -> jax.Array:
    """silu(x @ gate.T) * (x @ up.T) -> [T, F] in x's dtype (SwiGLU: Shazeer 2020, "GLU variants improve transformer").

    Whether gate and up are rounded to x's dtype before they are multiplied is the implementation's.
    """
    shapes = f"got {list(x.shape)} and {list(gate_up.shape)}"
    if x.ndim != 2 or gate_up.ndim != 2 or x.shape[1] != gate_up.shape[1] or 0 in (*x.shape, *gate_up.shape):
        raise ValueError(f"need x[T, D] and gate_up[2F, D], not empty; {shapes}")
    if gate_up.shape[0] % 2:
        raise ValueError(f"gate_up must have as many rows of gate as of up; {shapes}")
    if x.dtype != gate_up.dtype:
        raise ValueError(f"x and gate_up must have one dtype, got {x.dtype} and {gate_up.dtype}")
    return dispatch("gated_matmul", implementation=implementation, platform=platform)(x, gate_up)
