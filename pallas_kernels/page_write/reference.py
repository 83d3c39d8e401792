"""Writing new keys and values into their pages, in plain jnp: one scatter an array, in place when donated.

In: pages, tokens, slots, already checked by api.py. Out: the pages. It does not know which sequence a slot is of.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

E4M3_MAX = 448.0


def page_write(
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,  # [P, K, page_size, H]
    k: jax.Array,  # [T, K, H]
    v: jax.Array,  # [T, K, H]
    slots: jax.Array,  # i32[T]
    *,
    k_scale: jax.Array | None = None,  # f32[K], with e4m3 pages
    v_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See api.page_write."""
    P, _, page_size, _ = k_pages.shape
    page = jnp.where(slots >= 0, slots // page_size, P)  # indexing would wrap -1 round to the last page
    offset = slots % page_size
    return (
        k_pages.at[page, :, offset].set(as_stored(k, k_scale, k_pages.dtype), mode="drop"),
        v_pages.at[page, :, offset].set(as_stored(v, v_scale, v_pages.dtype), mode="drop"),
    )


def as_stored(tokens: jax.Array, scale: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """[..., K, H] as pages hold it. A cast alone would make NaN of what is too large."""
    if scale is None:
        return tokens.astype(dtype)
    return jnp.clip(tokens.astype(jnp.float32) / scale[:, None], -E4M3_MAX, E4M3_MAX).astype(dtype)
