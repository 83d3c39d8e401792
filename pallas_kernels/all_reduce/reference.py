"""The sum over devices as XLA does it. In: an array a device, inside shard_map. Out: the sum, on every device."""

from __future__ import annotations

import jax
from jax import lax


def all_reduce(x: jax.Array, axes: str | tuple[str, ...], groups: tuple[tuple[int, ...], ...] | None) -> jax.Array:
    """See api.all_reduce."""
    return lax.psum(x, axes)
