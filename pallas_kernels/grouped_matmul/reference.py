"""Routed experts in plain jnp: one expert after another over all tokens, each token weighted by its choice of it.

In: tokens, experts' weights, each token's experts and their weights. Out: the weighted sum of the experts' outputs.
An expert that no token chose is skipped, whatever is promised. It does not know how tokens were routed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def route(logits: jax.Array, *, k: int, norm_topk: bool) -> tuple[jax.Array, jax.Array]:
    """See api.route."""
    weights, ids = lax.top_k(jax.nn.softmax(logits, axis=-1), k)
    return ids, weights / weights.sum(axis=-1, keepdims=True) if norm_topk else weights


def routed_mlp(
    x: jax.Array,  # [T, D]
    gate_up: jax.Array,  # [E, 2F, D]
    down: jax.Array,  # [E, D, F]
    expert_ids: jax.Array,  # i32[T, k]
    expert_weights: jax.Array,  # f32[T, k]
    *,
    elsewhere: bool = True,
) -> jax.Array:
    """See api.routed_mlp."""
    E = gate_up.shape[0]
    chosen = expert_ids[:, :, None] == jnp.arange(E, dtype=jnp.int32)  # [T, k, E]
    share = jnp.where(chosen, expert_weights[:, :, None], 0.0).sum(axis=1)
    counts = chosen.any(axis=1)

    def add_expert(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        mine = counts[:, number]

        def add(total: jax.Array) -> jax.Array:
            out = mlp(x, gate_up[number], down[number]).astype(jnp.float32)
            return total + jnp.where(mine[:, None], out * share[:, number][:, None], 0.0)

        return lax.cond(mine.any(), add, lambda total: total, total), None

    total, _ = lax.scan(add_expert, jnp.zeros(x.shape, jnp.float32), jnp.arange(E, dtype=jnp.int32))
    return total.astype(x.dtype)


def mlp(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    """One expert: down(silu(gate x) * up x), rounded to x's dtype between the products and after."""
    gate, up = jnp.split(_product(x, gate_up), 2, axis=-1)
    return _product((jax.nn.silu(gate) * up).astype(x.dtype), down).astype(x.dtype)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x @ weight.T in f32; a GPU would run f32 operands as TF32 by default."""
    precision = lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x, weight, contract, precision=precision, preferred_element_type=jnp.float32)
