"""x @ w.T of few rows with a weight stored [out, in]: argument checks, then the best implementation that accepts.

In: activations, a weight, an optional bias. Out: the product in x's dtype; sums and the bias's addition are f32. The
streamed kernel gives a row the same bits whatever the other rows and their number; XLA's products, which are as fast or
faster one at a time, do not promise that, so they are the default and the kernel is asked for by name.
"""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import dispatch, imported, register

_ROOM = "pallas_kernels.matmul"
register("matmul", "reference", imported(f"{_ROOM}.reference:matmul"), platforms=("cpu", "gpu"))
register("matmul", "mosaic_sm90", imported(f"{_ROOM}.mosaic_sm90:matmul"), platforms=("gpu",))
register("matmul", "mosaic_sm90_interpret", imported(f"{_ROOM}.interpreted:matmul"), platforms=("interpret",))


def matmul(
    x: jax.Array,  # [T, I]
    weight: jax.Array,  # [O, I]
    bias: jax.Array | None = None,  # [O]
    *,
    implementation: str | None = None,
    platform: str | None = None,
) -> jax.Array:
    """-> [T, O]"""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or 0 in (*x.shape, *weight.shape):
        raise ValueError(f"need x[T, I] and weight[O, I], none empty; got {list(x.shape)} and {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}] for weight {list(weight.shape)}, got {list(bias.shape)}")
    return dispatch("matmul", implementation=implementation, platform=platform)(x, weight, bias)
