"""Pallas-Triton kernels that read a step's logits once: the greedy choice, and what requests change about logits.

In: logits and what rows ask for, checked by api.py. Out: tokens and flags, or new logits with each row's largest and
flags. A program takes a chunk of a row; the last of a row to finish sums it up. Counts of tokens are read only in rows
that have penalties. It does not know how tokens are drawn.

This is the lowering JAX 0.11 deprecates; the reference takes its place without it (docs/adr/0026).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.sampling.reference import MOST

CHUNK = 4096  # tokens a program
WORD = 32  # tokens a word of a mask


def greedy(logits: jax.Array, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """See api.greedy."""
    B, V = logits.shape
    chunks = pl.cdiv(V, CHUNK)
    f32, i32 = jnp.float32, jnp.int32
    row, part = (B,), (B, chunks)
    outputs = [_array(row, i32), _array(row, i32), _array(part, f32), _array(part, i32), _array(part, i32)]
    found = _call("sampling_greedy", _greedy, (logits,), outputs, chunks, B, interpret)
    return found[0], found[1] > 0


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
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See api.adjusted."""
    B, V = logits.shape
    chunks = pl.cdiv(V, CHUNK)
    f32, i32 = jnp.float32, jnp.int32
    inputs = logits, counts, row, mask, bias_ids, bias, repetition, frequency, presence
    part = (B, chunks)
    outputs = [_array((B,), f32), _array((B,), i32), _array(part, f32), _array(part, i32), _array((B, V), f32)]
    best, bad, _, _, changed, _ = _call("sampling_adjust", _adjust, inputs, outputs, chunks, B, interpret)
    return changed, best, bad > 0


def _array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _call(
    name: str, kernel: Any, inputs: tuple[jax.Array, ...], outputs: list[Any], chunks: int, B: int, interpret: bool
) -> list[jax.Array]:
    finished = jnp.zeros((B,), jnp.int32)
    return pl.pallas_call(
        functools.partial(kernel, interpret=interpret),
        name=name,
        grid=(chunks, B),
        in_specs=[pl.no_block_spec] * (len(inputs) + 1),
        out_specs=[pl.no_block_spec] * (len(outputs) + 1),
        out_shape=[*outputs, _array(finished.shape, finished.dtype)],
        input_output_aliases={len(inputs): len(outputs)},
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
    )(*inputs, finished)


def _last(finished: Any, number: jax.Array, chunks: int, interpret: bool) -> jax.Array:
    """Whether this program is its row's last; then it may read what the others left."""
    if not interpret:
        plt.debug_barrier()  # every thread's part is written before the program counts itself
    before = plt.atomic_add(finished, (number,), jnp.int32(1))
    if not interpret:
        plt.debug_barrier()
    return before == chunks - 1


def _greedy(
    logits: Any,
    _: Any,
    tokens: Any,
    flags: Any,
    bests: Any,
    places: Any,
    wrong: Any,
    finished: Any,
    *,
    interpret: bool,
) -> None:
    chunk, number = pl.program_id(0), pl.program_id(1)
    V, chunks = logits.shape[1], bests.shape[1]
    token = chunk * CHUNK + jnp.arange(CHUNK)
    inside = token < V
    found = plt.load(logits.at[number, token], mask=inside, other=-jnp.inf)
    highest = found.max()
    bests[number, chunk] = highest
    places[number, chunk] = jnp.where(found == highest, token, V - 1).min()
    wrong[number, chunk] = _unsound(found, inside)

    @pl.when(_last(finished, number, chunks, interpret))
    def _() -> None:
        lane = jnp.arange(max(16, pl.next_power_of_2(chunks)))
        there = lane < chunks
        best = plt.load(bests.at[number, lane], mask=there, other=-jnp.inf)
        place = plt.load(places.at[number, lane], mask=there, other=V - 1)
        tokens[number] = jnp.where(there & (best == best.max()), place, V - 1).min()
        flags[number] = plt.load(wrong.at[number, lane], mask=there, other=0).max()


def _unsound(found: jax.Array, inside: jax.Array) -> jax.Array:
    """1 if a value inside is not finite."""
    finite = jnp.abs(found) < jnp.inf  # NaN compares as false
    return jnp.where(inside & ~finite, 1, 0).max()


@dataclass(frozen=True)
class _Asked:
    """What one row asks for."""

    counts: Any  # u16[S1, V]
    mask: Any  # u32[B, Vw]
    number: jax.Array
    line: jax.Array  # of counts
    repetition: jax.Array
    frequency: jax.Array
    presence: jax.Array

    @property
    def penalised(self) -> jax.Array:
        return (self.repetition != 1.0) | (self.frequency != 0.0) | (self.presence != 0.0)

    def applied(self, logits: jax.Array, bias: jax.Array, token: jax.Array, inside: jax.Array) -> jax.Array:
        """Mask, bias and penalties of these tokens."""
        words = plt.load(self.mask.at[self.number, token // WORD], mask=inside, other=jnp.uint32(0))
        allowed = (words >> (token % WORD).astype(jnp.uint32)) & 1
        logits = jnp.where(allowed == 1, logits, -jnp.inf) + bias
        needed = inside & self.penalised
        count = plt.load(self.counts.at[self.line, token], mask=needed, other=jnp.uint16(0)).astype(jnp.int32)
        repeated = jnp.where(logits > 0, logits / self.repetition, logits * self.repetition)
        logits = jnp.where(count > 0, repeated, logits)
        generated = (count & MOST).astype(jnp.float32)
        logits = logits - self.frequency * generated
        return logits - self.presence * jnp.where(generated > 0, 1.0, 0.0)


def _adjust(
    logits: Any,
    counts: Any,
    rows: Any,
    mask: Any,
    bias_ids: Any,
    bias: Any,
    repetition: Any,
    frequency: Any,
    presence: Any,
    _: Any,
    best: Any,
    bad: Any,
    bests: Any,
    wrong: Any,
    changed: Any,
    finished: Any,
    *,
    interpret: bool,
) -> None:
    chunk, number = pl.program_id(0), pl.program_id(1)
    V, chunks = logits.shape[1], bests.shape[1]
    asked = _Asked(counts, mask, number, rows[number], repetition[number], frequency[number], presence[number])
    token = chunk * CHUNK + jnp.arange(CHUNK)
    inside = token < V
    found = plt.load(logits.at[number, token], mask=inside, other=-jnp.inf)
    new = asked.applied(found, jnp.zeros_like(found), token, inside)
    new = jnp.where(inside, new, -jnp.inf)
    plt.store(changed.at[number, token], new, mask=inside)
    bests[number, chunk] = new.max()
    wrong[number, chunk] = _unsound(found, inside)

    Nb = bias_ids.shape[1]
    entry = jnp.arange(max(16, pl.next_power_of_2(Nb)))
    biased = plt.load(bias_ids.at[number, entry], mask=entry < Nb, other=V)
    here = (biased >= chunk * CHUNK) & (biased < jnp.minimum((chunk + 1) * CHUNK, V))

    @pl.when(jnp.where(here, 1, 0).max() > 0)
    def _() -> None:
        if not interpret:
            plt.debug_barrier()  # what was stored above is stored before it is replaced
        # Others point outside: the interpreter writes old values back through masked stores.
        place = jnp.where(here, biased, V)
        raw = plt.load(logits.at[number, place], mask=here, other=-jnp.inf)
        added = plt.load(bias.at[number, entry], mask=here, other=0.0)
        plt.store(changed.at[number, place], asked.applied(raw, added, place, here), mask=here)
        if not interpret:
            plt.debug_barrier()
        bests[number, chunk] = plt.load(changed.at[number, token], mask=inside, other=-jnp.inf).max()

    @pl.when(_last(finished, number, chunks, interpret))
    def _() -> None:
        lane = jnp.arange(max(16, pl.next_power_of_2(chunks)))
        there = lane < chunks
        best[number] = plt.load(bests.at[number, lane], mask=there, other=-jnp.inf).max()
        bad[number] = plt.load(wrong.at[number, lane], mask=there, other=0).max()
