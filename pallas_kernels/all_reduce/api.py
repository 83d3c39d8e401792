"""The sum of one array a device over devices of one host: argument checks, then the best implementation that accepts.

In: an array inside shard_map, and the mesh axes to sum over. Out: the sum, on every one of those devices. Does not
know what is summed, nor the mesh beyond the axes' names.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch, imported, register

register("all_reduce", "reference", imported("pallas_kernels.all_reduce.reference:all_reduce"))


def all_reduce(
    x: jax.Array,
    axes: str | tuple[str, ...],
    *,
    implementation: str | None = None,
    platform: str | None = None,
) -> jax.Array:
    """x summed over the devices along `axes`."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"all_reduce sums floating-point arrays, not {x.dtype}")
    if not axes:
        raise ValueError("all_reduce needs the name of at least one mesh axis")
    return dispatch("all_reduce", implementation=implementation, platform=platform)(x, axes)
