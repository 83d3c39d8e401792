"""From logits to tokens under jit: logprobs, masks, biases, penalties, the draw, and the counts penalties need.

In: logits of the rows that sample, what their requests asked for (SampleInputs), and `counts`, the rows' device state.
Out: tokens, their logprobs, the counts with the tokens added, and which rows went wrong. The order is vLLM V1's:
logprobs are of the raw logits; then mask, bias, penalties (repetition, frequency, presence), temperature, min_p, top_k,
top_p and the draw, which `pallas_kernels.sampling` does. A row's random numbers come from its key and position alone.
This module does not know requests, steps or which rows sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.sampling import api
from pallas_kernels.sampling.reference import first_argmax

IN_PROMPT = 1 << 15  # high bit of a count: the token occurs in the prompt
MOST = IN_PROMPT - 1  # the rest of it: how often the token was generated, at most this


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampleInputs:
    """What B rows ask of the sampler. Neutral values: temperature 1, top_p 1, min_p 0, top_k 0, presence 0,
    frequency 0, repetition 1, bias_ids V, every mask bit set.
    """

    row: jax.Array  # i32[B], the row's line in counts; S for rows that are padding
    keys: jax.Array  # u32[B, 2]
    position: jax.Array  # i32[B], of the token to be drawn
    temperature: jax.Array  # f32[B]
    top_p: jax.Array  # f32[B]
    min_p: jax.Array  # f32[B]
    presence: jax.Array  # f32[B]
    frequency: jax.Array  # f32[B]
    repetition: jax.Array  # f32[B]
    top_k: jax.Array  # i32[B]
    bias_ids: jax.Array  # i32[B, Nb], distinct; V = no entry
    bias: jax.Array  # f32[B, Nb]
    mask: jax.Array  # u32[B, ceil(V / 32)], bit t % 32 of word t // 32 = token t allowed


class Sampled(NamedTuple):
    token: jax.Array  # i32[B]
    logprob: jax.Array  # f32[B], of the token
    rank: jax.Array  # i32[B], 1 = the most likely token
    top_ids: jax.Array  # i32[B, num_logprobs], most likely first
    top_logprobs: jax.Array  # f32[B, num_logprobs]
    counts: jax.Array  # u16[S + 1, V]
    bad: jax.Array  # bool[B], a logit was not finite or no token was allowed: everything else of the row is void


def greedy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f32[B, V] -> the largest logit's token i32[B], the lowest among ties; bad bool[B]."""
    return first_argmax(logits), ~jnp.isfinite(logits).all(axis=1)


def sample(
    logits: jax.Array,  # f32[B, V]
    inputs: SampleInputs,
    counts: jax.Array,  # u16[S + 1, V]
    *,
    num_logprobs: int,
    implementation: str | None = None,
) -> Sampled:
    """Draw one token a row and add it to the row's counts; a bad row adds nothing."""
    bad = ~jnp.isfinite(logits).all(axis=1)
    logits = jnp.where(bad[:, None], 0.0, logits)
    adjusted = _adjusted(logits, inputs, counts[inputs.row])
    bad |= ~jnp.isfinite(adjusted.max(axis=1))
    token = api.sample(
        adjusted,
        position_keys(inputs.keys, inputs.position),
        inputs.temperature,
        inputs.top_k,
        inputs.top_p,
        inputs.min_p,
        implementation=implementation,
    )
    logprob, rank, top_ids, top_logprobs = logprobs(logits, token, num_logprobs=num_logprobs)
    return Sampled(token, logprob, rank, top_ids, top_logprobs, _add(counts, inputs.row, token, bad), bad)


def logprobs(
    logits: jax.Array,  # f32[B, V]
    token: jax.Array,  # i32[B]
    *,
    num_logprobs: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Logprob and rank of each row's token, and the ids and logprobs of the num_logprobs most likely, best first."""
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)
    total = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    rank = (logits > chosen).sum(axis=1, dtype=jnp.int32) + 1
    top, top_ids = jax.lax.top_k(logits, num_logprobs)
    return (chosen - total)[:, 0], rank, top_ids.astype(jnp.int32), top - total


def position_keys(keys: jax.Array, position: jax.Array) -> jax.Array:
    """u32[B, 2], i32[B] -> u32[B, 2]: each position of a request has a key of its own."""

    def one(key: jax.Array, data: jax.Array) -> jax.Array:
        folded = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), data)
        return jax.random.key_data(folded)

    return jax.vmap(one)(keys, position.astype(jnp.uint32))


def set_counts(
    counts: jax.Array,  # u16[S + 1, V]
    row: jax.Array,  # i32[]
    token_ids: jax.Array,  # i32[C]
    n: jax.Array,  # i32[], how many of token_ids count
    in_prompt: jax.Array,  # bool[], whether they are prompt or generated
    *,
    fresh: jax.Array | bool = False,  # bool[], forget the row's counts first
) -> jax.Array:
    """Add a chunk of a sequence's tokens to its row's counts, as a row is admitted or resumed."""
    V = counts.shape[1]
    index = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
    times = jnp.zeros(V, jnp.int32).at[jnp.where(index < n, token_ids, V)].add(1, mode="drop")
    old = jnp.where(fresh, 0, counts[row].astype(jnp.int32))
    generated = jnp.minimum((old & MOST) + jnp.where(in_prompt, 0, times), MOST)
    prompt = (old & IN_PROMPT) | jnp.where(in_prompt & (times > 0), IN_PROMPT, 0)
    return counts.at[row].set((generated | prompt).astype(counts.dtype))


def _adjusted(logits: jax.Array, inputs: SampleInputs, counts: jax.Array) -> jax.Array:
    """Mask, bias and penalties; counts are the rows' own, u16[B, V]."""
    B, V = logits.shape
    bits = inputs.mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    logits = jnp.where(bits.reshape(B, -1)[:, :V] == 1, logits, -jnp.inf)
    rows = jnp.arange(B, dtype=jnp.int32)[:, None]
    logits = logits.at[rows, inputs.bias_ids].add(inputs.bias, mode="drop")
    repetition = inputs.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(counts > 0, repeated, logits)
    generated = (counts & MOST).astype(jnp.float32)
    logits = logits - inputs.frequency[:, None] * generated
    return logits - inputs.presence[:, None] * (generated > 0).astype(jnp.float32)


def _add(counts: jax.Array, row: jax.Array, token: jax.Array, bad: jax.Array) -> jax.Array:
    old = counts[row, token]
    new = jnp.where(old & MOST < MOST, old + 1, old)
    return counts.at[jnp.where(bad, counts.shape[0], row), token].set(new, mode="drop")
