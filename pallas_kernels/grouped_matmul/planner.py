"""How routed tokens become tiles, as one Pallas-Triton kernel: an expert a program.

In: which experts each token goes to, already checked. Out: the same Plan that plan.py makes of XLA kernels, of which a
decode step feels five to ten in every layer. Every program counts all experts' pairs, so that it knows where its own
tiles begin, and writes those. It does not know weights or routers.

This is the lowering JAX 0.11 deprecates; plan.py has the same in XLA's kernels, and is taken for what is too many here.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.grouped_matmul.plan import Plan, most_tiles

MOST_EXPERTS = 256
MOST_PAIRS = 2048  # that every program counts; beyond, several kernels are faster
BLOCK = 128  # pairs counted at one time
NOWHERE = 1 << 30


def tiles(expert_ids: jax.Array, E: int, N: int, *, shared: bool, interpret: bool = False) -> Plan:
    """plan.shared_tile, or plan.sorted_tiles with tiles of N tokens. NotImplementedError for what is too many."""
    T, k = expert_ids.shape
    P = T * k
    if E > MOST_EXPERTS or P > MOST_PAIRS:
        raise NotImplementedError(f"{P} choices of {E} experts: at most {MOST_PAIRS} of {MOST_EXPERTS}")
    most = min(E, P) if shared else most_tiles(P, E, N)
    rows = 1 if shared else most * N
    experts, live, place, tokens = pl.pallas_call(
        functools.partial(_kernel, E=E, N=N, k=k, P=P, most=most, rows=rows, shared=shared),
        name="grouped_plan",
        grid=(E,),
        in_specs=[pl.no_block_spec],
        out_specs=[pl.no_block_spec] * 4,
        out_shape=[jax.ShapeDtypeStruct((size,), jnp.int32) for size in (most, 1, P, rows)],
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
    )(expert_ids.reshape(P))
    return Plan(experts, live, place.reshape(T, k), None if shared else tokens.reshape(most, N))


def _kernel(
    ids: Any, experts: Any, live: Any, place: Any, tokens: Any, *, E: int, N: int, k: int, P: int, most: int, rows: int,
    shared: bool,
) -> None:  # fmt: skip
    own = pl.program_id(0)
    every = jnp.arange(pl.next_power_of_2(E))

    def count(block: jax.Array, counted: jax.Array) -> jax.Array:
        pair = block * BLOCK + jnp.arange(BLOCK)
        return counted + (_of(ids, pair, P)[None, :] == every[:, None]).astype(jnp.int32)

    counted = lax.fori_loop(0, pl.cdiv(P, BLOCK), count, jnp.zeros((every.size, BLOCK), jnp.int32))
    sizes = jnp.where(every < E, counted.sum(axis=1), 0)
    filled = jnp.minimum(sizes, 1) if shared else (sizes + N - 1) // N
    total, first = filled.sum(), jnp.where(every < own, filled, 0).sum()
    size, mine = (jnp.where(every == own, each, 0).sum() for each in (sizes, filled))

    tile = jnp.arange(pl.next_power_of_2(1 if shared else pl.cdiv(P, N)))
    _store(experts, first + tile, own, tile < mine)
    rest = own + E * jnp.arange(pl.next_power_of_2(pl.cdiv(most, E)))
    _store(experts, rest, E - 1, (rest >= total) & (rest < most))
    _store(live, jnp.zeros(1, jnp.int32), total, own == 0)

    pair = jnp.arange(pl.next_power_of_2(P))
    found = _of(ids, pair, P)
    chosen = (found == own) & (pair < P)
    within = pair // k if shared else jnp.cumsum(chosen.astype(jnp.int32)) - 1
    row = first * N + within
    _store(place, pair, row, chosen)
    _store(place, pair, 0, ((found < 0) | (found >= E)) & (pair < P) & (own == 0))
    if not shared:
        _store(tokens, row, pair // k, chosen)
        unused = jnp.arange(N)
        _store(tokens, first * N + size + unused, 0, size + unused < mine * N)
        dead = own + E * jnp.arange(pl.next_power_of_2(pl.cdiv(rows, E)))
        _store(tokens, dead, 0, (dead >= total * N) & (dead < rows))


def _of(ids: Any, pair: jax.Array, P: int) -> jax.Array:
    """Experts of these pairs; -1 past the last."""
    return plt.load(ids.at[jnp.minimum(pair, P - 1)], mask=pair < P, other=-1)


def _store(ref: Any, at: jax.Array, value: Any, mask: jax.Array) -> None:
    mask = jnp.broadcast_to(mask, at.shape)
    at = jnp.where(mask, at, NOWHERE)  # not 0: the interpreter stores what was there for those that are masked
    plt.store(ref.at[at], jnp.broadcast_to(value, at.shape).astype(jnp.int32), mask=mask)
