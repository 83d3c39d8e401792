"""Attention over some of the keys, to be merged with attention over the others: argument checks, then the best way.

In: queries, one layer's pages, which row's pages each query reads and how many leading keys of them it sees. Out: the
outputs over those keys and the log of the sum of their exponents. Does not know who holds the other keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_heads, check_scores
from pallas_kernels.dispatch import dispatch, imported, register
from pallas_kernels.page_write.api import check_scales

_OP, _ROOM = "partial_attention", "pallas_kernels.partial_attention"
_INTERPRET = "mosaic_sm90_interpret"
register(_OP, "mosaic_sm90", imported(f"{_ROOM}.mosaic_sm90:partial_attention"), platforms=("gpu",))
register(_OP, _INTERPRET, imported(f"{_ROOM}.interpreted:partial_attention"), platforms=("interpret",))
register(_OP, "reference", imported(f"{_ROOM}.reference:partial_attention"))


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
    k_scale: jax.Array | None = None,  # f32[K], with float8_e4m3fn pages
    v_scale: jax.Array | None = None,
    implementation: str | None = None,
    platform: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-> (f32[T, N, H], f32[T, N]). Query t sees the first visible[t] keys of the pages of row rows[t].

    `query_starts` says that queries lie row by row, row r's from query_starts[r] to query_starts[r + 1]; what comes
    after the last row's sees nothing. Kernels then take many at a time. Scaled pages mean page * scale[kv head].
    A query that sees none gives zeros and the lowest finite log-sum. Table entries past the visible keys may hold
    anything, and so may the memory of keys no query sees.
    """
    check_heads("q[T, N, H]", q, "k_pages[P, K, page_size, H]", k_pages, v_pages)
    check_scores(q.shape[1], scale)
    for name, array in (("rows", rows), ("visible", visible)):
        if array.shape != q.shape[:1] or array.dtype != jnp.int32:
            raise ValueError(f"{name} must be i32[T] = i32[{q.shape[0]}], got {array.dtype}{list(array.shape)}")
    starts = page_table.shape[0] + 1
    if query_starts is not None and (query_starts.shape != (starts,) or query_starts.dtype != jnp.int32):
        raise ValueError(f"query_starts must be i32[R + 1] = i32[{starts}], got {list(query_starts.shape)}")
    check_scales(k_pages, k_scale, v_scale)
    run = dispatch(_OP, implementation=implementation, platform=platform)
    options = {"query_starts": query_starts, "k_scale": k_scale, "v_scale": v_scale}
    return run(q, k_pages, v_pages, page_table, rows, visible, scale=scale, **options)
