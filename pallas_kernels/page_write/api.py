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
    k_scale: jax.Array | None = None,  # f32[K], with float8_e4m3fn pages
    v_scale: jax.Array | None = None,
    implementation: str | None = None,
    platform: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Token t goes to slot = page * page_size + offset -> (k_pages, v_pages).

    A slot outside 0 .. P * page_size - 1 drops its token (padding). Slots within are distinct: two tokens in one slot
    leave either. Everything else in the pages keeps its bits. k and v are cast to the pages' dtype; scaled pages hold
    what times scale[kv head] is nearest, the largest there is where that is larger still, NaN where that is NaN.
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
    check_scales(k_pages, k_scale, v_scale)
    scales = {} if k_scale is None else {"k_scale": k_scale, "v_scale": v_scale}
    return run(k_pages, v_pages, k, v, slots, **scales)


def check_scales(k_pages: jax.Array, k_scale: jax.Array | None, v_scale: jax.Array | None) -> None:
    """ValueError unless e4m3 pages, and only they, come with scales."""
    narrow = k_pages.dtype == jnp.float8_e4m3fn
    for name, given in (("k_scale", k_scale), ("v_scale", v_scale)):
        if narrow != (given is not None):
            raise ValueError(f"{name} goes with float8_e4m3fn pages and only with them; pages are {k_pages.dtype}")
        if given is not None and (given.shape != k_pages.shape[1:2] or given.dtype != jnp.float32):
            raise ValueError(f"{name} must be f32[K] = f32[{k_pages.shape[1]}], got {given.dtype}{list(given.shape)}")
