"""Paged decode attention in Pallas-Triton: split-KV with a fixed split; a row's last split to finish combines them.

In: one query a row, one layer's pages, page tables, lengths, already checked by api.py. Out: attention outputs. The
queries may also come as a projection leaves them, with the row's new key and value: then the launch norms, rotates and
writes them first (decode_heads); or lie among other tokens, to whose outputs theirs are added (decode_among).
Bits: a row is cut at absolute key positions 0, SPLIT, 2 * SPLIT, ..., each split is reduced block by block from its
start, and splits are combined in order, a fixed number at a time, by whichever program counts itself last. None of
that depends on the batch, on the width of the page table or on how programs are laid over the device, so neither do a
row's bits.
Grid: a split a program while that makes few programs (idle ones return at once); beyond, a fixed number of programs
deals the live splits out among themselves, finding rows by a running sum of their splits, so a wide table costs nothing
and a program without a share reads one number.
It takes no pages narrower than the queries except with scales.

This is the lowering JAX 0.11 deprecates; it holds this op while it measures faster than Mosaic GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import tuning
from pallas_kernels.rope_page_write.heads import Heads, replaced
from pallas_kernels.rope_page_write.triton import K as KEYS
from pallas_kernels.rope_page_write.triton import Q as QUERIES
from pallas_kernels.rope_page_write.triton import Turner

LOG2E = math.log2(math.e)
SPLIT = 512  # keys a split; a constant of the op, not a tuning knob: it decides bits
COMBINE = 8192  # elements of split results combined at once, 64 registers a thread; decides bits as well
DIRECT_PROGRAMS = 4096  # up to here a program a possible split; idle ones return at once
DEALT_PROGRAMS = 2112  # beyond: 132 multiprocessors x 16, dealing out the live splits
DEEP_ROWS, DEEP_SPLITS = 128, 32  # up to here few programs are expected
_LOWEST = -1e30  # finite: keeps inf - inf out of the online softmax


@dataclass(frozen=True)
class Blocks:
    """How a split is walked: `block_keys` and `num_warps` decide bits, `num_stages` only speed."""

    block_keys: int = 64
    num_warps: int = 4
    num_stages: int = 5


@dataclass(frozen=True)
class _Shape:
    """What both kernels know when they are compiled."""

    N: int
    K: int
    H: int
    page_size: int
    scale: float
    window: int | None
    soft_cap: float | None
    block_keys: int = 0  # chosen at the call
    scaled: bool = False  # pages carry per-head scales
    sinking: bool = False  # heads have sinks
    with_lse: bool = False
    heads: Heads | None = None  # shapes of what the queries, new keys and values are made from
    among: bool = False  # rows name their token; rows of length 0 have none, and nobody writes for them

    @property
    def group(self) -> int:
        return self.N // self.K

    @property
    def lanes(self) -> tuple[int, int]:
        """Power-of-two tile that holds a kv head's queries: rows for mma are 16 or more."""
        return max(16, pl.next_power_of_2(self.group)), max(16, pl.next_power_of_2(self.H))

    @property
    def combined(self) -> tuple[int, int, int]:
        """Tile of split results combined at once: splits, queries of a kv head, columns."""
        group, columns = pl.next_power_of_2(self.group), self.lanes[1]
        return min(16, max(1, COMBINE // (group * columns))), group, columns


def paged_attention_decode(
    q: jax.Array,  # [B, N, H]
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,
    page_table: jax.Array,  # i32[B, W]
    kv_lens: jax.Array,  # i32[B]
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,  # f32[N]
    k_scale: jax.Array | None = None,  # f32[K], with e4m3 pages
    v_scale: jax.Array | None = None,
    return_lse: bool = False,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Any:
    """One query a row, at position kv_lens - 1. Rows of length 0 come out 0."""
    refuse(q, k_pages, k_scale, v_scale)
    has = _extras(k_scale, v_scale, sinks)
    shape = dataclasses.replace(_shape(q, k_pages, scale, window, soft_cap, has), with_lse=return_lse)
    arrays = _Arrays((q,), k_pages, v_pages, page_table, kv_lens, *has)
    results = _call(shape, arrays, jax.ShapeDtypeStruct(q.shape, q.dtype), blocks, interpret)
    return (results[0], results[-1]) if return_lse else results[0]


def decode_heads(
    heads: Heads,  # of B tokens
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,
    page_table: jax.Array,  # i32[B, W]
    kv_lens: jax.Array,  # i32[B]
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Norms, rotation, page write and attention of a decode step in one launch -> (out, k_pages, v_pages).

    The program of a row's last split writes the row's new key and value, and is the only one that reads them.
    """
    out = jax.ShapeDtypeStruct((heads.cos.shape[0], heads.N, heads.H), heads.dtype)
    refuse(out, k_pages, None, None)
    if k_pages.dtype != heads.dtype:
        raise NotImplementedError(f"only pages as wide as the heads are written here, not {k_pages.dtype}")
    shape = dataclasses.replace(_shape(out, k_pages, scale, window, soft_cap), heads=heads)
    results = _call(shape, _Arrays(heads.arrays, k_pages, v_pages, page_table, kv_lens), out, blocks, interpret)
    return results[0], results[4], results[5]


def decode_among(
    q: jax.Array,  # [T, N, H]
    out: jax.Array,  # [T, N, H]
    tokens: jax.Array,  # i32[R]
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,
    page_table: jax.Array,  # i32[R, W]
    kv_lens: jax.Array,  # i32[R]
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,  # f32[N]
    k_scale: jax.Array | None = None,  # f32[K], with e4m3 pages
    v_scale: jax.Array | None = None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`out` with row r's output at tokens[r], where its query lies; rows of length 0 have neither and cost nothing."""
    refuse(q, k_pages, k_scale, v_scale)
    has = _extras(k_scale, v_scale, sinks)
    shape = dataclasses.replace(_shape(q, k_pages, scale, window, soft_cap, has), among=True)
    arrays = _Arrays((q,), k_pages, v_pages, page_table, kv_lens, *has, among=(tokens, out))
    return _call(shape, arrays, jax.ShapeDtypeStruct(out.shape, out.dtype), blocks, interpret)[0]


def _shape(
    q: jax.Array | jax.ShapeDtypeStruct,
    k_pages: jax.Array,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    has: tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]] = ((), ()),
) -> _Shape:
    K, page_size = k_pages.shape[1:3]
    sizes = q.shape[1], K, q.shape[2], page_size, scale, window, soft_cap
    return _Shape(*sizes, scaled=bool(has[0]), sinking=bool(has[1]))


def _extras(
    k_scale: jax.Array | None, v_scale: jax.Array | None, sinks: jax.Array | None
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Scales of keys and values, and sinks; each empty where there are none."""
    scales = () if k_scale is None or v_scale is None else (k_scale, v_scale)
    return scales, () if sinks is None else (sinks,)


@dataclass(frozen=True)
class _Arrays:
    """What a call is given; only some calls have the later ones."""

    queries: tuple[jax.Array, ...]
    k_pages: jax.Array
    v_pages: jax.Array
    page_table: jax.Array
    kv_lens: jax.Array
    scales: tuple[jax.Array, ...] = ()
    sinks: tuple[jax.Array, ...] = ()
    among: tuple[jax.Array, ...] = ()


def _call(
    shape: _Shape, arrays: _Arrays, out: jax.ShapeDtypeStruct, blocks: Blocks | None, interpret: bool
) -> list[jax.Array]:
    """-> out, three arrays of use inside, and the pages if they are written."""
    B, N, K, H, window = arrays.kv_lens.shape[0], shape.N, shape.K, shape.H, shape.window
    splits = _splits_of_table(arrays.page_table.shape[1] * shape.page_size, window)
    heuristic = default_blocks(B * K, splits)
    blocks = blocks or tuning.choose("paged_attention.decode/triton", tuning_key(B * K, H), heuristic)
    shape = dataclasses.replace(shape, block_keys=blocks.block_keys)
    dealt = B * K * splits > DIRECT_PROGRAMS
    grid = (K, max(1, DEALT_PROGRAMS // K)) if dealt else (K, B, splits)
    finished = jnp.zeros((B, K), jnp.int32)
    ends = (jnp.cumsum(_live_splits(arrays.kv_lens, shape), dtype=jnp.int32),) if dealt else ()
    inputs = (
        *arrays.queries,
        arrays.k_pages,
        arrays.v_pages,
        arrays.page_table,
        arrays.kv_lens,
        *arrays.scales,
        *arrays.sinks,
        *arrays.among,
        *ends,
        finished,
    )
    outputs = [
        out,
        jax.ShapeDtypeStruct((B, splits, N, H), jnp.float32),
        jax.ShapeDtypeStruct((B, splits, N), jnp.float32),
        jax.ShapeDtypeStruct(finished.shape, finished.dtype),
    ]
    aliases = {len(inputs) - 1: 3}
    if shape.heads is not None:
        first = len(arrays.queries)
        outputs += [jax.ShapeDtypeStruct(arrays.k_pages.shape, arrays.k_pages.dtype)] * 2
        aliases |= {first: 4, first + 1: 5}
    if shape.with_lse:
        outputs.append(jax.ShapeDtypeStruct((out.shape[0], N), jnp.float32))
    if shape.among:
        aliases[len(inputs) - 2 - len(ends)] = 0
    return pl.pallas_call(
        functools.partial(_kernel, shape=shape, dealt=dealt, interpret=interpret),
        name="paged_decode",
        grid=grid,
        in_specs=[pl.no_block_spec] * len(inputs),
        out_specs=[pl.no_block_spec] * len(outputs),
        out_shape=outputs,
        input_output_aliases=aliases,
        compiler_params=plt.CompilerParams(num_warps=blocks.num_warps, num_stages=blocks.num_stages),
        interpret=interpret,
    )(*inputs)


def tuning_key(rows: int, H: int) -> str:
    """Rows times kv heads, up to a power of two, and the head dim."""
    return f"rows {pl.next_power_of_2(rows)} H{H}"


def default_blocks(rows: int, splits: int) -> Blocks:
    """Few programs keep many blocks in flight each; many share a multiprocessor instead.

    `rows` counts kv heads as well. How many programs a wide table's rows will need is not known when this compiles.
    """
    return Blocks(num_stages=5 if rows <= DEEP_ROWS and splits <= DEEP_SPLITS else 3)


def refuse(
    q: jax.Array | jax.ShapeDtypeStruct, k_pages: jax.Array, k_scale: jax.Array | None, v_scale: jax.Array | None
) -> None:
    """NotImplementedError for what this implementation does not do."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"queries must be bfloat16 or float16 for the tensor cores, got {q.dtype}")
    narrow = k_pages.dtype == jnp.float8_e4m3fn
    if k_pages.dtype != q.dtype and not narrow:
        raise NotImplementedError(f"pages must be {q.dtype} like the queries or float8_e4m3fn, got {k_pages.dtype}")
    if (k_scale is None) != (v_scale is None) or (k_scale is not None and not narrow):
        raise NotImplementedError("k_scale and v_scale go together, with float8_e4m3fn pages")
    if q.shape[2] > 256:
        raise NotImplementedError(f"head dim {q.shape[2]} needs more registers than a program has; at most 256")
    if q.shape[1] // k_pages.shape[1] > 64:
        raise NotImplementedError(f"{q.shape[1]} query heads on {k_pages.shape[1]} kv heads: at most 64 a kv head")


def _splits_of_table(table_keys: int, window: int | None) -> int:
    """The most splits a row can have: those of a full table, or those a window can touch."""
    splits = pl.cdiv(table_keys, SPLIT)
    return splits if window is None else min(splits, pl.cdiv(window - 1, SPLIT) + 1)


def _first_split(kv_len: jax.Array, window: int | None) -> jax.Array:
    return jnp.zeros_like(kv_len) if window is None else jnp.maximum(kv_len - window, 0) // SPLIT


def _live_splits(kv_len: jax.Array, shape: _Shape) -> jax.Array:
    """How many splits of a row hold visible keys; 1 for length 0 if somebody must write its output."""
    splits = (kv_len + SPLIT - 1) // SPLIT - _first_split(kv_len, shape.window)
    return splits if shape.among else jnp.maximum(splits, 1)


@dataclass(frozen=True)
class _Refs:
    """The kernel's arrays."""

    queries: tuple[Any, ...]  # [B, N, H], or those of heads
    k: Any  # [P, K, page_size, H]
    v: Any
    table: Any  # i32[B, W]
    lens: Any  # i32[B]
    scales: tuple[Any, ...]  # f32[K] of keys and of values, with narrow pages
    sinks: Any  # f32[N], or None
    tokens: Any  # i32[B], where rows name theirs
    ends: Any  # i32[B], running sum of rows' splits, when programs deal them out
    out: Any  # [B, N, H], or of all tokens
    partial: Any  # f32[B, splits, N, H], of rows of more than one split
    lse: Any  # f32[B, splits, N], base 2
    finished: Any  # i32[B, K], how many of a row's splits are done
    out_lse: Any  # f32[B, N], or None

    @staticmethod
    def of(arrays: tuple[Any, ...], shape: _Shape, dealt: bool) -> _Refs:
        found = list(arrays)

        def take(count: int) -> tuple[Any, ...]:
            return tuple(found.pop(0) for _ in range(count))

        queries = take(1 if shape.heads is None else len(shape.heads.arrays))
        k, v, table, lens = take(4)
        scales, sinks, among = take(2 * shape.scaled), take(1 * shape.sinking), take(2 * shape.among)
        ends = take(1 * dealt)
        _, out, partial, lse, finished = take(5)  # zeros are counted on in place
        if shape.heads is not None:
            k, v = take(2)  # the same memory as the pages that come in
        out_lse = take(1)[0] if shape.with_lse else None
        sink, tokens, end = (each[0] if each else None for each in (sinks, among, ends))
        rows, state = (queries, k, v, table, lens, scales), (out, partial, lse, finished, out_lse)
        return _Refs(*rows, sink, tokens, end, *state)


@dataclass(frozen=True)
class _Work:
    """Which split of which row for which kv head, as scalars."""

    head: jax.Array
    row: jax.Array
    split: jax.Array  # counted from the row's first live one
    kv_len: jax.Array


def _kernel(*arrays: Any, shape: _Shape, dealt: bool, interpret: bool) -> None:
    refs = _Refs.of(arrays, shape, dealt)
    head = pl.program_id(0)
    if not dealt:
        row, split = pl.program_id(1), pl.program_id(2)
        kv_len = refs.lens[row]

        @pl.when(split < _live_splits(kv_len, shape))
        def _one() -> None:
            _attend(refs, shape, _Work(head, row, split, kv_len), interpret)

        return
    rows = refs.lens.shape[0]
    first, stride, total = pl.program_id(1), pl.num_programs(1), refs.ends[rows - 1]

    @pl.when(first < total)
    def _share() -> None:
        lane = jnp.arange(max(16, pl.next_power_of_2(rows)))
        ends = plt.load(refs.ends.at[lane], mask=lane < rows, other=2**31 - 1)

        def body(step: jax.Array, _: None) -> None:
            item = first + step * stride
            before = ends <= item
            row = before.astype(jnp.int32).sum()
            split = item - jnp.where(before, ends, 0).max()
            _attend(refs, shape, _Work(head, row, split, refs.lens[row]), interpret)

        lax.fori_loop(0, pl.cdiv(total - first, stride), body, None)


def _attend(refs: _Refs, shape: _Shape, work: _Work, interpret: bool) -> None:
    """One split; then, if it is its row's only one, the output, and if it is the last to finish, the combination."""
    rows, cols = shape.lanes
    member, col = jnp.arange(rows), jnp.arange(cols)
    # Masked lanes keep indices of their own: the interpreter writes old values back through masked stores, and two
    # lanes at one place would race.
    query, in_group = work.head * shape.group + member, member < shape.group
    inside = in_group[:, None] & (col < shape.H)[None, :]
    splits = _live_splits(work.kv_len, shape)
    if shape.heads is not None:

        @pl.when((work.split == splits - 1) & (work.kv_len > 0))
        def _() -> None:
            _write(refs, shape, work)
            if not interpret:
                plt.debug_barrier()  # all of it is there before any thread reads the pages

    acc, lse = _one_split(refs, shape, work, query, inside)

    @pl.when(splits == 1)
    def _() -> None:
        _store(refs, work, (query, in_group), col, inside, acc, lse)

    @pl.when(splits > 1)
    def _() -> None:
        plt.store(refs.partial.at[work.row, work.split, query[:, None], col[None, :]], acc, mask=inside)
        plt.store(refs.lse.at[work.row, work.split, query], lse, mask=in_group)
        if not interpret:
            plt.debug_barrier()  # every thread's part is written before the program counts itself
        before = plt.atomic_add(refs.finished, (work.row, work.head), jnp.int32(1))

        @pl.when(before == splits - 1)
        def _() -> None:
            if not interpret:
                plt.debug_barrier()
            _combine(refs, shape, work, splits)


def _token(refs: _Refs, work: _Work) -> jax.Array:
    """Where the row's query and output lie."""
    return work.row if refs.tokens is None else refs.tokens[work.row]


def _turner(refs: _Refs, heads: Heads, cols: int) -> tuple[Turner, jax.Array]:
    col = jnp.arange(cols)[None, :]
    return Turner(replaced(heads, refs.queries), col), col < heads.H


def _write(refs: _Refs, shape: _Shape, work: _Work) -> None:
    """The row's new key and value of one kv head go to their page."""
    assert shape.heads is not None
    heads, position = shape.heads, work.kv_len - 1
    turner, inside = _turner(refs, heads, shape.lanes[1])
    angles = turner.angles(work.row, inside)
    key = turner.turned(work.row, heads.N + work.head, KEYS, inside, angles)
    value = turner.plain(work.row, heads.N + heads.K + work.head, inside)
    page = refs.table[work.row, position // shape.page_size]
    place = page, work.head, position % shape.page_size, turner.col
    plt.store(refs.k.at[place], key, mask=inside)
    plt.store(refs.v.at[place], value, mask=inside)


def _queries(refs: _Refs, shape: _Shape, work: _Work, query: jax.Array, inside: jax.Array) -> jax.Array:
    """A tile of the kv head's queries."""
    cols = shape.lanes[1]
    if shape.heads is None:
        place = refs.queries[0].at[_token(refs, work), query[:, None], jnp.arange(cols)[None, :]]
        return plt.load(place, mask=inside, other=0.0)
    turner, in_head = _turner(refs, shape.heads, cols)
    return turner.turned(work.row, query[:, None], QUERIES, inside, turner.angles(work.row, in_head))


def _one_split(
    refs: _Refs, shape: _Shape, work: _Work, query: jax.Array, inside: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Online softmax over one split of one row for the queries of one kv head: their mean of values, and log-sum."""
    rows, cols = shape.lanes
    col, lane = jnp.arange(cols), jnp.arange(shape.block_keys)
    in_head = (col < shape.H)[None, :]
    row, head, kv_len, width = work.row, work.head, work.kv_len, refs.table.shape[1]
    q = _queries(refs, shape, work, query, inside)

    lowest = jnp.maximum(kv_len - shape.window, 0) if shape.window is not None else 0
    begin = (work.split + _first_split(kv_len, shape.window)) * SPLIT
    end = jnp.minimum(begin + SPLIT, kv_len)
    if shape.window is not None:
        begin = jnp.maximum(begin, lowest // shape.block_keys * shape.block_keys)
    scale = shape.scale * refs.scales[0][head] if refs.scales else shape.scale

    def block(step: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        acc, highest, total = carry
        key = begin + step * shape.block_keys + lane
        live = key < end if shape.window is None else (key < end) & (key >= lowest)
        # Entries past the row's keys may be read, though not followed: nothing waits for the length to read an entry.
        entry = key // shape.page_size
        page = plt.load(refs.table.at[row, entry], mask=entry < width, other=0)
        page = jnp.where(live, page, 0)
        where = (page[:, None], head, (key % shape.page_size)[:, None], col[None, :])
        held = live[:, None] & in_head
        k = plt.load(refs.k.at[where], mask=held, other=0.0).astype(q.dtype)
        v = plt.load(refs.v.at[where], mask=held, other=0.0).astype(q.dtype)
        scores = _capped(plt.dot(q, k, trans_b=True) * scale, shape.soft_cap) * LOG2E
        scores = jnp.where(live[None, :], scores, _LOWEST)
        new_highest = jnp.maximum(highest, scores.max(axis=1))
        shrink = jnp.exp2(highest - new_highest)
        weights = jnp.where(live[None, :], jnp.exp2(scores - new_highest[:, None]), 0.0)
        total = total * shrink + weights.sum(axis=1)
        return acc * shrink[:, None] + plt.dot(weights.astype(q.dtype), v), new_highest, total

    start = (
        jnp.zeros((rows, cols), jnp.float32),
        jnp.full((rows,), _LOWEST, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    acc, highest, total = lax.fori_loop(0, pl.cdiv(end - begin, shape.block_keys), block, start)
    total = jnp.where(total > 0, total, 1.0)  # rows of length 0: acc is 0
    factor = refs.scales[1][head] / total if refs.scales else 1.0 / total
    return acc * factor[:, None], highest + jnp.log2(total)


def _capped(scores: jax.Array, soft_cap: float | None) -> jax.Array:
    """soft_cap * tanh(scores / soft_cap), by the one transcendental that lowers everywhere."""
    if soft_cap is None:
        return scores
    return soft_cap - 2.0 * soft_cap / (jnp.exp2(scores * (2.0 * LOG2E / soft_cap)) + 1.0)


def _combine(refs: _Refs, shape: _Shape, work: _Work, splits: jax.Array) -> None:
    """Weighted mean of a row's splits for the queries of one kv head; unwritten splits are never read."""
    at_once, group, cols = shape.combined
    lane, member, col = jnp.arange(at_once), jnp.arange(group), jnp.arange(cols)
    query, in_group = work.head * shape.group + member, member < shape.group
    inside = in_group[:, None] & (col < shape.H)[None, :]

    def chunk(step: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        acc, highest, total = carry
        split = step * at_once + lane
        live = split < splits
        lse_mask = live[:, None] & in_group[None, :]
        lse = plt.load(refs.lse.at[work.row, split[:, None], query[None, :]], mask=lse_mask, other=_LOWEST)
        part = plt.load(
            refs.partial.at[work.row, split[:, None, None], query[None, :, None], col[None, None, :]],
            mask=live[:, None, None] & inside[None, :, :],
            other=0.0,
        )
        new_highest = jnp.maximum(highest, lse.max(axis=0))
        shrink = jnp.exp2(highest - new_highest)
        weights = jnp.where(live[:, None], jnp.exp2(lse - new_highest[None, :]), 0.0)
        acc = acc * shrink[:, None] + (part * weights[:, :, None]).sum(axis=0)
        return acc, new_highest, total * shrink + weights.sum(axis=0)

    start = (
        jnp.zeros((group, cols), jnp.float32),
        jnp.full((group,), _LOWEST, jnp.float32),
        jnp.zeros((group,), jnp.float32),
    )
    acc, highest, total = lax.fori_loop(0, pl.cdiv(splits, at_once), chunk, start)
    lse = highest + jnp.log2(jnp.maximum(total, 1.0))  # the highest split weighs 1
    _store(refs, work, (query, in_group), col, inside, acc / total[:, None], lse)


def _store(
    refs: _Refs,
    work: _Work,
    queries: tuple[jax.Array, jax.Array],  # which, and which of them are real
    col: jax.Array,
    inside: jax.Array,
    out: jax.Array,
    lse: jax.Array,  # base 2
) -> None:
    """Outputs of a whole row, after its heads' sinks have taken their share."""
    (query, in_group), token = queries, _token(refs, work)
    if refs.sinks is not None:
        sink = plt.load(refs.sinks.at[query], mask=in_group, other=0.0) * LOG2E
        top = jnp.maximum(lse, sink)
        whole = top + jnp.log2(jnp.exp2(lse - top) + jnp.exp2(sink - top))
        out = out * jnp.exp2(lse - whole)[:, None]
        lse = whole
    if refs.out_lse is not None:
        lse = jnp.where(work.kv_len > 0, lse * (1 / LOG2E), _LOWEST)
        plt.store(refs.out_lse.at[token, query], lse, mask=in_group)
    plt.store(refs.out.at[token, query[:, None], col[None, :]], out.astype(refs.out.dtype), mask=inside)
