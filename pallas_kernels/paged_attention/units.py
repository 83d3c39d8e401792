"""How rows of a decode step become units of work, and how a fixed number of programs walks them.

In: lengths, as an array (plan, run by XLA once a step: the layers share it); plan and lengths as references in a kernel
(walk). Out: i32[programs, FIELDS]; calls of `visit`. A unit is one split of one row for one kv head: the keys from
SPLIT * split to SPLIT * (split + 1). Units lie in order of row, head, split, and each program takes a contiguous share,
so that at most one row a program has splits in earlier programs, and that row's are the program's first.
This module does not know what a unit's attention is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

SPLIT = 512  # keys a split; a constant of the op, not a tuning knob: it decides bits
BLOCK = 64  # keys a block: the tall dimension of WGMMA
FIELDS = 6  # of a program's entry in the plan
type Carry = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Rows:
    """What decides which keys rows see, and who walks them."""

    B: int
    K: int
    queries: int  # a row
    window: int | None
    programs: int

    def lowest(self, kv_len: jax.Array) -> jax.Array:
        """The first key any query of a row sees."""
        if self.window is None:
            return jnp.zeros_like(kv_len)
        return jnp.maximum(kv_len - (self.queries - 1) - self.window, 0)

    def splits(self, kv_len: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First live split of a row, and how many; one for length 0, whose output somebody must write."""
        stop = lax.div(kv_len + (SPLIT - 1), jnp.int32(SPLIT))
        first = lax.div(self.lowest(kv_len), jnp.int32(SPLIT))
        return first, jnp.maximum(stop - first, 1)

    def most_splits(self, table_keys: int) -> int:
        """The most splits a row can have: those of a full table, or those a window can touch."""
        splits = -(-table_keys // SPLIT)
        if self.window is not None:
            splits = min(splits, -(-(self.window + self.queries - 2) // SPLIT) + 1)
        return max(splits, 1)


@dataclass(frozen=True)
class Unit:
    """One split of one row for one kv head, as scalars."""

    row: jax.Array
    head: jax.Array
    split: jax.Array
    kv_len: jax.Array

    def keys(self, rows: Rows) -> tuple[jax.Array, jax.Array]:
        """First key, a multiple of BLOCK, and one past the last."""
        begin = self.split * SPLIT
        end = jnp.minimum(begin + SPLIT, self.kv_len)
        if rows.window is not None:
            begin = jnp.maximum(begin, lax.div(rows.lowest(self.kv_len), jnp.int32(BLOCK)) * BLOCK)
        return begin, end

    def blocks(self, rows: Rows, team: int, teams: int) -> tuple[jax.Array, jax.Array]:
        """A team's first key, and how many blocks it has: each `teams`-th, by absolute position."""
        begin, end = self.keys(rows)
        skip = lax.rem(lax.div(begin, jnp.int32(BLOCK)) + team, jnp.int32(teams))
        skip = jnp.where(skip > 0, teams - skip, 0) if teams > 2 else skip
        first, stride = begin + skip * BLOCK, teams * BLOCK
        return first, jnp.maximum(lax.div(end - first + (stride - 1), jnp.int32(stride)), 0)


@dataclass(frozen=True)
class Share:
    """A program's share of the units."""

    begin: jax.Array
    end: jax.Array
    total: jax.Array  # of all programs

    def holder(self, unit: jax.Array, programs: int) -> jax.Array:
        """Which program's share a unit is in."""
        return lax.div((unit + 1) * programs - 1, self.total)


def plan(kv_lens: jax.Array, rows: Rows) -> jax.Array:
    """i32[programs, FIELDS]: a program's first row, head and split, its first unit, the next one's, the total."""
    first, splits = rows.splits(kv_lens)
    units = splits * rows.K
    ends = jnp.cumsum(units, dtype=jnp.int32)
    total = ends[-1]
    edges = (jnp.arange(rows.programs + 1, dtype=jnp.int32) * total) // rows.programs
    start = edges[:-1]
    row = jnp.minimum((ends[None, :] <= start[:, None]).sum(axis=1, dtype=jnp.int32), rows.B - 1)
    within = start - (ends - units)[row]
    head = within // splits[row]
    split = within - head * splits[row] + first[row]
    return jnp.stack([row, head, split, start, edges[1:], jnp.full_like(row, total)], axis=1)


def walk(
    rows: Rows,
    plan_ref: Any,  # i32[programs, FIELDS]
    lens_ref: Any,  # i32[B]
    team: int,
    teams: int,
    visit: Callable[[Unit, Share, jax.Array, jax.Array], None],
) -> tuple[Share, jax.Array]:
    """Call visit(unit, share, how many units came before, how many of the team's blocks came before) in order."""
    program = lax.axis_index("program")
    row, head, split, begin, end, total = (plan_ref[program, field] for field in range(FIELDS))
    share = Share(begin, end, total)

    def one(step: jax.Array, carry: Carry) -> Carry:
        row, head, split, kv_len, blocks = carry
        following = lens_ref[jnp.minimum(row + 1, rows.B - 1)]  # fetched early: nothing waits for it
        unit = Unit(row, head, split, kv_len)
        visit(unit, share, step, blocks)
        first, splits = rows.splits(kv_len)
        next_head = split + 1 == first + splits
        next_row = next_head & (head + 1 == rows.K)
        then = jnp.where(next_row, following, kv_len)
        return (
            row + next_row.astype(jnp.int32),
            jnp.where(next_row, 0, head + next_head.astype(jnp.int32)),
            jnp.where(next_head, rows.splits(then)[0], split + 1),
            then,
            blocks + unit.blocks(rows, team, teams)[1],
        )

    start = (row, head, split, lens_ref[row], jnp.int32(0))
    return share, lax.fori_loop(0, end - begin, one, start)[-1]
