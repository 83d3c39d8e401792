"""Greedy generation for many prompts at once with a dense KV cache; for evaluation at training time.

In: parameters and prompts as token ids. Out: generated token ids, without the end token. It knows nothing of pages
or scheduling, which makes it an independent check of the engine.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import Decoder, Params, merge
from pallas_kernels.rope_page_write.heads import Heads
from pallas_kernels.rope_page_write.reference import separated
from tools.train.model import masked_attention

type Cache = list[tuple[jax.Array, jax.Array]]
type Carry = tuple[jax.Array, jax.Array, jax.Array, jax.Array, Cache]  # count, token, done, out, cache


def _advance(
    model: Decoder, cache: Cache, token_ids: Int[Array, "B T"], positions: Int[Array, "B T"], last: Int[Array, " B"]
) -> tuple[Int[Array, " B"], Cache]:
    """Write the tokens' keys and values at their positions; the most likely token after column `last` of each row."""
    config, grown = model.config, list(cache)
    rows = jnp.arange(token_ids.shape[0])
    visible = jnp.arange(cache[0][0].shape[1])[None, None, :] <= positions[:, :, None]

    def attend(layer: int, heads: Heads) -> jax.Array:
        q, k, v = separated(heads)
        keys, values = (
            kept.at[rows[:, None], positions].set(new) for kept, new in zip(grown[layer], (k, v), strict=True)
        )
        grown[layer] = keys, values
        return masked_attention(config, q, keys, values, visible)

    hidden = model(token_ids, positions, attend)
    logits = model.logits(hidden[rows, last])
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), grown


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new", "stops"))
def _generate(
    graphdef: nnx.GraphDef[Decoder], params: Params, prompts: jax.Array, lengths: jax.Array, max_new: int, stops: tuple[int, ...]
) -> jax.Array:  # fmt: skip
    model = merge(graphdef, params)
    config: ModelConfig = model.config
    batch, width = prompts.shape
    shape = (batch, width + max_new, config.num_kv_heads, config.head_dim)
    dtype = jax.tree.leaves(params)[0].dtype
    cache: Cache = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)]
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), prompts.shape)
    token, cache = _advance(model, cache, prompts, positions, lengths - 1)
    out = jnp.full((batch, max_new), stops[0], jnp.int32)
    ends = jnp.asarray(stops, jnp.int32)

    def unfinished(carry: Carry) -> jax.Array:
        count, _, done, _, _ = carry
        return (count < max_new) & ~jnp.all(done)

    def one(carry: Carry) -> Carry:
        count, token, done, out, cache = carry
        done = done | jnp.any(token[:, None] == ends, axis=-1)
        out = out.at[:, count].set(jnp.where(done, ends[0], token))
        # A padded prompt's unused keys are overwritten one by one: position p is written before it is visible.
        place = (lengths + count)[:, None]
        token, cache = _advance(model, cache, token[:, None], place, jnp.zeros_like(lengths))
        return count + 1, token, done, out, cache

    carry = (jnp.zeros((), jnp.int32), token, jnp.zeros((batch,), jnp.bool_), out, cache)
    return jax.lax.while_loop(unfinished, one, carry)[3]


def generate(
    graphdef: nnx.GraphDef[Decoder], params: Params, prompts: Sequence[Sequence[int]], *, max_new: int,
    stops: tuple[int, ...], batch: int = 128,
) -> list[list[int]]:  # fmt: skip
    """Greedy continuations, in the order of the prompts; prompts of like length run together."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for begin in range(0, len(order), batch):
        chosen = order[begin : begin + batch]
        width = next(w for w in (192, 512, 1024, 2048) if w >= len(prompts[chosen[-1]]))
        ids = np.zeros((batch, width), np.int32)
        lengths = np.ones((batch,), np.int32)
        for row, index in enumerate(chosen):
            ids[row, : len(prompts[index])] = prompts[index]
            lengths[row] = len(prompts[index])
        out = np.asarray(_generate(graphdef, params, jnp.asarray(ids), jnp.asarray(lengths), max_new, stops))
        for row, index in enumerate(chosen):
            ended = np.flatnonzero(np.isin(out[row], stops))
            answers[index] = out[row, : ended[0] if ended.size else max_new].tolist()
    return answers
