"""A decode step's attention from projection to output: argument checks, then the best implementation that accepts.

In: Heads of one token a row, one layer's pages, page tables, lengths. Out: attention outputs, and the pages with the
new keys and values, in place when the caller donates them. Norms, rotation, page write and attention are one launch
where a kernel does them all; otherwise they are `rope_page_write` and `paged_attention.decode`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch, imported, register
from pallas_kernels.rope_page_write.heads import Heads

_OP = "decode_attention"
_ROOM = "pallas_kernels.paged_attention"
_OWN = "pallas_kernels.decode_attention"
register(_OP, "cuda_many", imported(f"{_OWN}.cuda:many_heads"), platforms=("gpu",))
register(_OP, "triton", imported(f"{_ROOM}.triton:decode_heads"), platforms=("gpu",))
register(_OP, "cuda", imported(f"{_OWN}.cuda:decode_heads"), platforms=("gpu",))
register(_OP, "triton_interpret", imported(f"{_ROOM}.interpreted:triton_decode_heads"), platforms=("interpret",))
register(_OP, "cuda_emulated", imported(f"{_OWN}.emulated:decode_heads"), platforms=("interpret",))
register(_OP, "apart", imported("pallas_kernels.decode_attention.reference:apart"))
register(_OP, "reference", imported("pallas_kernels.decode_attention.reference:decode_attention"))


def decode_attention(
    heads: Heads,  # of B tokens
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,  # [P, K, page_size, H]
    page_table: jax.Array,  # i32[B, W]
    kv_lens: jax.Array,  # i32[B]
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
    platform: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> (out[B, N, H], k_pages, v_pages). Row b's token is at position kv_lens[b] - 1; length 0: padding, 0 comes out.

    Everything else as in paged_attention_decode, with the same bits where the kernel is the same.
    """
    heads.check()
    if heads.cos.ndim != 2 or k_pages.ndim != 4 or k_pages.shape[1::2] != (heads.K, heads.H):
        raise ValueError(
            f"heads of B tokens with K = {heads.K}, H = {heads.H} do not fit cos {list(heads.cos.shape)} and pages "
            f"[P, K, page_size, H] {list(k_pages.shape)}"
        )
    if page_table.ndim != 2 or page_table.shape[0] != heads.cos.shape[0] or page_table.dtype != jnp.int32:
        raise ValueError(f"page_table must be i32[B = {heads.cos.shape[0]}, W], got {list(page_table.shape)}")
    if kv_lens.shape != page_table.shape[:1] or kv_lens.dtype != jnp.int32:
        raise ValueError(f"kv_lens must be i32[B = {page_table.shape[0]}], got {kv_lens.dtype}{list(kv_lens.shape)}")
    run = dispatch(_OP, implementation=implementation, platform=platform)
    return run(heads, k_pages, v_pages, page_table, kv_lens, scale=scale, window=window, soft_cap=soft_cap)
