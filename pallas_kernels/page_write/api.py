"""New keys and values into the KV pages: argument checks, then the best implementation that accepts.

In: one layer's pages and the step's tokens with their slots. Out: the pages, in place when the caller donates them.
This module does not know page tables: the runner computed each token's slot.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch, imported, register

register("page_write", "reference", imported("pallas_kernels.page_write.reference:page_write"))


def page_write(
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,  # [P, K, page_size, H]
    k: jax.Array,  # [T, K, H]
    v: jax.Array,  # [T, K, H]
    slots: jax.Array,  # i32[T]
    *,
    implementation: str | None = None,
    platform: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Token t goes to slot = page * page_size + offset -> (k_pages, v_pages).

    A slot outside 0 .. P * page_size - 1 drops its token (padding). Slots within are distinct: two tokens in one slot
    leave either. Everything else in the pages keeps its bits. k and v are cast to the pages' dtype.
    """
    if k_pages.ndim != 4 or 0 in k_pages.shape or k_pages.shape != v_pages.shape or k_pages.dtype != v_pages.dtype:
        raise ValueError(
            "k_pages and v_pages must agree as [P, K, page_size, H], not empty; "
            f"got {k_pages.dtype}{list(k_pages.shape)} and {v_pages.dtype}{list(v_pages.shape)}"
        )
    _, K, _, H = k_pages.shape
    if k.ndim != 3 or k.shape[1:] != (K, H) or k.shape != v.shape or k.dtype != v.dtype or k.shape[0] == 0:
        raise ValueError(
            f"k and v must agree as [T, {K}, {H}] for pages {list(k_pages.shape)}; "
            f"got {k.dtype}{list(k.shape)} and {v.dtype}{list(v.shape)}"
        )
    if slots.shape != k.shape[:1] or slots.dtype != jnp.int32:
        raise ValueError(f"slots must be i32[T] = i32[{k.shape[0]}], got {slots.dtype}{list(slots.shape)}")
    run = dispatch("page_write", implementation=implementation, platform=platform)
    return run(k_pages, v_pages, k, v, slots)
