"""Paged decode attention in Pallas-Triton: split-KV with a fixed split, then a combine that reads live splits only.

In: one query a row, one layer's pages, page tables, lengths, already checked by api.py. Out: attention outputs.
Bits: a row is cut at absolute key positions 0, SPLIT, 2 * SPLIT, ..., each split is reduced block by block from its
start, and splits are combined in order in chunks of COMBINE. None of that depends on the batch, on the width of the
page table or on how programs are laid over the device, so neither do a row's bits.
Grid: a split a program while that makes few programs (idle ones return at once); beyond, a fixed number of programs
deals the live splits out among themselves, finding rows by a running sum of the lengths, so a wide table costs nothing.
It does not know how pages are written, and takes no pages narrower than the queries except with scales.

This is the lowering JAX 0.11 deprecates; it holds this op while it measures faster than Mosaic GPU.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

LOG2E = math.log2(math.e)
SPLIT = 512  # keys a split; a constant of the op, not a tuning knob: it decides bits
COMBINE = 16  # splits folded at once by the combine; decides bits as well
DIRECT_PROGRAMS = 4096  # up to here a program a possible split; idle ones return at once
DEALT_PROGRAMS = 2112  # beyond: 132 multiprocessors x 16, dealing out the live splits
_LOWEST = -1e30  # finite: keeps inf - inf out of the online softmax


@dataclass(frozen=True)
class Blocks:
    """How a split is walked. These change speed; only `block_keys` changes bits."""

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
    block_keys: int
    scale: float
    window: int | None
    soft_cap: float | None
    scaled: bool  # pages carry per-head scales

    @property
    def group(self) -> int:
        return self.N // self.K

    @property
    def lanes(self) -> tuple[int, int]:
        """Power-of-two tile that holds a kv head's queries: rows for mma are 16 or more."""
        return max(16, pl.next_power_of_2(self.group)), max(16, pl.next_power_of_2(self.H))


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
    k_scale: jax.Array | None = None,  # f32[K], with e4m3 pages
    v_scale: jax.Array | None = None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """One query a row, at position kv_lens - 1. Rows of length 0 come out 0."""
    refuse(q, k_pages, k_scale, v_scale)
    B, N, H = q.shape
    K, page_size = k_pages.shape[1:3]
    blocks = blocks or Blocks()
    shape = _Shape(N, K, H, page_size, blocks.block_keys, scale, window, soft_cap, k_scale is not None)
    splits = _splits_of_table(page_table.shape[1] * page_size, window)
    scales = () if k_scale is None or v_scale is None else (k_scale, v_scale)
    dealt = B * K * splits > DIRECT_PROGRAMS
    grid = (K, max(1, DEALT_PROGRAMS // K)) if dealt else (K, B, splits)
    partial, lse = pl.pallas_call(
        functools.partial(_split_kernel, shape=shape, rows=B if dealt else None),
        name="paged_decode_split",
        grid=grid,
        in_specs=[pl.no_block_spec] * (5 + len(scales)),
        out_specs=[pl.no_block_spec] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((B, splits, N, H), jnp.float32),
            jax.ShapeDtypeStruct((B, splits, N), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=blocks.num_warps, num_stages=blocks.num_stages),
        interpret=interpret,
    )(q, k_pages, v_pages, page_table, kv_lens, *scales)
    return pl.pallas_call(
        functools.partial(_combine_kernel, shape=shape),
        name="paged_decode_combine",
        grid=(N, B),
        in_specs=[pl.no_block_spec] * 3,
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=2),
        interpret=interpret,
    )(partial, lse, kv_lens)


def refuse(q: jax.Array, k_pages: jax.Array, k_scale: jax.Array | None, v_scale: jax.Array | None) -> None:
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


def _live_splits(kv_len: jax.Array, window: int | None) -> jax.Array:
    """How many splits of a row hold visible keys; 0 for length 0."""
    return (kv_len + SPLIT - 1) // SPLIT - _first_split(kv_len, window)


def _split_kernel(
    q_ref,  # [B, N, H]
    k_ref,  # [P, K, page_size, H]
    v_ref,
    table_ref,  # i32[B, W]
    len_ref,  # i32[B]
    *rest,  # k_scale f32[K] and v_scale f32[K] when scaled; then partial, lse
    shape: _Shape,
    rows: int | None,  # how many, when programs deal out the live splits
) -> None:
    scales = rest[:2] if shape.scaled else ()
    partial_ref, lse_ref = rest[-2:]
    refs = (q_ref, k_ref, v_ref, table_ref, scales, partial_ref, lse_ref)
    head = pl.program_id(0)
    if rows is None:
        row, split = pl.program_id(1), pl.program_id(2)
        kv_len = len_ref[row]

        @pl.when(split < _live_splits(kv_len, shape.window))
        def _one() -> None:
            _one_split(refs, shape, head, row, split, kv_len)

        return
    lane = jnp.arange(max(16, pl.next_power_of_2(rows)))
    lens = plt.load(len_ref.at[lane], mask=lane < rows, other=0)
    ends = jnp.cumsum(_live_splits(lens, shape.window))
    first, stride = pl.program_id(1), pl.num_programs(1)

    def body(step: jax.Array, _: None) -> None:
        item = first + step * stride
        before = ends <= item
        row = before.astype(jnp.int32).sum()
        split = item - jnp.where(before, ends, 0).max()
        _one_split(refs, shape, head, row, split, len_ref[row])

    mine = pl.cdiv(jnp.maximum(ends.max() - first, 0), stride)
    lax.fori_loop(0, mine, body, None)


def _one_split(refs, shape: _Shape, head: jax.Array, row: jax.Array, split: jax.Array, kv_len: jax.Array) -> None:
    """Online softmax over one split of one row for the queries of one kv head."""
    q_ref, k_ref, v_ref, table_ref, scales, partial_ref, lse_ref = refs
    rows, cols = shape.lanes
    member, col, lane = jnp.arange(rows), jnp.arange(cols), jnp.arange(shape.block_keys)
    in_group, in_head = member < shape.group, col < shape.H
    # Masked lanes keep indices of their own: the interpreter writes old values back through masked stores, and two
    # lanes at one place would race.
    query = head * shape.group + member
    inside = in_group[:, None] & in_head[None, :]
    q = plt.load(q_ref.at[row, query[:, None], col[None, :]], mask=inside, other=0.0)

    lowest = jnp.maximum(kv_len - shape.window, 0) if shape.window is not None else 0
    begin = (split + _first_split(kv_len, shape.window)) * SPLIT
    end = jnp.minimum(begin + SPLIT, kv_len)
    if shape.window is not None:
        begin = jnp.maximum(begin, lowest // shape.block_keys * shape.block_keys)
    scale = shape.scale * scales[0][head] if scales else shape.scale

    def block(step: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        acc, highest, total = carry
        key = begin + step * shape.block_keys + lane
        live = key < end if shape.window is None else (key < end) & (key >= lowest)
        page = plt.load(table_ref.at[row, jnp.where(live, key // shape.page_size, 0)], mask=live, other=0)
        where = (page[:, None], head, jnp.where(live, key % shape.page_size, 0)[:, None], col[None, :])
        held = live[:, None] & in_head[None, :]
        k = plt.load(k_ref.at[where], mask=held, other=0.0).astype(q.dtype)
        v = plt.load(v_ref.at[where], mask=held, other=0.0).astype(q.dtype)
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
    # Every live split holds a visible key, so total > 0 for the group's own rows.
    factor = 1.0 / total if not scales else scales[1][head] / total
    out = partial_ref.at[row, split, query[:, None], col[None, :]]
    plt.store(out, acc * factor[:, None], mask=inside)
    plt.store(lse_ref.at[row, split, query], highest + jnp.log2(total), mask=in_group)


def _capped(scores: jax.Array, soft_cap: float | None) -> jax.Array:
    """soft_cap * tanh(scores / soft_cap), by the one transcendental that lowers everywhere."""
    if soft_cap is None:
        return scores
    return soft_cap - 2.0 * soft_cap / (jnp.exp2(scores * (2.0 * LOG2E / soft_cap)) + 1.0)


def _combine_kernel(
    partial_ref,  # f32[B, splits, N, H]
    lse_ref,  # f32[B, splits, N]
    len_ref,  # i32[B]
    out_ref,  # [B, N, H]
    *,
    shape: _Shape,
) -> None:
    """Weighted mean of a row's live splits for one query head; unwritten splits are never read."""
    query, row = pl.program_id(0), pl.program_id(1)
    count = _live_splits(len_ref[row], shape.window)
    lane, col = jnp.arange(COMBINE), jnp.arange(shape.lanes[1])
    in_head = col < shape.H

    def chunk(step: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        acc, highest, total = carry
        live = step * COMBINE + lane < count
        split = jnp.where(live, step * COMBINE + lane, 0)
        lse = plt.load(lse_ref.at[row, split, query], mask=live, other=_LOWEST)
        part = plt.load(
            partial_ref.at[row, split[:, None], query, col[None, :]],
            mask=live[:, None] & in_head[None, :],
            other=0.0,
        )
        new_highest = jnp.maximum(highest, lse.max(axis=0))
        shrink = jnp.exp2(highest - new_highest)
        weights = jnp.where(live, jnp.exp2(lse - new_highest), 0.0)
        return (
            acc * shrink + (part * weights[:, None]).sum(axis=0),
            new_highest,
            total * shrink + weights.sum(axis=0),
        )

    start = (jnp.zeros(col.shape, jnp.float32), jnp.float32(_LOWEST), jnp.float32(0.0))
    acc, _, total = lax.fori_loop(0, pl.cdiv(count, COMBINE), chunk, start)
    out = jnp.where(total > 0, acc / jnp.where(total > 0, total, 1.0), 0.0)
    plt.store(out_ref.at[row, query, col], out.astype(out_ref.dtype), mask=in_head)
