"""The whole contract between the runner and the step graphs: what one step reads, packed into one int32 array.

In: plain integers from a StepPlan. Out: StepInputs on the device, with everything derivable (positions, slots,
rows of tokens) derived there instead of sent. Knows nothing of sequences, policies or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


@dataclass(frozen=True)
class StepShape:
    """The static shape of a step executable: `decode` has one query token a row, else rows are ragged."""

    tokens: int  # T
    rows: int  # R
    width: int  # W, pages a row
    decode: bool

    def __post_init__(self) -> None:
        if self.decode and self.tokens != self.rows:
            raise ValueError(f"a decode step has one token a row, not {self.tokens} tokens in {self.rows} rows")

    @property
    def packed_size(self) -> int:
        return self.tokens + 2 * self.rows + self.rows * self.width + (0 if self.decode else self.rows + 1)


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
    page_table: np.ndarray,
    scratch_row: int,
) -> np.ndarray:
    """One int32 array holding a step: flat token ids, and per row its key count, state row, pages and query count.

    A token id -1 - r stands for the token that state row r sampled last. `page_table` is [rows, W].
    """
    rows = len(kv_lens)
    packed = np.zeros(shape.packed_size, np.int32)
    packed[: len(token_ids)] = token_ids
    at = shape.tokens
    packed[at : at + rows] = kv_lens
    at += shape.rows
    packed[at : at + rows] = state_rows
    packed[at + rows : at + shape.rows] = scratch_row
    at += shape.rows
    packed[at : at + rows * shape.width] = page_table.reshape(-1)
    if not shape.decode:
        starts = packed[at + shape.rows * shape.width :]
        np.cumsum(query_lens, out=starts[1 : rows + 1])
        starts[rows + 1 :] = starts[rows]
    return packed


def unpack(
    shape: StepShape, packed: Int[Array, " n"], last_tokens: Int[Array, " S1"], *, page_size: int, num_pages: int
) -> StepInputs:
    """The inverse of `pack`, in the trace: slices, then tokens, positions, rows and slots by arithmetic.

    Kernels read lengths and table as arrays of their own: XLA draws a slice that a custom call of ours reads into a
    fusion around the call, and that stands outside the step's CUDA graph.
    """
    at = shape.tokens
    token_ids, kv_lens = packed[:at], packed[at : at + shape.rows]
    token_ids = jnp.where(token_ids < 0, last_tokens[jnp.maximum(-1 - token_ids, 0)], token_ids)
    at += shape.rows
    state_rows = packed[at : at + shape.rows]
    at += shape.rows
    table = packed[at : at + shape.rows * shape.width].reshape(shape.rows, shape.width)
    size = {"page_size": page_size, "num_pages": num_pages}
    kv_lens, table = jax.lax.optimization_barrier((kv_lens, table))
    if shape.decode:
        return one_a_row(token_ids, kv_lens, state_rows, table, **size)
    starts = packed[at + shape.rows * shape.width :]
    token = jnp.arange(shape.tokens, dtype=jnp.int32)
    live = token < starts[-1]
    # The row whose range holds the token: how many ranges end at or before it. Not by bisection, whose loop would stand
    # outside the step's CUDA graph.
    row = jnp.searchsorted(starts[1:], token, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, shape.rows - 1)
    positions = jnp.where(live, kv_lens[row] - starts[row + 1] + token, 0)
    slots = _slots(table, row, positions, live, **size)
    return StepInputs(token_ids, row, positions, slots, kv_lens, state_rows, table, starts)


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
