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
from jaxtyping import Array, Bool, Float, Int, UInt

from pallas_kernels.sampling import api
from pallas_kernels.sampling.reference import IN_PROMPT, MOST


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampleInputs:
    """What B rows ask of the sampler.

    Neutral: temperature, top_p, repetition 1; min_p, top_k, presence, frequency 0; bias_ids V; every mask bit set.
    """

    row: Int[Array, " B"]  # line of counts; S for padding
    keys: UInt[Array, "B 2"]
    position: Int[Array, " B"]  # of the token to be drawn
    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    presence: Float[Array, " B"]
    frequency: Float[Array, " B"]
    repetition: Float[Array, " B"]
    top_k: Int[Array, " B"]
    bias_ids: Int[Array, "B Nb"]  # distinct; V = no entry
    bias: Float[Array, "B Nb"]
    mask: UInt[Array, "B Vw"]  # bit t % 32 of word t // 32 = token t allowed


class Sampled(NamedTuple):
    """One entry a row. A bad row had a logit that was not finite, or no allowed token: its other entries are void."""

    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    rank: Int[Array, " B"]  # 1 = the most likely token
    top_ids: Int[Array, "B n"]  # the n = num_logprobs most likely, best first
    top_logprobs: Float[Array, "B n"]
    counts: UInt[Array, "S1 V"]
    bad: Bool[Array, " B"]


def sample(
    logits: Float[Array, "B V"],
    inputs: SampleInputs,
    counts: UInt[Array, "S1 V"],
    *,
    num_logprobs: int,
    truncates: bool = True,
    implementation: str | None = None,
) -> Sampled:
    """Draw one token a row and add it to the row's counts; a bad row adds nothing.

    `truncates` false: no row asks for top_k, top_p or min_p.
    """
    penalties = inputs.repetition, inputs.frequency, inputs.presence
    asked = inputs.row, inputs.mask, inputs.bias_ids, inputs.bias, *penalties
    limits = inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p
    keys = position_keys(inputs.keys, inputs.position)
    token, bad = api.draw(logits, counts, *asked, keys, *limits, truncates=truncates, implementation=implementation)
    logprob, rank, top_ids, top_logprobs = token_logprobs(logits, token, num_logprobs)
    return Sampled(token, logprob, rank, top_ids, top_logprobs, _add(counts, inputs.row, token, bad), bad)


def token_logprobs(
    logits: Float[Array, "B V"], token: Int[Array, " B"], num_logprobs: int
) -> tuple[Float[Array, " B"], Int[Array, " B"], Int[Array, "B n"], Float[Array, "B n"]]:
    """Logprob and rank of each row's token, and the ids and logprobs of the num_logprobs most likely, best first."""
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)
    total = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    rank = (logits > chosen).sum(axis=1, dtype=jnp.int32) + 1
    top, top_ids = jax.lax.top_k(logits, num_logprobs)
    return (chosen - total)[:, 0], rank, top_ids.astype(jnp.int32), top - total


def position_keys(keys: UInt[Array, "B 2"], position: Int[Array, " B"]) -> UInt[Array, "B 2"]:
    """Each position of a request has a key of its own."""

    def one(key: Array, data: Array) -> Array:
        folded = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), data)
        return jax.random.key_data(folded)

    return jax.vmap(one)(keys, position.astype(jnp.uint32))


def set_counts(
    counts: UInt[Array, "S1 V"],
    row: Int[Array, ""],
    token_ids: Int[Array, " C"],
    n: Int[Array, ""],  # how many of token_ids count
    in_prompt: Bool[Array, ""],  # whether they are prompt or generated
    fresh: Bool[Array, ""] | bool = False,  # forget the row's counts first
) -> UInt[Array, "S1 V"]:
    """Add a chunk of a sequence's tokens to its row's counts, as a row is admitted or resumed."""
    V = counts.shape[1]
    index = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
    times = jnp.zeros(V, jnp.int32).at[jnp.where(index < n, token_ids, V)].add(1, mode="drop")
    old = jnp.where(fresh, 0, counts[row].astype(jnp.int32))
    generated = jnp.minimum((old & MOST) + jnp.where(in_prompt, 0, times), MOST)
    prompt = (old & IN_PROMPT) | jnp.where(in_prompt & (times > 0), IN_PROMPT, 0)
    return counts.at[row].set((generated | prompt).astype(counts.dtype))


def _add(
    counts: UInt[Array, "S1 V"], row: Int[Array, " B"], token: Int[Array, " B"], bad: Bool[Array, " B"]
) -> UInt[Array, "S1 V"]:
    old = counts[row, token]
    new = jnp.where(old & MOST < MOST, old + 1, old)
    return counts.at[jnp.where(bad, counts.shape[0], row), token].set(new, mode="drop")
