"""Writing new keys and values into their pages, in plain jnp: one scatter an array, in place when donated.

In: pages, tokens, slots, already checked by api.py. Out: the pages. It does not know which sequence a slot is of.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def page_write(
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,  # [P, K, page_size, H]
    k: jax.Array,  # [T, K, H]
    v: jax.Array,  # [T, K, H]
    slots: jax.Array,  # i32[T]
) -> tuple[jax.Array, jax.Array]:
    """See api.page_write."""
    P, _, page_size, _ = k_pages.shape
    page = jnp.where(slots >= 0, slots // page_size, P)  # indexing would wrap -1 round to the last page
    offset = slots % page_size
    return (
        k_pages.at[page, :, offset].set(k.astype(k_pages.dtype), mode="drop"),
        v_pages.at[page, :, offset].set(v.astype(v_pages.dtype), mode="drop"),
    )
