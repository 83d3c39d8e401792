"""Attention over the leading keys of a row's pages on Hopper: the room of paged attention has the kernels.

In: arguments checked by api.py. Out: f32. Queries that lie row by row go to the ragged Mosaic kernel, whose tiles take
each query's number of visible keys where they otherwise take its position; without starts each query is a row of its
own and goes to the decode kernel. Both round outputs to the queries' dtype, as attention that is not merged does; the
logarithms stay f32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import mosaic_sm90, triton


def partial_attention(
    q: jax.Array,  # [T, N, H]
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,  # [P, K, page_size, H]
    page_table: jax.Array,  # i32[R, W]
    rows: jax.Array,  # i32[T]
    visible: jax.Array,  # i32[T]
    *,
    scale: float,
    query_starts: jax.Array | None = None,  # i32[R + 1]
    k_scale: jax.Array | None = None,  # f32[K], with e4m3 pages
    v_scale: jax.Array | None = None,
    blocks: mosaic_sm90.Blocks | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See api.partial_attention."""
    if query_starts is None:
        own = page_table[rows]
        options = {"k_scale": k_scale, "v_scale": v_scale, "interpret": interpret is not None}
        out, lse = triton.paged_attention_decode(
            q, k_pages, v_pages, own, visible, scale=scale, return_lse=True, **options
        )
        return out.astype(jnp.float32), lse
    blocks = blocks or mosaic_sm90.chosen_blocks(q.shape[2], k_pages.shape[2])
    mosaic_sm90.refuse(q, k_pages, scale, blocks, k_scale, v_scale)
    out, lse = mosaic_sm90.ragged_attention(
        q,
        k_pages,
        v_pages,
        page_table,
        jnp.zeros(page_table.shape[:1], jnp.int32),
        query_starts,
        scale=scale,
        window=None,
        soft_cap=None,
        blocks=blocks,
        extras=mosaic_sm90.Extras(visible=visible, k_scale=k_scale, v_scale=v_scale),
        return_lse=True,
        interpret=interpret,
    )
    return out.astype(jnp.float32), lse
