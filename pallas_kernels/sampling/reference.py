"""Sampling from logits in plain jnp, without sorting the vocabulary: exact top-k, top-p and min-p by threshold search.

In: logits, already penalised, biased and masked; a key and parameters a row. Out: one token a row.
A token survives when its logit, seen as an integer of the same order, reaches a threshold; the k-th largest integer,
and the largest integer above which enough mass lies, are found bit by bit in 32 passes over the row. One Gumbel-max
draw follows. It does not know requests, steps or slots: a row's token is a function of the row alone.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

IN_PROMPT = 1 << 15  # high bit of a count: the token occurs in the prompt
MOST = IN_PROMPT - 1  # the rest of it: how often the token was generated, at most this
_LANES = 128  # sums run down columns of this many, which vectorises, and in an order that no batch changes


def sample(
    logits: jax.Array,  # f32[B, V]
    keys: jax.Array,  # u32[B, 2]
    temperature: jax.Array,  # f32[B]
    top_k: jax.Array,  # i32[B]
    top_p: jax.Array,  # f32[B]
    min_p: jax.Array,  # f32[B]
    best: jax.Array,  # f32[B]
    *,
    truncates: bool = True,
) -> jax.Array:
    """See api.sample."""
    greedy = temperature == 0
    # Subtracting first keeps the quotient finite at any temperature; the most likely token stays at exactly 0.
    scaled = (logits - best[:, None]) / jnp.where(greedy, 1.0, temperature)[:, None]
    noisy = _noisy(logits, scaled, keys, greedy)
    if not truncates:
        return first_argmax(noisy)
    weights = jnp.exp(scaled)  # relative to the most likely token's
    order = jnp.where(weights >= min_p[:, None], ordered_bits(logits), jnp.uint32(0))
    limited = (top_k > 0) & (top_k < logits.shape[1]) & ~greedy
    threshold = lax.cond(
        limited.any(),
        lambda: jnp.where(limited, _kth_largest(order, top_k), jnp.uint32(0)),
        lambda: jnp.zeros(order.shape[0], jnp.uint32),
    )
    nucleus = (top_p < 1) & ~greedy
    threshold = lax.cond(
        nucleus.any(),
        lambda: jnp.where(nucleus, _nucleus_edge(order, weights, threshold, top_p), threshold),
        lambda: threshold,
    )
    survives = order >= jnp.maximum(threshold, 1)[:, None]
    return first_argmax(jnp.where(survives, noisy, -jnp.inf))


def greedy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See api.greedy."""
    return first_argmax(logits), ~jnp.isfinite(logits).all(axis=1)


def adjusted(
    logits: jax.Array,  # f32[B, V]
    counts: jax.Array,  # u16[S1, V]
    row: jax.Array,  # i32[B]
    mask: jax.Array,  # u32[B, Vw]
    bias_ids: jax.Array,  # i32[B, Nb]
    bias: jax.Array,  # f32[B, Nb]
    repetition: jax.Array,  # f32[B]
    frequency: jax.Array,  # f32[B]
    presence: jax.Array,  # f32[B]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See api.adjusted."""
    B, V = logits.shape
    bad = ~jnp.isfinite(logits).all(axis=1)
    bits = mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    logits = jnp.where(bits.reshape(B, -1)[:, :V] == 1, logits, -jnp.inf)
    logits = logits.at[jnp.arange(B, dtype=jnp.int32)[:, None], bias_ids].add(bias, mode="drop")
    count = counts[row]
    repeated = jnp.where(logits > 0, logits / repetition[:, None], logits * repetition[:, None])
    logits = jnp.where(count > 0, repeated, logits)
    generated = (count & MOST).astype(jnp.float32)
    logits = logits - frequency[:, None] * generated
    logits = logits - presence[:, None] * (generated > 0).astype(jnp.float32)
    return logits, logits.max(axis=1), bad


def draw(*arrays: jax.Array, truncates: bool = True) -> tuple[jax.Array, jax.Array]:
    """See api.draw."""
    changed, best, bad = adjusted(*arrays[:9])
    return sample(changed, *arrays[9:], best=best, truncates=truncates), bad | ~jnp.isfinite(best)


def _noisy(logits: jax.Array, scaled: jax.Array, keys: jax.Array, greedy: jax.Array) -> jax.Array:
    noise = jnp.where(greedy[:, None], 0.0, gumbel(keys, logits.shape[1]))
    return jnp.where(greedy[:, None], logits, scaled) + noise


def ordered_bits(x: jax.Array) -> jax.Array:
    """f32 -> u32 that compares as the floats do (-0 equals 0); no number maps to 0, which is less than all."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # XLA would leave out an addition of 0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def first_argmax(x: jax.Array) -> jax.Array:
    """[B, V] -> i32[B], the lowest index of the largest value: two plain reductions, cheaper than a variadic one."""
    index = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(x == x.max(axis=1, keepdims=True), index, jnp.int32(x.shape[1] - 1)).min(axis=1)


def gumbel(keys: jax.Array, V: int) -> jax.Array:
    """u32[B, 2] -> f32[B, V] standard Gumbel noise; token v's depends on (key, v) only."""
    counter = lax.broadcasted_iota(jnp.uint32, (keys.shape[0], (V + 1) // 2), 1)
    words = jnp.stack(threefry(keys[:, :1], keys[:, 1:], counter), axis=2)
    return gumbel_of(words.reshape(keys.shape[0], -1)[:, :V])


def gumbel_of(bits: jax.Array) -> jax.Array:
    """-log(-log(1 - u)) with u = (bits + 1/2) / 2^32: u near 0, where draws are won, keeps 32 bits of resolution."""
    u = jnp.minimum((bits.astype(jnp.float32) + 0.5) * (2.0**-32), 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-u))


def threefry(key0: jax.Array, key1: jax.Array, counter: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32, 20 rounds, of the block (0, counter): the words of tokens 2 * counter and 2 * counter + 1."""
    schedule = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = jnp.zeros_like(counter) + key0, counter + key1
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << rotation | x1 >> (32 - rotation)) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1


def _kth_largest(order: jax.Array, k: jax.Array) -> jax.Array:
    """u32[B, V], i32[B] -> u32[B]: the largest threshold that at least k entries reach."""
    return _search(order, lambda reached: _column_sum(reached.astype(jnp.int32)) >= k)


def _nucleus_edge(order: jax.Array, weights: jax.Array, threshold: jax.Array, top_p: jax.Array) -> jax.Array:
    """The largest threshold whose survivors hold top_p of the mass of those above `threshold`, and hold something."""
    weights = jnp.where(order >= jnp.maximum(threshold, 1)[:, None], weights, 0.0)
    needed = jnp.maximum(top_p * _column_sum(weights), jnp.finfo(jnp.float32).tiny)
    return _search(order, lambda reached: _column_sum(jnp.where(reached, weights, 0.0)) >= needed)


def _search(order: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest u32 threshold a row for which enough(order >= threshold) holds; `enough` must be monotone."""

    def one_bit(step: jax.Array, threshold: jax.Array) -> jax.Array:
        higher = threshold | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
        return jnp.where(enough(order >= higher[:, None]), higher, threshold)

    return lax.fori_loop(0, 32, one_bit, jnp.zeros(order.shape[0], jnp.uint32))


def _column_sum(x: jax.Array) -> jax.Array:
    """[B, V] -> [B]"""
    B, V = x.shape
    return jnp.pad(x, ((0, 0), (0, -V % _LANES))).reshape(B, -1, _LANES).sum(axis=1).sum(axis=1, dtype=x.dtype)
