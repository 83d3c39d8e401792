"""A router's softmax, choice and weights in one Pallas-Triton kernel: a token a program, an expert a lane.

In: logits, already checked by api.py. Out: each token's experts, best first, and their weights. The largest probability
is taken k times; ties go to the lower number, as in lax.top_k. XLA needs three kernels for this, which a decode step of
one token feels in every layer. It does not know weights or tiles.

This is the lowering JAX 0.11 deprecates; the reference takes its place without it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

MOST_EXPERTS = 1024  # held by one program's 4 warps
MOST_CHOICES = 16  # unrolled


def route(
    logits: jax.Array,  # f32[T, E]
    *,
    k: int,
    norm_topk: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See api.route."""
    T, E = logits.shape
    if E > MOST_EXPERTS or k > MOST_CHOICES:
        raise NotImplementedError(f"{k} of {E} experts: at most {MOST_CHOICES} of {MOST_EXPERTS}")
    return pl.pallas_call(
        functools.partial(_kernel, E=E, k=k, norm_topk=norm_topk),
        name="grouped_route",
        grid=(T,),
        in_specs=[pl.no_block_spec],
        out_specs=[pl.no_block_spec] * 2,
        out_shape=[jax.ShapeDtypeStruct((T, k), jnp.int32), jax.ShapeDtypeStruct((T, k), jnp.float32)],
        compiler_params=plt.CompilerParams(num_warps=1 if E <= 256 else 4, num_stages=1),
        interpret=interpret,
    )(logits)


def _kernel(logits: Any, ids: Any, weights: Any, *, E: int, k: int, norm_topk: bool) -> None:
    token, expert = pl.program_id(0), jnp.arange(pl.next_power_of_2(E))
    found = plt.load(logits.at[token, expert], mask=expert < E, other=-jnp.inf)
    likely = jnp.exp(found - found.max())
    likely = likely / likely.sum()
    left = jnp.where(expert < E, likely, -1.0)
    chosen = []
    for _ in range(k):
        best = left.max()
        number = jnp.where(left == best, expert, E).min()
        left = jnp.where(expert == number, -2.0, left)
        chosen.append((number, best))
    total = sum(best for _, best in chosen) if norm_topk else jnp.float32(1)
    for choice, (number, best) in enumerate(chosen):
        lost = number >= E  # a logit was NaN: so is every weight, and the number must only be in range
        ids[token, choice] = jnp.where(lost, 0, number)
        weights[token, choice] = jnp.where(lost, jnp.nan, best / total)
