"""From a layer's projection to its pages in one op: qk norms, rotation, page write; the best implementation runs.

In: Heads, one layer's pages, the tokens' slots. Out: rotated queries, and the pages, in place when the caller donates
them. This module does not know page tables: the runner computed each token's slot.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch, imported, register
from pallas_kernels.rope_page_write.heads import Heads

_ROOM = "pallas_kernels.rope_page_write"
register("rope_page_write", "triton", imported(f"{_ROOM}.triton:rope_page_write"), platforms=("gpu",))
register("rope_page_write", "triton_interpret", imported(f"{_ROOM}.interpreted:rope_page_write"), ("interpret",))
register("rope_page_write", "reference", imported(f"{_ROOM}.reference:rope_page_write"))


def rope_page_write(
    heads: Heads,  # of T tokens
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,  # [P, K, page_size, H]
    slots: jax.Array,  # i32[T]
    *,
    implementation: str | None = None,
    platform: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> (q[T, N, H], k_pages, v_pages): q and k normed and rotated, k and v in their slots.

    Token t goes to slot = page * page_size + offset; one outside 0 .. P * page_size - 1 drops its key and value
    (padding). Slots within are distinct. Everything else in the pages keeps its bits.
    """
    heads.check()
    if k_pages.ndim != 4 or 0 in k_pages.shape or k_pages.shape != v_pages.shape or k_pages.dtype != v_pages.dtype:
        raise ValueError(
            "k_pages and v_pages must agree as [P, K, page_size, H], not empty; "
            f"got {k_pages.dtype}{list(k_pages.shape)} and {v_pages.dtype}{list(v_pages.shape)}"
        )
    if heads.cos.ndim != 2 or k_pages.shape[1::2] != (heads.K, heads.H):
        raise ValueError(
            f"heads of T tokens with K = {heads.K}, H = {heads.H} do not fit cos {list(heads.cos.shape)} and pages "
            f"[P, K, page_size, H] {list(k_pages.shape)}"
        )
    if slots.shape != heads.cos.shape[:1] or slots.dtype != jnp.int32:
        raise ValueError(f"slots must be i32[T] = i32[{heads.cos.shape[0]}], got {slots.dtype}{list(slots.shape)}")
    run = dispatch("rope_page_write", implementation=implementation, platform=platform)
    return run(heads, k_pages, v_pages, slots)
