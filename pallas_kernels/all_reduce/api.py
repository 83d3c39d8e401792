"""The sum of one array a device over devices of one host: argument checks, then the best implementation that accepts.

In: an array inside shard_map, the mesh axes to sum over, and which devices meet. Out: the sum, on every one of those
devices. Does not know what is summed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch, imported, register

register("all_reduce", "cuda", imported("pallas_kernels.all_reduce.cuda:all_reduce"), platforms=("gpu",))
register("all_reduce", "reference", imported("pallas_kernels.all_reduce.reference:all_reduce"))

Groups = tuple[tuple[int, ...], ...]


def all_reduce(
    x: jax.Array,
    axes: str | tuple[str, ...],
    groups: Groups | None = None,
    *,
    implementation: str | None = None,
    platform: str | None = None,
) -> jax.Array:
    """x summed over the devices along `axes`. `groups`: ids of the devices that meet, in rank order; None = not known.

    Which bits come out may depend on the implementation, never on the call; every device gets the same.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"all_reduce sums floating-point arrays, not {x.dtype}")
    if not axes:
        raise ValueError("all_reduce needs the name of at least one mesh axis")
    if groups is not None and (not groups or len({len(group) for group in groups}) != 1):
        raise ValueError(f"groups must be of one size, got {groups}")
    return dispatch("all_reduce", implementation=implementation, platform=platform)(x, axes, groups)
