"""How ragged queries become tiles on the device, and how a fixed number of programs walks them.

In: lengths and query starts of rows, as arrays (tile_list, run by XLA); that list, as a reference in a kernel (walk).
Out: i32[tiles, 6]; calls of `visit`. A tile is up to TILE queries of one row; with each query head it is one unit of
work. The list is sorted, longest first, and programs take units in snake order, so that none is left with a long one.
This module does not know what a tile's attention is, nor which warpgroups there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

TILE = 128  # queries
ALIGN = 8  # tokens; what the copy engine's tiled transfers start at
ROOM = 256  # what a tile's room is counted in, beside the number of its queries
type Carry = tuple[jax.Array, ...]
type Visit = Callable[[Tile, jax.Array, jax.Array], None]


@dataclass(frozen=True)
class Tile:
    """One tile of queries of one row, as scalars in registers."""

    row: jax.Array
    token: jax.Array  # its first query in the flat array
    position: jax.Array  # the same query's place among the row's keys
    reach: jax.Array  # live and room, in one: a kernel has few registers
    kv_len: jax.Array
    head: jax.Array
    item: jax.Array  # its place in the list, times N, plus head

    @property
    def live(self) -> jax.Array:
        """How many queries are its own."""
        return lax.bitwise_and(self.reach, jnp.int32(ROOM - 1))

    @property
    def room(self) -> jax.Array:
        """Tokens from its first to the end of the flat array, or TILE: kernels do not know how long that is."""
        return lax.div(self.reach, jnp.int32(ROOM))

    @property
    def aligned(self) -> jax.Array:
        """Whether the copy engine can move its queries: whole tiles inside the array."""
        return (lax.rem(self.token, jnp.int32(ALIGN)) == 0) & (self.reach >= TILE * ROOM)


def most_tiles(rows: int, T: int) -> int:
    """In which T tokens of so many rows may lie, the row of tokens that are nobody's with them."""
    return min(rows + 1, T) + T // TILE


def tile_list(
    T: int, kv_lens: jax.Array, query_starts: jax.Array, fewest: int, visible: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """i32[tiles, 6] in the order of Tile's fields without the last two, most keys first, and i32[1] how many are real.

    Tokens that belong to no row make a last row of length 0, so that they come out 0. With `visible`, how many leading
    keys each token sees, a tile's length is the most of its own and its position one below the fewest.
    """
    starts = jnp.concatenate([query_starts, jnp.full((1,), T, jnp.int32)])
    lens = jnp.concatenate([kv_lens, jnp.zeros((1,), jnp.int32)])
    rows = lens.shape[0]
    counts = starts[1:] - starts[:-1]
    padding = jnp.arange(rows) == rows - 1
    tiles = jnp.where((counts >= fewest) | padding, (counts + TILE - 1) // TILE, 0)
    ends = jnp.cumsum(tiles, dtype=jnp.int32)
    tile = jnp.arange(most_tiles(rows - 1, T), dtype=jnp.int32)
    row = (ends[None, :] <= tile[:, None]).sum(axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, rows - 1)
    offset = (tile - (ends - tiles)[row]) * TILE
    position = lens[row] - counts[row] + offset
    live = jnp.minimum(counts[row] - offset, TILE)
    length, seen = lens[row], position + live
    if visible is not None:
        own = visible.at[(starts[row] + offset)[:, None] + jnp.arange(TILE, dtype=jnp.int32)].get(mode="clip")
        inside = (jnp.arange(TILE, dtype=jnp.int32) < live[:, None]) & (row < rows - 1)[:, None]
        length = seen = jnp.where(inside, own, 0).max(axis=1)
        fewest_seen = jnp.where(inside, own, jnp.iinfo(jnp.int32).max).min(axis=1)
        position = jnp.where(row < rows - 1, fewest_seen - 1, -1)
    cost = jnp.where(tile < ends[-1], jnp.where(row == rows - 1, 0, seen), -1)
    order = jnp.argsort(-cost)
    table_row = jnp.minimum(row, rows - 2)
    token = starts[row] + offset
    reach = live + ROOM * jnp.minimum(T - token, TILE)
    fields = jnp.stack([table_row, token, position, reach, length, jnp.zeros_like(row)], axis=1)
    return fields[order], ends[-1:]


def walk(
    tiles_ref: Any,  # i32[tiles, 6]
    count_ref: Any,  # i32[1]
    N: int,
    programs: int,
    blocks_of: Callable[[Tile], tuple[jax.Array, jax.Array]],
    visit: Visit,
) -> tuple[jax.Array, jax.Array]:
    """Call visit(tile, how many tiles and how many key blocks came before) for this program's share; both totals."""
    program, stride = lax.axis_index("program"), jnp.int32(programs)
    total = count_ref[0] * N
    rounds, rest = lax.div(total, stride), lax.rem(total, stride)

    def place(step: jax.Array) -> jax.Array:  # snake order: a long tile in one round, a short one in the next
        return jnp.where(lax.rem(step, jnp.int32(2)) == 0, program, stride - 1 - program)

    steps = rounds + (place(rounds) < rest).astype(jnp.int32)

    def item_of(step: jax.Array) -> jax.Array:
        return step * stride + place(step)

    def read(step: jax.Array) -> tuple[jax.Array, ...]:
        tile = lax.div(item_of(jnp.clip(step, 0, jnp.maximum(steps - 1, 0))), jnp.int32(N))
        return tuple(tiles_ref[tile, field] for field in range(5))

    def one(step: jax.Array, carry: tuple[Carry, jax.Array]) -> tuple[Carry, jax.Array]:
        fields, blocks = carry
        following = read(step + 1)  # fetched now: nothing waits for it until the next tile
        item = item_of(step)
        tile = Tile(*fields, head=lax.rem(item, jnp.int32(N)), item=item)
        visit(tile, step, blocks)
        first, last = blocks_of(tile)
        return following, blocks + last - first

    _, blocks = lax.fori_loop(0, steps, one, (read(jnp.int32(0)), jnp.int32(0)))
    return steps, blocks
