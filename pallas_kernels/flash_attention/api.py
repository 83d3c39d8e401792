"""Causal attention of packed sequences without pages: argument checks, then the best implementation that accepts.

In: queries, keys and values of ragged rows, one row after the other. Out: attention outputs, in the queries' dtype, and
the logarithms of their denominators if wanted; softmax and accumulation are f32. The kernel is paged attention's ragged
one with another source of keys. This module does not know pages, layers or positions.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_heads, check_scores
from pallas_kernels.dispatch import Kernel, dispatch, imported, register


def _wide_reference() -> Kernel:
    from pallas_kernels.flash_attention import reference
    from pallas_kernels.paged_attention.reference import WIDE_SCORES_AT_ONCE

    return functools.partial(reference.flash_attention, scores_at_once=WIDE_SCORES_AT_ONCE)


_OP, _KERNELS = "flash_attention", "pallas_kernels.paged_attention"
_INTERPRET, _REFERENCE = "mosaic_sm90_interpret", "pallas_kernels.flash_attention.reference:flash_attention"
register(_OP, "mosaic_sm90", imported(f"{_KERNELS}.mosaic_sm90:flash_attention"), platforms=("gpu",))
register(_OP, _INTERPRET, imported(f"{_KERNELS}.interpreted:flash"), platforms=("interpret",))
register(_OP, "reference", imported(_REFERENCE), platforms=("cpu", "interpret"))
register(_OP, "reference_wide", _wide_reference, platforms=("gpu",))


def flash_attention(
    q: jax.Array,  # [T, N, H]
    k: jax.Array,  # [S, K, H]
    v: jax.Array,  # [S, K, H]
    query_starts: jax.Array,  # i32[R + 1]
    key_starts: jax.Array | None = None,  # i32[R + 1]; None: as the queries'
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,  # f32[N]
    return_lse: bool = False,
    aligned: bool = False,
    implementation: str | None = None,
    platform: str | None = None,
) -> Any:
    """Causal attention of ragged rows -> [T, N, H]; with `return_lse` also f32[T, N].

    Row r owns q[query_starts[r] : query_starts[r + 1]], the last queries of its keys, which are
    k[key_starts[r] : key_starts[r + 1]]; rows lie in order and may be empty. Tokens at or after query_starts[R] are
    padding and come out 0; keys of no row may hold anything. Window, soft cap, sinks and log-sum-exp as in
    paged_attention. `aligned` promises that every row's keys start at a multiple of 8: then they are read where they
    lie, else a copy of them is.
    """
    check_heads("q[T, N, H]", q, "k[S, K, H]", k, v)
    check_scores(q.shape[1], scale, window, soft_cap, sinks)
    key_starts = query_starts if key_starts is None else key_starts
    for name, starts in (("query_starts", query_starts), ("key_starts", key_starts)):
        if starts.ndim != 1 or starts.shape[0] < 2 or starts.shape != query_starts.shape or starts.dtype != jnp.int32:
            raise ValueError(f"{name} must be i32[R + 1], R at least 1, got {starts.dtype}{list(starts.shape)}")
    run = dispatch(_OP, implementation=implementation, platform=platform)
    options: dict[str, Any] = {"scale": scale, "window": window, "soft_cap": soft_cap, "sinks": sinks}
    return run(q, k, v, query_starts, key_starts, return_lse=return_lse, aligned=aligned, **options)
