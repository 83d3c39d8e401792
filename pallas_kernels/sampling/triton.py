"""Sampling in Pallas-Triton: a program a row, which passes over the vocabulary a few times and waits for no other.

In: logits, keys and parameters a row, checked by api.py. Out: one token a row, the reference's up to rounding.
A row that limits its tokens looks for a distance below its best token within which all that it keeps must lie, and not
many more: each pass counts tokens (and mass) at LEVELS distances at once, between the last pass's neighbours. The
candidates are gathered, and the exact thresholds found among them, bit by bit as the reference does. A row that keeps
more than CANDIDATES tokens finds its thresholds in passes over the whole row, slowly. Passes are over blocks of one
size, so a row's token does not depend on its batch.
It does not know penalties or masks: adjust.py has them put into the logits.

This is the lowering JAX 0.11 deprecates; the reference takes its place without it (docs/adr/0026).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.sampling.reference import gumbel_of, ordered_bits, threefry

BLOCK = 2048  # tokens at once; decides bits
AHEAD = 4  # blocks whose loads are under way together
CANDIDATES = 2048  # a power of two
LEVELS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the span in question; an even number of them
ROUNDS = 4  # passes that count, at most
# In units of temperature below the best token: noise is above -2.9 and below 23, so none beyond is ever drawn.
FARTHEST = 26.0
_MARGIN = 1e-4  # of a mass, against sums of another order
WARPS = 16


@dataclass(frozen=True)
class _Row:
    """One row's logits and parameters, as scalars."""

    logits: Any  # f32[B, V]
    number: jax.Array
    best: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    key: tuple[jax.Array, jax.Array]

    @property
    def V(self) -> int:
        return self.logits.shape[1]

    @property
    def greedy(self) -> jax.Array:
        return self.temperature == 0

    @property
    def limits_count(self) -> jax.Array:
        return (self.top_k > 0) & (self.top_k < self.V) & ~self.greedy

    @property
    def limits_mass(self) -> jax.Array:
        return (self.top_p < 1) & ~self.greedy

    @property
    def limited(self) -> jax.Array:
        return self.limits_count | self.limits_mass

    def scaled(self, logits: jax.Array) -> jax.Array:
        return (logits - self.best) / jnp.where(self.greedy, 1.0, self.temperature)

    def noise(self, token: jax.Array) -> jax.Array:
        even, odd = threefry(*self.key, (token // 2).astype(jnp.uint32))
        return gumbel_of(jnp.where(token % 2 == 0, even, odd))

    def passed[Carry](
        self, visit: Callable[[Carry, jax.Array, jax.Array], Carry], start: Carry, ahead: int = AHEAD
    ) -> Carry:
        """visit(carry, token numbers, logits) over the vocabulary, block by block; -inf past its end."""

        def blocks(step: jax.Array, carry: Carry) -> Carry:
            tokens = [(step * ahead + block) * BLOCK + jnp.arange(BLOCK) for block in range(ahead)]
            found = [
                plt.load(self.logits.at[self.number, token], mask=token < self.V, other=-jnp.inf) for token in tokens
            ]
            for token, logits in zip(tokens, found, strict=True):
                carry = visit(carry, token, logits)
            return carry

        return lax.fori_loop(0, pl.cdiv(self.V, BLOCK * ahead), blocks, start)


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
    interpret: bool = False,
) -> jax.Array:
    """See api.sample; `best` is each row's largest logit."""
    B = logits.shape[0]
    inputs = logits, keys, temperature, top_k, top_p, min_p, best
    room = (B, CANDIDATES + BLOCK if truncates else 1)
    outputs = [
        jax.ShapeDtypeStruct((B,), jnp.int32),
        jax.ShapeDtypeStruct(room, jnp.float32),
        jax.ShapeDtypeStruct(room, jnp.int32),
    ]
    return pl.pallas_call(
        functools.partial(_kernel, truncates=truncates, interpret=interpret),
        name="sampling_rows",
        grid=(B,),
        in_specs=[pl.no_block_spec] * len(inputs),
        out_specs=[pl.no_block_spec] * len(outputs),
        out_shape=outputs,
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
    )(*inputs)[0]


def _kernel(*refs: Any, truncates: bool, interpret: bool) -> None:
    logits, keys, temperature, top_k, top_p, min_p, best, tokens, values, ids = refs
    number = pl.program_id(0)
    parameters = (ref[number] for ref in (best, temperature, top_k, top_p, min_p))
    row = _Row(logits, number, *parameters, key=(keys[number, 0], keys[number, 1]))

    @pl.when(row.greedy)
    def _() -> None:
        tokens[number] = _highest(row, lambda _, found: found, AHEAD)

    if not truncates:
        pl.when(~row.greedy)(lambda: _draw(row, tokens, jnp.uint32(1)))
        return
    # Only what limits is asked about; the other rows go straight to the draw.
    pl.when(~row.greedy & ~row.limited)(lambda: _draw(row, tokens, jnp.uint32(1)))

    @pl.when(row.limited)
    def _() -> None:
        reach, total, mass = _reach(row)

        @pl.when(total <= CANDIDATES)
        def _() -> None:
            _gather(row, values, ids, reach)
            if not interpret:
                plt.debug_barrier()  # every thread's candidates lie in memory before any is read
            tokens[number] = _decide(row, values, ids, total, mass)

        pl.when(total > CANDIDATES)(lambda: _draw(row, tokens, _thresholds_of_all(row, mass)))


def _kept(row: _Row, logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of a block: distances as they are scaled, weights, and which pass min_p and can be drawn at all."""
    scaled = row.scaled(logits)
    weights = jnp.exp(scaled)
    return scaled, weights, (weights >= row.min_p) & (scaled >= -FARTHEST)


def _reach(row: _Row) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A distance within which all that the row keeps lies, how many tokens do, and the mass of all there are."""

    def count(near: jax.Array, far: jax.Array) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
        distances = [near + (far - near) * level for level in LEVELS[:-1]] + [far]

        def visit(sums: tuple[jax.Array, ...], _: jax.Array, logits: jax.Array) -> tuple[jax.Array, ...]:
            scaled, weights, kept = _kept(row, logits)
            inside = [kept & (scaled >= -distance) for distance in distances]
            # Two counts in one number: a lane meets fewer than 2^16 tokens.
            pairs = zip(inside[::2], inside[1::2], strict=True)
            counts = [low.astype(jnp.int32) + high.astype(jnp.int32) * (1 << 16) for low, high in pairs]
            masses = [jnp.where(each, weights, 0.0) for each in inside]
            return tuple(old + new for old, new in zip(sums, (*counts, *masses), strict=True))

        half = len(LEVELS) // 2
        start = *[jnp.zeros(BLOCK, jnp.int32)] * half, *[jnp.zeros(BLOCK, jnp.float32)] * len(LEVELS)
        sums = row.passed(visit, start, 2)
        counts = [part for both in sums[:half] for part in ((both & 0xFFFF).sum(), (both >> 16).sum())]
        return distances, counts, [mass.sum() for mass in sums[half:]]

    def narrow(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        near, far, _, whole, rounds = state
        distances, counts, masses = count(near, far)
        whole = jnp.where(rounds == 0, masses[-1], whole)
        needed = row.top_p * whole * (1 + _MARGIN)
        below, chosen, total = distances[-2], distances[-1], counts[-1]
        for place in range(len(LEVELS) - 2, -1, -1):
            enough = jnp.where(row.limits_count, counts[place] >= row.top_k, masses[place] >= needed)
            chosen, total = jnp.where(enough, distances[place], chosen), jnp.where(enough, counts[place], total)
            below = jnp.where(enough, distances[place - 1] if place else near, below)
        return below, chosen, total, whole, rounds + 1

    def wide(state: tuple[jax.Array, ...]) -> jax.Array:
        return (state[4] == 0) | ((state[2] > CANDIDATES) & (state[4] < ROUNDS))

    zero, none = jnp.float32(0), jnp.int32(0)
    _, far, total, whole, _ = lax.while_loop(wide, narrow, (zero, jnp.float32(FARTHEST), none, zero, none))
    return far, total, whole


def _gather(row: _Row, values: Any, ids: Any, reach: jax.Array) -> None:
    """The tokens within reach go to the row's list, in token order."""

    def visit(count: jax.Array, token: jax.Array, logits: jax.Array) -> jax.Array:
        scaled, _, kept = _kept(row, logits)
        inside = kept & (scaled >= -reach)
        found = inside.astype(jnp.int32).sum()

        @pl.when(found > 0)
        def _store() -> None:
            # Others keep places of their own behind the list: the interpreter writes old values back.
            own = count + jnp.cumsum(inside.astype(jnp.int32)) - 1
            place = jnp.where(inside, own, CANDIDATES + jnp.arange(BLOCK))
            plt.store(values.at[row.number, place], logits, mask=inside)
            plt.store(ids.at[row.number, place], token, mask=inside)

        return count + found

    row.passed(visit, jnp.int32(0))


def _decide(row: _Row, values: Any, ids: Any, total: jax.Array, mass: jax.Array) -> jax.Array:
    """The token drawn from the candidates that the row keeps."""
    place = jnp.arange(CANDIDATES)
    live = place < total
    found = plt.load(values.at[row.number, place], mask=live, other=-jnp.inf)
    token = plt.load(ids.at[row.number, place], mask=live, other=row.V - 1)
    scaled = row.scaled(found)
    order = jnp.where(live, ordered_bits(found), jnp.uint32(0))
    weights = jnp.where(live, jnp.exp(scaled), 0.0)
    threshold = _thresholds(
        row,
        lambda reach: (order >= reach).astype(jnp.int32).sum(),
        lambda reach: jnp.where(order >= reach, weights, 0.0).sum(),
        mass,
    )
    drawn = jnp.where(order >= threshold, scaled + row.noise(token), -jnp.inf)
    return jnp.where(live & (drawn == drawn.max()), token, row.V - 1).min()


def _thresholds_of_all(row: _Row, mass: jax.Array) -> jax.Array:
    """The same thresholds in passes over the row."""

    def over(value_of: Callable[[jax.Array, jax.Array], jax.Array], zero: jax.Array) -> jax.Array:
        def visit(sums: jax.Array, _: jax.Array, logits: jax.Array) -> jax.Array:
            _, weights, kept = _kept(row, logits)
            return sums + value_of(jnp.where(kept, ordered_bits(logits), jnp.uint32(0)), weights)

        return row.passed(visit, jnp.full((BLOCK,), zero)).sum()

    return _thresholds(
        row,
        lambda reach: over(lambda order, _: (order >= reach).astype(jnp.int32), jnp.int32(0)),
        lambda reach: over(lambda order, weights: jnp.where(order >= reach, weights, 0.0), jnp.float32(0)),
        mass,
    )


def _thresholds(
    row: _Row,
    count_above: Callable[[jax.Array], jax.Array],
    mass_above: Callable[[jax.Array], jax.Array],
    mass: jax.Array,
) -> jax.Array:
    """The order that a token must reach to be kept; at least 1. `mass` is of all tokens, if only mass is limited."""
    by_count = _search(lambda reach: count_above(reach) >= row.top_k, row.limits_count)
    lowest = jnp.maximum(by_count, 1)
    whole = lax.cond(row.limits_count & row.limits_mass, lambda: mass_above(lowest), lambda: mass)
    needed = jnp.maximum(row.top_p * whole, jnp.finfo(jnp.float32).tiny)
    by_mass = _search(lambda reach: mass_above(jnp.maximum(reach, lowest)) >= needed, row.limits_mass)
    return jnp.maximum(by_mass, lowest)


def _search(enough: Callable[[jax.Array], jax.Array], wanted: jax.Array) -> jax.Array:
    """The largest u32 for which enough() holds; 0 if none, or if not wanted."""

    def one_bit(step: jax.Array, threshold: jax.Array) -> jax.Array:
        higher = threshold | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
        return jnp.where(enough(higher), higher, threshold)

    steps = jnp.where(wanted, jnp.int32(32), jnp.int32(0))
    return lax.fori_loop(jnp.int32(0), steps, one_bit, jnp.uint32(0))


def _draw(row: _Row, tokens: Any, threshold: jax.Array) -> None:
    """The best token after noise of all that reach the threshold and pass min_p."""

    def noisy(token: jax.Array, logits: jax.Array) -> jax.Array:
        scaled, _, kept = _kept(row, logits)
        return jnp.where(kept & (ordered_bits(logits) >= threshold), scaled + row.noise(token), -jnp.inf)

    tokens[row.number] = _highest(row, noisy, 1)


def _highest(row: _Row, value_of: Callable[[jax.Array, jax.Array], jax.Array], ahead: int) -> jax.Array:
    """The token of the largest value, the lowest among ties."""

    def visit(best: tuple[jax.Array, jax.Array], token: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = value_of(token, logits)
        better = value > best[0]
        return jnp.where(better, value, best[0]), jnp.where(better, token, best[1])

    start = jnp.full((BLOCK,), -jnp.inf, jnp.float32), jnp.full((BLOCK,), row.V - 1, jnp.int32)
    value, token = row.passed(visit, start, ahead)
    return jnp.where(value == value.max(), token, row.V - 1).min()
