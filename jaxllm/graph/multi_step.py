"""Several decode steps in one executable: what one samples the next computes, and the host sees all of them at the end.

In: what a decode step takes, and what its sampler takes, for rows of which nothing changes between the steps; their
pages have room for all of them. Out: the tokens of every step, and the same state, updated in place. The steps are one
loop with a trip count that the compiler knows: compiled once, and launched without asking the device. Knows nothing of
sequences, nor of who decides that nothing changes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt

from jaxllm.graph.inputs import StepShape, one_a_row, unpack
from jaxllm.graph.kv_cache import KVCache
from jaxllm.graph.models.decoder import Params
from jaxllm.graph.steps import Graph, SampleMode, draw, forward

MODES = (SampleMode.GREEDY, SampleMode.RANDOM, SampleMode.SAMPLE)  # an executable each; others go step by step

Carry = tuple[Array, Array, KVCache, Array | None]  # tokens, lengths, pages, counts


class MultiStepped(NamedTuple):
    token_ids: Int[Array, "steps R"]  # -1: the row's logits held NaN or infinity
    kv: KVCache
    page_table: Int[Array, "S1 W"]
    last_tokens: Int[Array, " S1"]
    counts: UInt[Array, "S1 V"] | None  # None where nothing is counted: greedy


def multi_step(
    graph: Graph,
    shape: StepShape,
    steps: int,
    mode: SampleMode,
    params: Params,
    kv: KVCache,
    page_table: Int[Array, "S1 W"],
    last_tokens: Int[Array, " S1"],
    packed: Int[Array, " n"],
    counts: UInt[Array, "S1 V"] | None = None,
    *asked: Array,
) -> MultiStepped:
    """`asked`: a sampler's packed rows, biases and masks, as of the first step."""
    size = {"page_size": graph.page_size, "num_pages": graph.num_pages}
    first, table = unpack(shape, packed, last_tokens, page_table, **size)
    live = (first.kv_lens > 0).astype(jnp.int32)
    exchange = graph.exchange()

    def one(carry: Carry, _: None) -> tuple[Carry, Array]:
        tokens, kv_lens, kv, counts = carry
        inputs = one_a_row(tokens, kv_lens, first.state_rows, first.page_table, **size)
        logits, kv = forward(graph, shape, params, kv, inputs)[:2]
        if counts is None:
            tokens, bad = exchange.greedy(logits)
            told = jnp.where(bad, -1, tokens)
        else:
            sampled, tokens, counts = draw(exchange, mode, counts, logits, *asked, position=kv_lens)
            told = sampled.token_ids
        return (tokens, kv_lens + live, kv, counts), told

    begin = first.token_ids, first.kv_lens, list(kv), counts
    (tokens, _, kv, counts), told = jax.lax.scan(one, begin, length=steps)
    # Away from the loop's own memory: what the loop writes then has one address for ever, as CUDA graphs want it.
    told = jnp.maximum(told, -1)
    return MultiStepped(told, kv, table, last_tokens.at[first.state_rows].set(tokens), counts)
