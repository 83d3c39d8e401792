"""The whole contract between the runner and the step graphs: what one step reads, packed into one int32 array.

In: plain integers from a StepPlan. Out: StepInputs on the device, with everything derivable (positions, slots,
rows of tokens) derived there instead of sent. The page table stays on the device from step to step: a step brings the
entries that are new. Knows nothing of sequences, policies or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

TOKENS_A_PAGE = 16  # at least, in the rule of how many new pages a step brings
NOWHERE = np.iinfo(np.int32).max  # a place past every page table: dropped


@dataclass(frozen=True)
class StepShape:
    """The static shape of a step executable: `decode` has one query token a row, else rows are ragged."""

    tokens: int  # T
    rows: int  # R
    decode: bool

    def __post_init__(self) -> None:
        if self.decode and self.tokens != self.rows:
            raise ValueError(f"a decode step has one token a row, not {self.tokens} tokens in {self.rows} rows")

    @property
    def new_pages(self) -> int:
        """How many entries of the page table a step may bring: what its tokens fill, and a page begun in each row."""
        return self.rows if self.decode else self.rows + self.tokens // TOKENS_A_PAGE

    @property
    def packed_size(self) -> int:
        return self.tokens + 3 * self.rows + 2 * self.new_pages + (0 if self.decode else self.rows + 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """What one step reads. Row r's queries are the last of its kv_lens[r] keys; kv_lens 0 marks a padding row."""

    token_ids: Int[Array, " T"]
    rows: Int[Array, " T"]  # of each token; any for padding
    positions: Int[Array, " T"]  # of each token in its own sequence; 0 for padding
    slots: Int[Array, " T"]  # page * page_size + offset; the first slot past the pool for padding: dropped
    kv_lens: Int[Array, " R"]  # with this step's tokens
    state_rows: Int[Array, " R"]  # place in the per-row state of rows that sample; the scratch row for the others
    page_table: Int[Array, "R W"]
    query_starts: Int[Array, " R+1"] | None  # None: one query a row

    @property
    def last_token(self) -> Int[Array, " R"] | None:
        """Index of each row's last query among the T tokens, 0 for empty rows; None: the identity."""
        return None if self.query_starts is None else jnp.maximum(self.query_starts[1:] - 1, 0)


def pack(
    shape: StepShape,
    token_ids: Sequence[int],
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    state_rows: Sequence[int],
    table_rows: Sequence[int],
    new_pages: Sequence[tuple[int, int]],
    scratch_row: int,
) -> np.ndarray:
    """One int32 array holding a step: flat token ids; per row its key count, state row, row of the page table and query
    count; and what is new in the page table.

    A token id -1 - r stands for the token that state row r sampled last. `new_pages` has pairs of a place in the table,
    row * W + number of the page in its sequence, and the page.
    """
    rows = len(kv_lens)
    packed = np.zeros(shape.packed_size, np.int32)
    packed[: len(token_ids)] = token_ids
    at = shape.tokens
    packed[at : at + rows] = kv_lens
    at += shape.rows
    for column in (state_rows, table_rows):
        packed[at : at + rows] = column
        packed[at + rows : at + shape.rows] = scratch_row
        at += shape.rows
    news = packed[at : at + 2 * shape.new_pages].reshape(-1, 2)
    news[len(new_pages) :, 0] = NOWHERE
    if new_pages:
        news[: len(new_pages)] = new_pages
    if not shape.decode:
        starts = packed[at + 2 * shape.new_pages :]
        np.cumsum(query_lens, out=starts[1 : rows + 1])
        starts[rows + 1 :] = starts[rows]
    return packed


def unpack(
    shape: StepShape,
    packed: Int[Array, " n"],
    last_tokens: Int[Array, " S1"],
    page_table: Int[Array, "S1 W"],
    *,
    page_size: int,
    num_pages: int,
) -> tuple[StepInputs, Int[Array, "S1 W"]]:
    """The inverse of `pack`, in the trace: slices, then tokens, positions, rows and slots by arithmetic; and the page
    table of all rows with the step's new entries, in place.

    Kernels read lengths and table as arrays of their own: XLA draws a slice that a custom call of ours reads into a
    fusion around the call, and that stands outside the step's CUDA graph.
    """
    at = shape.tokens
    token_ids, columns = packed[:at], packed[at : at + 3 * shape.rows].reshape(3, shape.rows)
    token_ids = jnp.where(token_ids < 0, last_tokens[jnp.maximum(-1 - token_ids, 0)], token_ids)
    at += 3 * shape.rows
    news = packed[at : at + 2 * shape.new_pages].reshape(-1, 2)
    every = page_table.reshape(-1).at[news[:, 0]].set(news[:, 1], mode="drop").reshape(page_table.shape)
    table = every.at[columns[2]].get(mode="promise_in_bounds")
    size = {"page_size": page_size, "num_pages": num_pages}
    kv_lens, table = jax.lax.optimization_barrier((columns[0], table))
    state_rows = columns[1]
    if shape.decode:
        return one_a_row(token_ids, kv_lens, state_rows, table, **size), every
    starts = packed[at + 2 * shape.new_pages :]
    token = jnp.arange(shape.tokens, dtype=jnp.int32)
    live = token < starts[-1]
    # The row whose range holds the token: how many ranges end at or before it. Not by bisection, whose loop would stand
    # outside the step's CUDA graph.
    row = jnp.searchsorted(starts[1:], token, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, shape.rows - 1)
    positions = jnp.where(live, kv_lens[row] - starts[row + 1] + token, 0)
    slots = _slots(table, row, positions, live, **size)
    return StepInputs(token_ids, row, positions, slots, kv_lens, state_rows, table, starts), every


def set_pages(page_table: Int[Array, "S1 W"], row: Int[Array, " one"], pages: Int[Array, " W"]) -> Int[Array, "S1 W"]:
    """A whole row of the table at one time: more than a step brings, as when a prefix is found."""
    return jax.lax.dynamic_update_slice(page_table, pages[None], (row[0], jnp.zeros((), row.dtype)))


def one_a_row(
    token_ids: Int[Array, " R"],
    kv_lens: Int[Array, " R"],
    state_rows: Int[Array, " R"],
    table: Int[Array, "R W"],
    *,
    page_size: int,
    num_pages: int,
) -> StepInputs:
    """A decode step: each row's query is its last key."""
    row, live = jnp.arange(kv_lens.shape[0], dtype=jnp.int32), kv_lens > 0
    positions = jnp.where(live, kv_lens - 1, 0)
    slots = _slots(table, row, positions, live, page_size=page_size, num_pages=num_pages)
    return StepInputs(token_ids, row, positions, slots, kv_lens, state_rows, table, None)


def _slots(
    table: Int[Array, "R W"],
    row: Int[Array, " T"],
    positions: Int[Array, " T"],
    live: Bool[Array, " T"],
    *,
    page_size: int,
    num_pages: int,
) -> Int[Array, " T"]:
    slots = table[row, positions // page_size] * page_size + positions % page_size
    return jnp.where(live, slots, num_pages * page_size)


class SampleRow(NamedTuple):
    """One row's sampling request, host side: one int32 column each in the packed sampling array."""

    row: int
    key0: int = 0
    key1: int = 0
    position: int = 0
    top_k: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0


SAMPLE_COLUMNS = len(SampleRow._fields)
INTEGER_COLUMNS = SampleRow._fields.index("temperature")  # the columns before are integers, the rest floats


def pack_samples(size: int, samples: Sequence[SampleRow], scratch_row: int) -> np.ndarray:
    """int32[size, columns]; floats travel as their bits. Rows past the given ones write to the scratch row."""
    packed = np.empty((size, SAMPLE_COLUMNS), np.int32)
    packed[:] = _bits([SampleRow(row=scratch_row)])
    if samples:
        packed[: len(samples)] = _bits(samples)
    return packed


def _bits(samples: Sequence[SampleRow]) -> np.ndarray:
    values = np.array(samples, np.float64)  # holds every 32-bit integer exactly
    integers = values[:, :INTEGER_COLUMNS].astype(np.int64).astype(np.int32)
    return np.concatenate([integers, values[:, INTEGER_COLUMNS:].astype(np.float32).view(np.int32)], axis=1)


def unpack_samples(packed: Int[Array, "B columns"]) -> dict[str, Array]:
    """Named columns of `pack_samples`, in the trace: floats as f32, the rest as i32."""
    columns = {name: packed[:, i] for i, name in enumerate(SampleRow._fields)}
    floats = SampleRow._fields[INTEGER_COLUMNS:]
    return columns | {name: jax.lax.bitcast_convert_type(columns[name], jnp.float32) for name in floats}
