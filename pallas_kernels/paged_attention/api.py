"""Attention over paged keys and values: argument checks, then the best implementation that accepts.

In: arrays. Out: attention outputs, in the queries' dtype; softmax and accumulation are f32. Two ops, because a step is
either one query a row (decode) or ragged (append; prefill and decode mixed).

Page-table entries beyond a row's pages may hold any integer and memory beyond its tokens any bits, NaN included:
neither reaches an output. With a window, pages wholly below it are never read. This module does not know layers,
positions or requests; keys and values of the queries themselves must already be in the pages.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Kernel, dispatch, imported, register


def _wide_reference() -> Kernel:
    from pallas_kernels.paged_attention import reference

    return functools.partial(reference.paged_attention, scores_at_once=reference.WIDE_SCORES_AT_ONCE)


_ROOM = "pallas_kernels.paged_attention"
_REFERENCE = f"{_ROOM}.reference"
register("paged_attention", "mosaic_sm90", imported(f"{_ROOM}.mosaic_sm90:paged_attention"), platforms=("gpu",))
register("paged_attention", "mosaic_sm90_interpret", imported(f"{_ROOM}.interpreted:ragged"), platforms=("interpret",))
register("paged_attention.decode", "triton", imported(f"{_ROOM}.triton:paged_attention_decode"), platforms=("gpu",))
register(
    "paged_attention.decode", "triton_interpret", imported(f"{_ROOM}.interpreted:decode"), platforms=("interpret",)
)
register("paged_attention", "reference", imported(f"{_REFERENCE}:paged_attention"), platforms=("cpu", "interpret"))
register("paged_attention", "reference_wide", _wide_reference, platforms=("gpu",))
register("paged_attention.decode", "reference", imported(f"{_REFERENCE}:paged_attention_decode"))


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
    implementation: str | None = None,
    platform: str | None = None,
) -> jax.Array:
    """Causal attention of ragged rows -> [T, N, H].

    Row r owns q[query_starts[r] : query_starts[r + 1]]: the last queries of its kv_lens[r] keys. Its key j lies in page
    page_table[r, j // page_size] at j % page_size. Query i sees key j iff i - window < j <= i. Tokens at or after
    query_starts[R] are padding and come out 0; rows may be empty. Query head n reads kv head n // (N / K).
    `soft_cap` c replaces each scaled score s by c * tanh(s / c).
    """
    _check("q[T, N, H]", q, k_pages, v_pages, page_table, kv_lens, scale, window, soft_cap)
    R = page_table.shape[0]
    if query_starts.shape != (R + 1,) or query_starts.dtype != jnp.int32:
        raise ValueError(
            f"query_starts must be i32[R + 1] = i32[{R + 1}] for page_table {page_table.shape}, "
            f"got {query_starts.dtype}{list(query_starts.shape)}"
        )
    run = dispatch("paged_attention", implementation=implementation, platform=platform)
    return run(q, k_pages, v_pages, page_table, kv_lens, query_starts, scale=scale, window=window, soft_cap=soft_cap)


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
    implementation: str | None = None,
    platform: str | None = None,
) -> jax.Array:
    """One query a row, at position kv_lens - 1 -> [B, N, H]. A row with kv_lens 0 is padding and comes out 0.

    Everything else as in paged_attention.
    """
    _check("q[B, N, H]", q, k_pages, v_pages, page_table, kv_lens, scale, window, soft_cap)
    if q.shape[0] != page_table.shape[0]:
        raise ValueError(f"q[B, N, H] {q.shape} and page_table[B, W] {page_table.shape} disagree on B")
    run = dispatch("paged_attention.decode", implementation=implementation, platform=platform)
    return run(q, k_pages, v_pages, page_table, kv_lens, scale=scale, window=window, soft_cap=soft_cap)


def _check(
    form: str,
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> None:
    if q.ndim != 3 or k_pages.ndim != 4 or 0 in q.shape or 0 in k_pages.shape:
        raise ValueError(f"need {form} and k_pages[P, K, page_size, H], none empty; got {q.shape}, {k_pages.shape}")
    if k_pages.shape != v_pages.shape or k_pages.dtype != v_pages.dtype:
        raise ValueError(
            f"k_pages {k_pages.dtype}{list(k_pages.shape)} and v_pages {v_pages.dtype}{list(v_pages.shape)} must agree"
        )
    if q.shape[2] != k_pages.shape[3] or q.shape[1] % k_pages.shape[1]:
        raise ValueError(f"{form} {q.shape} does not fit k_pages[P, K, page_size, H] {k_pages.shape}: H = H, K | N")
    for name, array in (("q", q), ("k_pages", k_pages)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, got {array.dtype}")
    if page_table.ndim != 2 or 0 in page_table.shape or page_table.dtype != jnp.int32:
        raise ValueError(f"page_table must be i32[rows, W], got {page_table.dtype}{list(page_table.shape)}")
    if kv_lens.shape != page_table.shape[:1] or kv_lens.dtype != jnp.int32:
        raise ValueError(
            f"kv_lens must be i32[{page_table.shape[0]}] for page_table {page_table.shape}, "
            f"got {kv_lens.dtype}{list(kv_lens.shape)}"
        )
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be None or at least 1 (it counts the query itself), got {window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap must be None or positive, got {soft_cap}")
