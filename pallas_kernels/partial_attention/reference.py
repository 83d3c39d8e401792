"""Attention over the leading keys of a row's pages, with its log-sum-exp, in plain jnp.

In: arguments checked by api.py. Out: f32. An online softmax over blocks of keys; queries take turns in groups, so that
no [T, keys] array exists.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

BLOCK_KEYS = 256
QUERIES = 64  # that attend at one time
LOWEST = -1e30  # finite, so that a query that sees no key computes no inf - inf


def partial_attention(
    q: jax.Array,  # [T, N, H]
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,  # [P, K, page_size, H]
    page_table: jax.Array,  # i32[R, W]
    rows: jax.Array,  # i32[T]
    visible: jax.Array,  # i32[T]
    *,
    scale: float,
    query_starts: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See api.partial_attention; `rows` says all that `query_starts` does."""
    del query_starts
    total = q.shape[0]
    group = min(QUERIES, total)
    pad = -total % group

    def cut(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, pad), *[(0, 0)] * (x.ndim - 1))).reshape(-1, group, *x.shape[1:])

    def one(args: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        pages = (k_pages, k_scale), (v_pages, v_scale)
        return _group(args[0], *pages, page_table[args[1]], args[2], scale)

    out, lse = lax.map(one, (cut(q), cut(rows), cut(visible)))
    return out.reshape(-1, *q.shape[1:])[:total], lse.reshape(-1, q.shape[1])[:total]


type _Scaled = tuple[jax.Array, jax.Array | None]  # pages, and f32[K] or None


def _group(
    q: jax.Array, keys: _Scaled, values: _Scaled, table: jax.Array, visible: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """q [G, N, H], each query with its own row of the table [G, W]."""
    G, N, H = q.shape
    _, K, page_size, _ = keys[0].shape
    pages = max(1, BLOCK_KEYS // page_size)
    block, W = pages * page_size, table.shape[1]
    grouped = q.reshape(G, K, N // K, H)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT

    def one_block(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        accumulated, highest, total = carry
        page = step * pages + jnp.arange(pages, dtype=jnp.int32)
        held = page[None] * page_size < visible[:, None]  # [G, pages]
        ids = jnp.where(held, table[:, jnp.minimum(page, W - 1)], 0)
        seen = step * block + jnp.arange(block, dtype=jnp.int32)[None] < visible[:, None]  # [G, block]

        def gathered(pages: jax.Array, factor: jax.Array | None) -> jax.Array:  # [G, K, block, H]
            found = pages[ids].swapaxes(1, 2).reshape(G, K, block, H)
            if factor is not None:
                found = found.astype(jnp.float32) * factor[:, None, None]
            found = found.astype(q.dtype)
            return jnp.where(seen[:, None, :, None], found, jnp.zeros((), q.dtype))  # 0 * NaN would be NaN

        k, v = gathered(*keys), gathered(*values)
        scores = jnp.einsum("gkmh,gksh->gkms", grouped, k, preferred_element_type=jnp.float32, precision=precision)
        scores = jnp.where(seen[:, None, None], scores * scale, LOWEST)
        new_highest = jnp.maximum(highest, scores.max(axis=-1))
        shrink = jnp.exp(highest - new_highest)
        weights = jnp.where(seen[:, None, None], jnp.exp(scores - new_highest[..., None]), 0.0)
        added = jnp.einsum(
            "gkms,gksh->gkmh", weights.astype(q.dtype), v, preferred_element_type=jnp.float32, precision=precision
        )
        return accumulated * shrink[..., None] + added, new_highest, total * shrink + weights.sum(axis=-1)

    shape = (G, K, N // K)
    nothing = jnp.zeros((*shape, H), jnp.float32), jnp.full(shape, LOWEST, jnp.float32), jnp.zeros(shape, jnp.float32)
    accumulated, highest, total = lax.fori_loop(0, (visible.max() + block - 1) // block, one_block, nothing)
    some = total > 0
    out = accumulated / jnp.where(some, total, 1.0)[..., None]
    lse = jnp.where(some, highest + jnp.log(jnp.where(some, total, 1.0)), LOWEST)
    return out.reshape(G, N, H), lse.reshape(G, N)
