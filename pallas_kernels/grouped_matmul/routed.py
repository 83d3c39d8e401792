"""Routed experts by tiles: plan, gate and up with SwiGLU, down, and the weighted sum of each token's choices.

In: tokens, experts' weights, routing. Out: [T, D]. One Triton kernel plans, two of Mosaic stream the weights of the
experts in use once each, what is between them is XLA's. A token's bits do not depend on its batch: tiles only decide
which tensor-core column a token is, sums run along the weights' rows in one order, and choices are added in the token's
own order.
It does not know routers, layers or meshes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import mosaic_sm90
from pallas_kernels.grouped_matmul.api import planned
from pallas_kernels.grouped_matmul.plan import Plan, shared_tile, tile_width

SHARED_TOKENS = 32  # up to here all tokens are one tile; tokens the copy engine re-reads cost more beyond


def routed_mlp(
    x: jax.Array,  # [T, D]
    gate_up: jax.Array,  # [E, 2F, D]
    down: jax.Array,  # [E, D, F]
    expert_ids: jax.Array,  # i32[T, k]
    expert_weights: jax.Array,  # f32[T, k]
    *,
    elsewhere: bool = True,
    blocks: mosaic_sm90.Blocks | None = None,
    shared_tokens: int = SHARED_TOKENS,
    width: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """See api.routed_mlp."""
    T, E = x.shape[0], gate_up.shape[0]
    shared = shared_tokens >= T
    plan = plan_of(expert_ids, E, shared, width, elsewhere, "gpu" if interpret is None else "interpret")
    tiles = x[None] if shared else x.at[plan.tokens].get(mode="clip")
    product = functools.partial(mosaic_sm90.tiles_matmul, blocks=blocks, interpret=interpret)
    hidden = product(tiles, gate_up, plan.experts, plan.live, gated=True)
    out = product(hidden, down, plan.experts, plan.live, gated=False, early=True)
    return combine(out, plan, expert_ids, expert_weights, E if elsewhere else None).astype(x.dtype)


def plan_of(ids: jax.Array, E: int, shared: bool, width: int | None, elsewhere: bool, platform: str) -> Plan:
    """One token whose choices are all here needs no plan: they are the list."""
    T, k = ids.shape
    N = max(8, -(-T // 8) * 8) if shared else width or tile_width(T, k, E)
    if shared and T == 1 and not elsewhere:
        return shared_tile(ids, E, N, elsewhere)
    return planned(ids, E, N, shared=shared, platform=platform)


def combine(out: jax.Array, plan: Plan, expert_ids: jax.Array, expert_weights: jax.Array, E: int | None) -> jax.Array:
    """f32[T, D]: each token's choices, weighted, added in their order; with E, those elsewhere are left out."""
    rows = out.reshape(-1, out.shape[-1])
    total = jnp.zeros((expert_ids.shape[0], out.shape[-1]), jnp.float32)
    for choice in range(expert_ids.shape[1]):
        part = rows.at[plan.place[:, choice]].get(mode="clip").astype(jnp.float32)
        part = part * expert_weights[:, choice, None]
        ids = expert_ids[:, choice, None]
        total += part if E is None else jnp.where((ids >= 0) & (ids < E), part, 0.0)
    return total
