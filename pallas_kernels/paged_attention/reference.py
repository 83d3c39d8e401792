"""Paged attention in plain jnp: correct everywhere, and fast enough to serve from on a CPU or through XLA.

In: queries, one layer's pages, page tables, lengths, already checked by api.py. Out: attention outputs.
An online softmax runs over blocks of keys at fixed absolute positions, from the first block any query can see to the
last: the cost follows the rows' lengths, never the width of the page table, and no [T, length] array exists. A block
that a row cannot see changes nothing in it, bit for bit. On XLA's CPU backend a query's result is the same bits alone
or in company and in any chunking, and from H = 64 up the same in decode as in the ragged form (below, within 1e-7 in
f32); XLA's GPU backend chooses its matmuls by shape and promises none of it.
This module does not know how pages are allocated or written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

BLOCK_KEYS = 256  # keys a loop step; one constant, so that every caller sums in the same order
TILE_QUERIES = 16  # queries of one row that share a key block in the ragged form
SCORES_AT_ONCE = 1 << 20  # score elements in flight, i.e. how many tiles attend together: fits a CPU's cache
WIDE_SCORES_AT_ONCE = 1 << 26  # the same for a GPU, where a loop step costs launches
_LEAST_SCORES = 4096  # XLA's CPU backend sums smaller arrays in another order
_LOWEST = -1e30  # finite, so that a row that has seen no key yet computes no inf - inf


def paged_attention_decode(
    q: jax.Array,  # [B, N, H]
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,  # [P, K, page_size, H]
    page_table: jax.Array,  # i32[B, W]
    kv_lens: jax.Array,  # i32[B]
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    return_lse: bool = False,
) -> Any:
    """One query a row, at position kv_lens - 1; see api.paged_attention_decode."""
    B, N, H = q.shape
    K = k_pages.shape[1]
    positions = jnp.broadcast_to(kv_lens[:, None] - 1, (B, N // K))
    grouped = q.reshape(B, K, N // K, H)
    pages = _Pages(k_pages, v_pages, k_scale, v_scale)
    out, lse = _attend(grouped, positions, pages, page_table, scale, window, soft_cap, _per_query(sinks, K, 1))
    return (out.reshape(B, N, H), lse.reshape(B, N)) if return_lse else out.reshape(B, N, H)


def _per_query(sinks: jax.Array | None, K: int, queries: int) -> jax.Array | None:
    """f32[N] -> [K, queries * N / K], the order of a tile's rows."""
    return None if sinks is None else jnp.tile(sinks.reshape(K, -1), (1, queries))


def verify(
    q: jax.Array,  # [B, Q, N, H]
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,  # [P, K, page_size, H]
    page_table: jax.Array,  # i32[B, W]
    kv_lens: jax.Array,  # i32[B]
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
    """The last Q queries of each row; see api.paged_attention_verify."""
    B, Q, N, H = q.shape
    K = k_pages.shape[1]
    own = kv_lens[:, None] - Q + jnp.arange(Q, dtype=jnp.int32)
    positions = jnp.repeat(jnp.where(kv_lens[:, None] > 0, own, -1), N // K, axis=1)
    grouped = q.reshape(B, Q, K, N // K, H).swapaxes(1, 2).reshape(B, K, Q * (N // K), H)
    pages = _Pages(k_pages, v_pages, k_scale, v_scale)
    out, _ = _attend(grouped, positions, pages, page_table, scale, window, soft_cap, _per_query(sinks, K, Q))
    return out.reshape(B, K, Q, N // K, H).swapaxes(1, 2).reshape(B, Q, N, H)


def paged_attention(
    q: jax.Array,  # [T, N, H]
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,  # [P, K, page_size, H]
    page_table: jax.Array,  # i32[R, W]
    kv_lens: jax.Array,  # i32[R]
    query_starts: jax.Array,  # i32[R + 1]
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    return_lse: bool = False,
    uniform: bool = False,
    scores_at_once: int = SCORES_AT_ONCE,
) -> Any:
    """Ragged rows; see api.paged_attention. All are computed alike, whatever `uniform` says.

    The flat queries are cut into tiles of one row each; groups of tiles attend together. The trip counts of both
    loops are data: tiles that do not exist and keys that no tile of the group sees cost nothing.
    """
    T, N, H = q.shape
    K, R = k_pages.shape[1], kv_lens.shape[0]
    # A nonempty row of n queries has at most 1 + (n - 1) / tile tiles, and there are at most min(R, T) such rows.
    num_tiles = min(R, T) + max(T - R, 0) // TILE_QUERIES
    group = max(1, min(num_tiles, scores_at_once // (N * TILE_QUERIES * BLOCK_KEYS)))
    num_groups = -(-num_tiles // group)

    counts = query_starts[1:] - query_starts[:-1]
    tile_ends = jnp.cumsum((counts + TILE_QUERIES - 1) // TILE_QUERIES, dtype=jnp.int32)  # [R]
    tile_starts = tile_ends - (counts + TILE_QUERIES - 1) // TILE_QUERIES
    lane = jnp.arange(TILE_QUERIES, dtype=jnp.int32)

    def one_group(index: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tile = index * group + jnp.arange(group, dtype=jnp.int32)
        row = _owner(tile, tile_ends)
        offset = (tile - tile_starts[row])[:, None] * TILE_QUERIES + lane  # [group, tile], from the row's first query
        live = (offset < counts[row][:, None]) & (tile < tile_ends[-1])[:, None]
        source = jnp.where(live, query_starts[row][:, None] + offset, 0)
        positions = jnp.where(live, (kv_lens - counts)[row][:, None] + offset, -1)
        tiles = q[source].reshape(group, TILE_QUERIES, K, N // K, H).swapaxes(1, 2)
        attended, lse = _attend(
            tiles.reshape(group, K, TILE_QUERIES * (N // K), H),
            jnp.repeat(positions, N // K, axis=1),
            _Pages(k_pages, v_pages, k_scale, v_scale),
            page_table[row],
            scale,
            window,
            soft_cap,
            _per_query(sinks, K, TILE_QUERIES),
        )
        attended = attended.reshape(group, K, TILE_QUERIES, N // K, H).swapaxes(1, 2)
        lse = lse.reshape(group, K, TILE_QUERIES, N // K).swapaxes(1, 2)
        first = index * (group * TILE_QUERIES)
        out = lax.dynamic_update_slice(found[0], attended.reshape(group * TILE_QUERIES, N, H), (first, 0, 0))
        return out, lax.dynamic_update_slice(found[1], lse.reshape(group * TILE_QUERIES, N), (first, 0))

    slots = num_groups * group * TILE_QUERIES
    nothing = jnp.zeros((slots, N, H), q.dtype), jnp.zeros((slots, N), jnp.float32)
    out, lse = lax.fori_loop(0, (tile_ends[-1] + group - 1) // group, one_group, nothing)

    token = jnp.arange(T, dtype=jnp.int32)
    row = _owner(token, query_starts[1:])
    live = (token >= query_starts[0]) & (token < query_starts[-1])
    place = jnp.where(live, tile_starts[row] * TILE_QUERIES + token - query_starts[row], 0)
    out = jnp.where(live[:, None, None], out[place], jnp.zeros((), q.dtype))
    return (out, jnp.where(live[:, None], lse[place], _LOWEST)) if return_lse else out


class _Pages(NamedTuple):
    k: jax.Array  # [P, K, page_size, H]
    v: jax.Array
    k_scale: jax.Array | None  # f32[K]
    v_scale: jax.Array | None


def _owner(item: jax.Array, ends: jax.Array) -> jax.Array:
    """Which row holds each item, rows being consecutive and `ends` one past their last; the last row for the rest."""
    return jnp.minimum(jnp.searchsorted(ends, item, side="right"), ends.shape[0] - 1).astype(jnp.int32)


def _attend(
    q: jax.Array,  # [X, K, M, H]: X independent tiles of M query rows a kv head
    positions: jax.Array,  # i32[X, M], -1 = no query here
    pages: _Pages,
    page_table: jax.Array,  # i32[X, W]
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: jax.Array | None,  # f32[K, M]
) -> tuple[jax.Array, jax.Array]:
    """Online softmax over key blocks, batched over tiles; every tile starts at its own first visible block.

    -> [X, K, M, H] and the logarithm of the softmax's denominator, f32[X, K, M].
    """
    X, K, given, H = q.shape
    page_size, W = pages.k.shape[2], page_table.shape[1]
    count = max(1, BLOCK_KEYS // page_size)  # pages of a block
    block = count * page_size
    M = max(given, -(-_LEAST_SCORES // (K * block)))  # extra rows see no key; they keep the order of sums
    q = jnp.pad(q, ((0, 0), (0, 0), (0, M - given), (0, 0)))
    positions = jnp.pad(positions, ((0, 0), (0, M - given)), constant_values=-1)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT

    stop = positions.max(axis=1) + 1  # [X], one past the last visible key
    start = jnp.zeros_like(stop)
    if window is not None:
        earliest = jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max).min(axis=1)
        start = jnp.clip(earliest - (window - 1), 0, stop)
    first = start // block

    def one_block(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        accumulated, highest, total = carry  # [X, K, M, H], [X, K, M], [X, K, M]
        page = (first + step)[:, None] * count + jnp.arange(count, dtype=jnp.int32)  # [X, count]
        held = (page * page_size < stop[:, None]) & ((page + 1) * page_size > start[:, None])
        ids = jnp.where(held, jnp.take_along_axis(page_table, jnp.minimum(page, W - 1), axis=1), 0)
        key = (first + step)[:, None] * block + jnp.arange(block, dtype=jnp.int32)  # [X, block]
        within = (key >= start[:, None]) & (key < stop[:, None])
        k = _gather_pages(pages.k, ids, pages.k_scale, q.dtype)  # [X, K, block, H]
        v = _gather_pages(pages.v, ids, pages.v_scale, q.dtype)
        v = jnp.where(within[:, None, :, None], v, jnp.zeros((), q.dtype))  # 0 * NaN would be NaN

        scores = jnp.einsum("xkmh,xksh->xkms", q, k, preferred_element_type=jnp.float32, precision=precision) * scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        visible = within[:, None, :] & (key[:, None, :] <= positions[:, :, None])  # [X, M, block]
        if window is not None:
            visible &= key[:, None, :] > positions[:, :, None] - window
        scores = jnp.where(visible[:, None], scores, _LOWEST)
        new_highest = jnp.maximum(highest, scores.max(axis=-1))
        shrink = jnp.exp(highest - new_highest)
        weights = jnp.exp(scores - new_highest[..., None])  # of a row that sees nothing yet: undone by a shrink of 0
        # The barrier keeps the multiply-add out of the sum's kernel, which rounds it differently by shape.
        new_total = total * shrink + lax.optimization_barrier(weights.sum(axis=-1))
        weights = weights.astype(q.dtype)
        added = jnp.einsum("xkms,xksh->xkmh", weights, v, preferred_element_type=jnp.float32, precision=precision)
        return accumulated * shrink[..., None] + added, new_highest, new_total

    nothing = (
        jnp.zeros((X, K, M, H), jnp.float32),
        jnp.full((X, K, M), _LOWEST, jnp.float32),
        jnp.zeros((X, K, M), jnp.float32),
    )
    steps = ((stop + block - 1) // block - first).max()
    accumulated, highest, total = lax.fori_loop(0, steps, one_block, nothing)
    accumulated, highest, total = accumulated[:, :, :given], highest[:, :, :given], total[:, :, :given]
    seen = (total > 0) & (highest > _LOWEST)
    if sinks is not None:
        total += jnp.where(seen, jnp.exp(sinks - highest), 0.0)
    total = jnp.where(seen, total, 1.0)
    return (accumulated / total[..., None]).astype(q.dtype), jnp.where(seen, highest + jnp.log(total), _LOWEST)


def _gather_pages(pages: jax.Array, ids: jax.Array, scale: jax.Array | None, dtype: Any) -> jax.Array:
    """[P, K, page_size, H] at i32[X, n] -> [X, K, n * page_size, H], without the transpose that indexing would need."""
    _, K, page_size, H = pages.shape
    dims = lax.GatherDimensionNumbers(offset_dims=(1, 3, 4), collapsed_slice_dims=(0,), start_index_map=(0,))
    found = lax.gather(pages, ids[..., None], dims, (1, K, page_size, H), mode=lax.GatherScatterMode.CLIP)
    found = found.reshape(ids.shape[0], K, ids.shape[1] * page_size, H)
    if scale is not None:
        found = found.astype(jnp.float32) * scale[None, :, None, None]
    return found.astype(dtype)
