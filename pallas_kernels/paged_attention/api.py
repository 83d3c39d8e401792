"""Attention over paged keys and values: argument checks, then the best implementation that accepts.

In: arrays. Out: attention outputs, in the queries' dtype; softmax and accumulation are f32. Three ops: one query a row
(decode), the same few queries a row (verify), ragged (append; prefill and decode mixed).

Page-table entries beyond a row's pages may hold any integer and memory beyond its tokens any bits, NaN included:
neither reaches an output. Pages may be float8_e4m3fn with a scale a kv head. With a window, pages wholly below it are
never read. This module does not know layers, positions or requests; keys and values of the queries themselves must
already be in the pages.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_heads, check_scores
from pallas_kernels.dispatch import Kernel, dispatch, imported, register
from pallas_kernels.page_write.api import check_scales, page_write


def _wide_reference() -> Kernel:
    from pallas_kernels.paged_attention import reference

    return functools.partial(reference.paged_attention, scores_at_once=reference.WIDE_SCORES_AT_ONCE)


_ROOM = "pallas_kernels.paged_attention"
_REFERENCE = f"{_ROOM}.reference"
register("paged_attention", "mosaic_sm90", imported(f"{_ROOM}.mosaic_sm90:paged_attention"), platforms=("gpu",))
register("paged_attention", "mosaic_sm90_interpret", imported(f"{_ROOM}.interpreted:ragged"), platforms=("interpret",))
_DECODE, _AMONG, _CUDA = "paged_attention.decode", "paged_attention.among", "pallas_kernels.decode_attention"
register(_DECODE, "cuda_many", imported(f"{_CUDA}.cuda:many_decode"), platforms=("gpu",))
register(_DECODE, "triton", imported(f"{_ROOM}.triton:paged_attention_decode"), platforms=("gpu",))
register(_DECODE, "cuda", imported(f"{_CUDA}.cuda:paged_attention_decode"), platforms=("gpu",))
register(_DECODE, "mosaic_sm90", imported(f"{_ROOM}.decode_sm90:paged_attention_decode"), platforms=("gpu",))
register(_DECODE, "triton_interpret", imported(f"{_ROOM}.interpreted:triton_decode"), platforms=("interpret",))
register(_DECODE, "mosaic_sm90_interpret", imported(f"{_ROOM}.interpreted:decode"), platforms=("interpret",))
register(_DECODE, "cuda_emulated", imported(f"{_CUDA}.emulated:paged_attention_decode"), platforms=("interpret",))
# Rows of one query in a mixed step: in the order of decode steps, whose bits they have.
register(_AMONG, "cuda_many", imported(f"{_CUDA}.cuda:many_among"), platforms=("gpu",))
register(_AMONG, "triton", imported(f"{_ROOM}.triton:decode_among"), platforms=("gpu",))
register(_AMONG, "cuda", imported(f"{_CUDA}.cuda:decode_among"), platforms=("gpu",))
register(_AMONG, "triton_interpret", imported(f"{_ROOM}.interpreted:triton_among"), platforms=("interpret",))
register(_AMONG, "cuda_emulated", imported(f"{_CUDA}.emulated:decode_among"), platforms=("interpret",))
_VERIFY = "paged_attention.verify"
register(_VERIFY, "mosaic_sm90", imported(f"{_ROOM}.decode_sm90:verify"), platforms=("gpu",))
register(_VERIFY, "mosaic_sm90_interpret", imported(f"{_ROOM}.interpreted:verify"), platforms=("interpret",))
register(_VERIFY, "reference", imported(f"{_REFERENCE}:verify"))
register("paged_attention", "reference", imported(f"{_REFERENCE}:paged_attention"), platforms=("cpu", "interpret"))
register("paged_attention", "reference_wide", _wide_reference, platforms=("gpu",))
_WRITE = "paged_attention.decode_write"
register(_WRITE, "mosaic_sm90", imported(f"{_ROOM}.decode_sm90:decode_write"), platforms=("gpu",))
register(_WRITE, "mosaic_sm90_interpret", imported(f"{_ROOM}.interpreted:decode_write"), platforms=("interpret",))
register(_WRITE, "apart", lambda: _write_then_decode)
register(_DECODE, "reference", imported(f"{_REFERENCE}:paged_attention_decode"))


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
    sinks: jax.Array | None = None,  # f32[N]
    k_scale: jax.Array | None = None,  # f32[K], with float8_e4m3fn pages
    v_scale: jax.Array | None = None,
    return_lse: bool = False,
    uniform: bool = False,
    implementation: str | None = None,
    platform: str | None = None,
) -> Any:
    """Causal attention of ragged rows -> [T, N, H]; with `return_lse` also f32[T, N].

    Row r owns q[query_starts[r] : query_starts[r + 1]]: the last queries of its kv_lens[r] keys. Its key j lies in page
    page_table[r, j // page_size] at j % page_size. Query i sees key j iff i - window < j <= i. Tokens at or after
    query_starts[R] are padding and come out 0; rows may be empty. Query head n reads kv head n // (N / K).
    `soft_cap` c replaces each scaled score s by c * tanh(s / c). Scaled pages mean page * scale[kv head].
    A head's sink adds exp(sink) to the denominators of its softmax, and nothing to the sums above them. The log-sum-exp
    is the logarithm of the denominator, sink included; of a query that sees no key the lowest (-1e30).
    `uniform`: a query's bits depend on its keys alone, not on how many queries come with it; rows of one query are
    otherwise faster, and have the bits of paged_attention_decode.
    """
    _check("q[T, N, H]", q, k_pages, v_pages, page_table, kv_lens, scale, window, soft_cap)
    check_scales(k_pages, k_scale, v_scale)
    R = page_table.shape[0]
    if query_starts.shape != (R + 1,) or query_starts.dtype != jnp.int32:
        raise ValueError(
            f"query_starts must be i32[R + 1] = i32[{R + 1}] for page_table {page_table.shape}, "
            f"got {query_starts.dtype}{list(query_starts.shape)}"
        )
    run = dispatch("paged_attention", implementation=implementation, platform=platform)
    options = _options(q, scale, window, soft_cap, sinks, k_scale, v_scale, return_lse)
    options |= {"uniform": True} if uniform else {}
    return run(q, k_pages, v_pages, page_table, kv_lens, query_starts, **options)


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
    sinks: jax.Array | None = None,  # f32[N]
    k_scale: jax.Array | None = None,  # f32[K], with float8_e4m3fn pages
    v_scale: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    platform: str | None = None,
) -> Any:
    """One query a row, at position kv_lens - 1 -> [B, N, H], with `return_lse` also f32[B, N].

    A row with kv_lens 0 is padding and comes out 0.

    Everything else as in paged_attention.
    """
    _check("q[B, N, H]", q, k_pages, v_pages, page_table, kv_lens, scale, window, soft_cap)
    check_scales(k_pages, k_scale, v_scale)
    if q.shape[0] != page_table.shape[0]:
        raise ValueError(f"q[B, N, H] {q.shape} and page_table[B, W] {page_table.shape} disagree on B")
    run = dispatch(_DECODE, implementation=implementation, platform=platform)
    options = _options(q, scale, window, soft_cap, sinks, k_scale, v_scale, return_lse)
    return run(q, k_pages, v_pages, page_table, kv_lens, **options)


def paged_attention_decode_write(
    q: jax.Array,  # [B, N, H]
    k: jax.Array,  # [B, K, H]
    v: jax.Array,  # [B, K, H]
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
    """As paged_attention_decode, for pages that still lack each row's last key and value: k and v.

    -> (out, k_pages, v_pages) with them at position kv_lens - 1 of the row, in place when the caller donates the pages.
    """
    _check("q[B, N, H]", q, k_pages, v_pages, page_table, kv_lens, scale, window, soft_cap)
    shape = (q.shape[0], *k_pages.shape[1::2])
    if q.shape[0] != page_table.shape[0] or k.shape != shape or v.shape != shape:
        raise ValueError(f"need k and v [B, K, H] = {list(shape)} and page_table[B, W]; got {k.shape}, {v.shape}")
    run = dispatch(_WRITE, implementation=implementation, platform=platform)
    return run(q, k, v, k_pages, v_pages, page_table, kv_lens, scale=scale, window=window, soft_cap=soft_cap)


def _write_then_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    **options: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    P, _, page_size, _ = k_pages.shape
    position = jnp.maximum(kv_lens - 1, 0)
    page = jnp.take_along_axis(page_table, (position // page_size)[:, None], axis=1)[:, 0]
    slots = jnp.where(kv_lens > 0, page * page_size + position % page_size, P * page_size)
    pages = page_write(k_pages, v_pages, k, v, slots)
    return paged_attention_decode(q, *pages, page_table, kv_lens, **options), *pages


def paged_attention_verify(
    q: jax.Array,  # [B, Q, N, H]
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,  # [P, K, page_size, H]
    page_table: jax.Array,  # i32[B, W]
    kv_lens: jax.Array,  # i32[B]
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,  # f32[N]
    k_scale: jax.Array | None = None,  # f32[K], with float8_e4m3fn pages
    v_scale: jax.Array | None = None,
    implementation: str | None = None,
    platform: str | None = None,
) -> jax.Array:
    """The last Q queries of each row, at positions kv_lens - Q .. kv_lens - 1 -> [B, Q, N, H].

    A row with kv_lens 0 is padding and comes out 0; others have at least Q keys. Everything else as in
    paged_attention; the Mosaic kernel gives each query the bits that a decode step at its position has.
    """
    if q.ndim != 4 or 0 in q.shape or q.shape[0] != page_table.shape[0]:
        raise ValueError(f"need q[B, Q, N, H], not empty, and page_table[B, W]; got {q.shape}, {page_table.shape}")
    _check("q[B, N, H]", q[:, 0], k_pages, v_pages, page_table, kv_lens, scale, window, soft_cap)
    check_scales(k_pages, k_scale, v_scale)
    run = dispatch(_VERIFY, implementation=implementation, platform=platform)
    options = _options(q, scale, window, soft_cap, sinks, k_scale, v_scale)
    return run(q, k_pages, v_pages, page_table, kv_lens, **options)


def _options(
    q: jax.Array,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    return_lse: bool = False,
) -> dict[str, Any]:
    """What every implementation is given, and what only some calls ask for."""
    options: dict[str, Any] = {"scale": scale, "window": window, "soft_cap": soft_cap}
    if sinks is not None:
        check_scores(q.shape[-2], scale, sinks=sinks)
        options["sinks"] = sinks
    if k_scale is not None:
        options |= {"k_scale": k_scale, "v_scale": v_scale}
    return options | {"return_lse": True} if return_lse else options


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
    check_heads(form, q, "k_pages[P, K, page_size, H]", k_pages, v_pages)
    if page_table.ndim != 2 or 0 in page_table.shape or page_table.dtype != jnp.int32:
        raise ValueError(f"page_table must be i32[rows, W], got {page_table.dtype}{list(page_table.shape)}")
    if kv_lens.shape != page_table.shape[:1] or kv_lens.dtype != jnp.int32:
        raise ValueError(
            f"kv_lens must be i32[{page_table.shape[0]}] for page_table {page_table.shape}, "
            f"got {kv_lens.dtype}{list(kv_lens.shape)}"
        )
    check_scores(q.shape[1], scale, window, soft_cap)
