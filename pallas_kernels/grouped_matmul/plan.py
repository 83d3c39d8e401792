"""How routed tokens become tiles of one expert each, on the device, in a few XLA kernels.

In: which experts each token goes to. Out: a Plan: which expert every tile is for, how many tiles there are, where each
(token, choice) pair's result lies among the tiles' rows, and, when tiles hold their own tokens, which token fills each
row. Few tokens are one tile that every expert in use sees whole: its other rows are computed for nothing, which is
cheaper than sorting. Many tokens are ordered by expert, each expert's share padded to whole tiles.
An expert number outside 0..E-1 (another device's expert) takes part in nothing. It does not know weights or kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

COMPARED_PAIRS = 2048  # up to here pairs are ranked by comparing all with all
BLOCK_PAIRS = 512  # beyond, those of a block of this many


class Plan(NamedTuple):
    """`tokens` is None when every tile is of the same tokens."""

    experts: jax.Array  # i32[tiles]; past the live ones: in range, of no meaning
    live: jax.Array  # i32[1]: how many
    place: jax.Array  # i32[T, k]: row of a pair's result among [tiles * N]; of no meaning for pairs that take no part
    tokens: jax.Array | None  # i32[tiles, N]: in range; 0 in padding


def shared_tile(expert_ids: jax.Array, E: int, N: int, elsewhere: bool = True) -> Plan:
    """One tile holds all T <= N tokens; every expert in use sees it. `elsewhere`: numbers may lie outside 0..E-1."""
    T, k = expert_ids.shape
    if T == 1 and not elsewhere:
        place = N * jnp.arange(k, dtype=jnp.int32)
        return Plan(expert_ids[0], jnp.full((1,), k, jnp.int32), place[None], None)
    if T == 1:  # a token's choices are distinct, so they are the list; those that take no part go last
        ids = expert_ids[0]
        local = (ids >= 0) & (ids < E)
        rank = jnp.where(local, jnp.cumsum(local, dtype=jnp.int32) - 1, k)
        choice = jnp.arange(k, dtype=jnp.int32)
        experts = jnp.where(rank[None, :] == choice[:, None], ids[None, :], 0).sum(axis=1, dtype=jnp.int32)
        return Plan(experts, local.sum(dtype=jnp.int32)[None], (jnp.minimum(rank, k - 1) * N)[None], None)
    tiles = min(E, T * k)
    every = jnp.arange(E, dtype=jnp.int32)
    used = (expert_ids.reshape(-1)[:, None] == every[None, :]).any(axis=0)
    rank = jnp.where(used[None, :] & (every[None, :] < every[:, None]), 1, 0).sum(axis=1, dtype=jnp.int32)
    tile = jnp.arange(tiles, dtype=jnp.int32)
    experts = jnp.where((rank[None, :] == tile[:, None]) & used[None, :], every[None, :], 0).sum(
        axis=1, dtype=jnp.int32
    )
    token = jnp.arange(T, dtype=jnp.int32)[:, None]
    place = rank.at[expert_ids].get(mode="clip") * N + token
    return Plan(experts, used.sum(dtype=jnp.int32)[None], jnp.minimum(place, tiles * N - 1), None)


def most_tiles(pairs: int, E: int, N: int) -> int:
    """What sorted pairs can fill: whole tiles, and one begun by every expert that has any."""
    return max(1, (pairs - min(E, pairs)) // N + min(E, pairs))


def sorted_tiles(expert_ids: jax.Array, E: int, N: int) -> Plan:
    """Each expert's pairs, in token order, fill tiles of their own."""
    T, k = expert_ids.shape
    P, tiles = T * k, most_tiles(T * k, E, N)
    ids = expert_ids.reshape(P)
    ids = jnp.where((ids >= 0) & (ids < E), ids, E)
    every = jnp.arange(E, dtype=jnp.int32)
    sizes = (ids[:, None] == every[None, :]).sum(axis=0, dtype=jnp.int32)
    filled = (sizes + N - 1) // N
    ends = jnp.cumsum(filled, dtype=jnp.int32)
    starts = ends - filled
    tile = jnp.arange(tiles, dtype=jnp.int32)
    experts = jnp.minimum((ends[None, :] <= tile[:, None]).sum(axis=1, dtype=jnp.int32), E - 1)
    row = starts.at[ids].get(mode="clip") * N + _rank_within(ids, E)
    row = jnp.where(ids < E, row, tiles * N)
    token = jnp.arange(P, dtype=jnp.int32) // k
    tokens = jnp.zeros(tiles * N, jnp.int32).at[row].set(token, mode="drop")
    place = jnp.minimum(row, tiles * N - 1).reshape(T, k)
    live = filled.sum(dtype=jnp.int32)[None]  # not a slice, which XLA may hand over in place: kernels want it aligned
    return Plan(experts, live, place, tokens.reshape(tiles, N))


def tiles(expert_ids: jax.Array, E: int, N: int, *, shared: bool) -> Plan:
    """See api.planned."""
    return shared_tile(expert_ids, E, N) if shared else sorted_tiles(expert_ids, E, N)


def _rank_within(ids: jax.Array, E: int) -> jax.Array:
    """How many earlier pairs have the same expert: of the same block by comparing, of earlier ones by counting."""
    P = ids.shape[0]
    size = P if P <= COMPARED_PAIRS else BLOCK_PAIRS
    blocks = jnp.pad(ids, (0, -P % size), constant_values=E).reshape(-1, size)
    index = jnp.arange(size, dtype=jnp.int32)
    same = (blocks[:, None, :] == blocks[:, :, None]) & (index[None, :] < index[:, None])
    rank = same.sum(axis=2, dtype=jnp.int32)
    if size < P:
        counts = (blocks[:, :, None] == jnp.arange(E + 1, dtype=jnp.int32)).sum(axis=1, dtype=jnp.int32)
        rank += jnp.take_along_axis(jnp.cumsum(counts, axis=0, dtype=jnp.int32) - counts, blocks, axis=1)
    return rank.reshape(-1)[:P]


def tile_width(T: int, k: int, E: int) -> int:
    """Tokens a tile of sorted pairs.

    While weights take longer to read than tiles to compute, a tile holds twice an expert's usual share, so that few
    experts' weights are read twice; beyond, what tiles hold in vain is kept small.
    """
    share = pl.cdiv(T * k, E)
    doubled, single = (pl.next_power_of_2(max(1, tokens)) for tokens in (2 * share, share))
    return max(8, doubled) if doubled <= 64 else min(128, max(64, single))
