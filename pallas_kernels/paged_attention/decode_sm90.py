"""Paged decode attention on Hopper in Pallas Mosaic GPU: TMA copies of pages, WGMMA over transposed scores.

In: one query a row (or a few, when a draft is verified), one layer's pages, page tables, lengths, already checked by
api.py. Out: attention outputs.
A row is cut at absolute key positions into splits (units.py). A program's memory warpgroup runs ahead across units, one
TMA copy a page. Its compute warpgroup takes all keys of a split first: S^T = K q^T, with 64 keys in the tall dimension
of the tensor cores and the queries of a kv head in the narrow one, so that little is wasted on padding and a split
needs one softmax; then O^T = V^T P^T while values arrive.
Splits of one row leave their sums in device memory; the program that holds a row's last split adds them in order. If
some belong to earlier programs it does so at its end, after waiting for their count: it waits only for programs that
started before it and never wait before they have counted.
e4m3 pages: queries come as two e4m3 parts, which together hold bfloat16's 8 bits, so that keys need no conversion;
values become float16, exactly, on their way to the second product, as the tensor cores transpose nothing narrower.
Bits: a row's splits, the order of additions in a split and the order of splits depend on nothing but its own length.
It does not know how pages are written.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.paged_attention.units import BLOCK, SPLIT, Carry, Rows, Share, Unit, plan, walk

LOG2E = math.log2(math.e)
TEAMS = 2  # compute warpgroups; each takes every second block of a split. Decides bits
MOST_LANES = 32
WARPS = 4  # a warpgroup
MOST_STAGES = 6  # a team
REDUCTION_BYTES = 2048  # of shared memory a team
SMEM_BYTES = 220 * 1024  # of 227 KB; reductions and barriers take the rest
FOLDED = 4, 8  # splits of a row read at once, for few and for many
LOW_PART = 16.0  # what the second part of narrow queries is multiplied by, to be as large as the first
E4M3_MAX = 448.0
_MASKED, _FLOOR = -1e30, -1e20  # a masked score lies far under the floor of the maximum: weight 0


@dataclass(frozen=True)
class Blocks:
    """Numbers that change only speed."""

    programs: int = 132  # one a multiprocessor
    stages: int | None = None  # blocks of keys or values in flight; None = as many as shared memory holds
    early: bool = False  # start before the kernel in front has ended, and wait for it once inside


@dataclass(frozen=True)
class _Shape:
    """What the kernel knows when it is compiled."""

    rows: Rows
    H: int
    page_size: int
    dtype: Any  # of queries and outputs
    narrow: bool  # pages are e4m3
    group: int  # query heads a kv head
    heads_a_tile: int  # kv heads whose queries share a tile of lanes
    lanes: int  # queries of a tile: columns of the products
    scale: float
    soft_cap: float | None
    stages: int  # a team
    max_splits: int
    early: bool
    interpret: bool

    @property
    def columns(self) -> int:
        """Queries of one kv head of one row."""
        return self.rows.queries * self.group

    @property
    def filled(self) -> bool:
        """Tiles have no padding, and the heads' order in memory."""
        return self.rows.queries == 1 and self.heads_a_tile * self.group == self.lanes

    @property
    def copies(self) -> int:
        """TMA copies a block."""
        return max(1, BLOCK // self.page_size)

    @property
    def fetchers(self) -> int:
        """Warps that fetch for a team. A slot is always the same warp's: a barrier's waiter has to see every phase."""
        return next(warps for warps in range(WARPS // TEAMS, 0, -1) if self.stages % warps == 0)

    @property
    def team_blocks(self) -> int:
        """The most blocks of a split that a team has."""
        return SPLIT // BLOCK // TEAMS

    @property
    def parts(self) -> int:
        """Of a query."""
        return 2 if self.narrow else 1

    @property
    def weight_dtype(self) -> Any:
        return jnp.float16 if self.narrow else self.dtype


@dataclass(frozen=True)
class _Refs:
    """Device memory, then shared memory, then barriers."""

    q: Any  # [B, K / heads_a_tile, parts * lanes, H]
    factor: Any  # f32[B, K / heads_a_tile, lanes], of scores, and f32[K], of values, with e4m3 pages
    v_scale: Any
    new_k: Any  # [B, K, H], if written
    new_v: Any
    k: Any  # [P, K, page_size, H]
    v: Any
    table: Any  # i32[B, W]
    lens: Any  # i32[B]
    plan: Any  # i32[programs, FIELDS]
    counters: Any  # i32[programs], 0 before and after
    out: Any  # [B, K / heads_a_tile, lanes, H]
    partial: Any  # f32[programs, 2, max_splits, H, lanes]
    stats: Any  # f32[programs, 2, max_splits, 2, lanes]
    ring: Any  # [TEAMS, stages, BLOCK, H]
    q_smem: Any  # [2, parts * lanes, H]
    scores: Any  # f32[TEAMS, team_blocks, BLOCK, lanes]
    weights: Any  # [TEAMS, team_blocks, lanes, BLOCK]
    out_smem: Any  # [lanes, H]
    merged: Any  # f32[TEAMS - 1, H, lanes], and their f32[TEAMS - 1, 2, lanes]
    merged_stats: Any
    wide: Any  # f16[TEAMS, BLOCK, H], with e4m3 pages
    full: Any  # one a team and stage
    free: Any
    q_full: Any  # two
    q_free: Any
    merge_full: Any  # one a team but the first
    merge_free: Any


def paged_attention_decode(
    q: jax.Array,  # [B, N, H]
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,
    page_table: jax.Array,  # i32[B, W]
    kv_lens: jax.Array,  # i32[B]
    **options: Any,
) -> jax.Array:
    """One query a row, at position kv_lens - 1. Rows of length 0 come out 0. Options as verify's."""
    return verify(q[:, None], k_pages, v_pages, page_table, kv_lens, **options)[:, 0]


def decode_write(
    q: jax.Array,  # [B, N, H]
    k: jax.Array,  # [B, K, H]
    v: jax.Array,
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,
    page_table: jax.Array,  # i32[B, W]
    kv_lens: jax.Array,  # i32[B]
    **options: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As paged_attention_decode with each row's last key and value, which also go to their page in the same launch."""
    if k_pages.dtype != q.dtype:
        raise NotImplementedError("only pages as wide as the queries are written here")
    pages = jax.new_ref(k_pages), jax.new_ref(v_pages)
    new = k.astype(k_pages.dtype), v.astype(k_pages.dtype)
    out = verify(q[:, None], *pages, page_table, kv_lens, new=new, **options)[:, 0]
    return out, jax.freeze(pages[0]), jax.freeze(pages[1])


def verify(
    q: jax.Array,  # [B, queries, N, H]
    k_pages: Any,  # [P, K, page_size, H]; a ref, if written
    v_pages: Any,
    page_table: jax.Array,  # i32[B, W]
    kv_lens: jax.Array,  # i32[B]
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    k_scale: jax.Array | None = None,  # f32[K], with e4m3 pages
    v_scale: jax.Array | None = None,
    new: tuple[jax.Array, jax.Array] | None = None,  # [B, K, H], of the last position
    counters: Any = None,  # i32[programs] of zeros, as a ref: saves making them; zeros afterwards
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> jax.Array:
    """The last `queries` queries of each row, whose keys are all in the pages; each has the bits of a decode step."""
    refuse(q, k_pages, k_scale, v_scale)
    B, queries, N, H = q.shape
    P, K, page_size = k_pages.shape[:3]
    group = N // K
    packed = queries == 1 and 8 % group == 0 and N % 8 == 0
    lanes = 8 if packed else pl.cdiv(queries * group, 8) * 8
    narrow = k_pages.dtype != q.dtype
    blocks = blocks or tuning.choose("paged_attention.decode/mosaic_sm90", f"H{H}", Blocks())
    rows = Rows(B, K, queries, window, blocks.programs)
    shape = _Shape(
        rows=rows,
        H=H,
        page_size=page_size,
        dtype=q.dtype,
        narrow=narrow,
        group=group,
        heads_a_tile=8 // group if packed else 1,
        lanes=lanes,
        scale=scale,
        soft_cap=soft_cap,
        stages=blocks.stages or _stages(H, lanes, narrow),
        max_splits=rows.most_splits(page_table.shape[1] * page_size),
        early=blocks.early,
        interpret=interpret is not None,
    )
    # An operand of the copy engine must start at 256 bytes; any arithmetic makes a slice an array of its own.
    page_table = jnp.clip(page_table, 0, P - 1)
    tiles, factor = _tiled(q, shape), None
    if k_scale is not None:
        tiles, factor = _parts(tiles, k_scale, shape)
    counters = jnp.zeros((blocks.programs,), jnp.int32) if counters is None else counters
    arrays = (
        tiles,
        factor,
        v_scale,
        *(new or (None, None)),
        k_pages,
        v_pages,
        page_table,
        kv_lens,
        plan(kv_lens, rows),
        counters,
    )
    return _untiled(_call(shape, arrays, interpret), q.shape, shape)


def refuse(q: jax.Array, k_pages: jax.Array, k_scale: jax.Array | None, v_scale: jax.Array | None) -> None:
    """NotImplementedError for what this implementation does not do. q is [B, queries, N, H]."""
    queries, N, H = q.shape[1:]
    K, page_size = k_pages.shape[1:3]
    narrow = k_pages.dtype == jnp.float8_e4m3fn
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"WGMMA takes bfloat16 or float16 queries here, got {q.dtype}")
    if k_pages.dtype != q.dtype and not narrow:
        raise NotImplementedError(f"pages must be {q.dtype} like the queries or float8_e4m3fn, got {k_pages.dtype}")
    if narrow != (k_scale is not None) or narrow != (v_scale is not None):
        raise NotImplementedError("k_scale and v_scale go together, with float8_e4m3fn pages")
    if H not in (64, 128, 256):
        raise NotImplementedError(f"head dim must be 64, 128 or 256 for whole swizzles, got {H}")
    if page_size % 8 or (BLOCK % page_size and page_size % BLOCK):
        raise NotImplementedError(f"page size must divide {BLOCK} or be a multiple of it, got {page_size}")
    if queries * (N // K) > MOST_LANES:
        raise NotImplementedError(f"{queries} queries of {N // K} heads a kv head: at most {MOST_LANES} together")


def _stages(H: int, lanes: int, narrow: bool) -> int:
    """How many blocks fit beside queries, scores, weights and outputs."""
    taken = 2 * 2 * lanes * H + SPLIT * lanes * (4 + 2) + 2 * lanes * H + 4 * (TEAMS - 1) * H * lanes
    taken += TEAMS * 2 * BLOCK * H * narrow
    block = TEAMS * BLOCK * H * (1 if narrow else 2)
    return min(MOST_STAGES * (2 if narrow else 1), (SMEM_BYTES - taken) // block)


def _tiled(q: jax.Array, shape: _Shape) -> jax.Array:
    """[B, queries, N, H] -> [B, K / heads_a_tile, lanes, H]: a bitcast if the heads of a tile fill it."""
    rows = shape.rows
    if shape.filled:
        return q.reshape(rows.B, -1, shape.lanes, shape.H)
    apart = q.reshape(rows.B, rows.queries, rows.K, shape.group, shape.H).swapaxes(1, 2)
    apart = apart.reshape(rows.B, rows.K, shape.columns, shape.H)
    return jnp.pad(apart, ((0, 0), (0, 0), (0, shape.lanes - shape.columns), (0, 0)))


def _untiled(out: jax.Array, dims: tuple[int, ...], shape: _Shape) -> jax.Array:
    rows = shape.rows
    if shape.filled:
        return out.reshape(dims)
    apart = out[:, :, : shape.columns].reshape(rows.B, rows.K, rows.queries, shape.group, shape.H)
    return apart.swapaxes(1, 2).reshape(dims)


def _parts(tiles: jax.Array, k_scale: jax.Array, shape: _Shape) -> tuple[jax.Array, jax.Array]:
    """Queries as the sum of two e4m3 parts, one above the other, and what makes their products scores."""
    wide = tiles.astype(jnp.float32)
    largest = jnp.abs(wide).max(axis=-1, keepdims=True)
    # A power of two, so that bfloat16's bits are all there.
    unit = jnp.where(largest > 0, jnp.exp2(jnp.ceil(jnp.log2(largest / E4M3_MAX))), 1.0)
    wide = wide / unit
    first = wide.astype(jnp.float8_e4m3fn)
    second = ((wide - first.astype(jnp.float32)) * LOW_PART).astype(jnp.float8_e4m3fn)
    of_lane = jnp.repeat(k_scale.reshape(-1, shape.heads_a_tile), shape.lanes // shape.heads_a_tile, axis=1)
    return jnp.concatenate([first, second], axis=2), unit[..., 0] * of_lane * shape.scale


def _call(shape: _Shape, arrays: tuple[Any, ...], interpret: Any) -> jax.Array:
    programs, f32 = shape.rows.programs, jnp.float32
    tiles = arrays[0].shape[:2]
    results = [
        jax.ShapeDtypeStruct((*tiles, shape.lanes, shape.H), shape.dtype),
        jax.ShapeDtypeStruct((programs, 2, shape.max_splits, shape.H, shape.lanes), f32),
        jax.ShapeDtypeStruct((programs, 2, shape.max_splits, 2, shape.lanes), f32),
    ]

    def kernel(*refs: Any) -> None:
        def body(scratch: tuple[Any, ...], barriers: tuple[Any, ...]) -> None:
            everything: tuple[Any, ...] = (*refs, *scratch, *barriers)
            found = _Refs(*everything)
            wg = lax.axis_index("wg")
            if shape.early and not shape.interpret:
                plgpu.griddepcontrol_wait()
            pl.when(wg == TEAMS)(lambda: _memory_warpgroup(shape, found))
            for team in range(TEAMS):
                # Reductions across warps use the memory after what is allocated: this keeps the teams' apart.
                def compute(_: Any, team: int = team) -> None:
                    pl.when(wg == team)(lambda: _compute_warpgroup(shape, found, team))

                apart = plgpu.SMEM((max(1, team) * REDUCTION_BYTES,), jnp.int8)
                pl.run_scoped(compute, apart, collective_axes="wg")

        pl.run_scoped(body, _scratch(shape), _barriers(shape), collective_axes="wg")

    return plgpu.kernel(
        kernel,
        out_type=results,
        grid=(programs,),
        grid_names=("program",),
        num_threads=TEAMS + 1,
        thread_name="wg",
        kernel_name="paged_decode",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=REDUCTION_BYTES,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
    )(*arrays)[0]


def _scratch(shape: _Shape) -> tuple[Any, ...]:
    tiling: Any = plgpu.TilingTransform  # typed as abstract in 0.11
    swizzle: Any = plgpu.SwizzleTransform

    def smem(*dims: int, dtype: Any) -> Any:
        bytes_ = min(128, dims[-1] * jnp.dtype(dtype).itemsize)
        transforms = tiling((8, bytes_ // jnp.dtype(dtype).itemsize)), swizzle(bytes_)
        return plgpu.SMEM(dims, dtype, transforms=transforms)

    pages = jnp.float8_e4m3fn if shape.narrow else shape.dtype
    return (
        smem(TEAMS, shape.stages, BLOCK, shape.H, dtype=pages),
        smem(2, shape.parts * shape.lanes, shape.H, dtype=pages),
        plgpu.SMEM((TEAMS, shape.team_blocks, BLOCK, shape.lanes), jnp.float32),
        smem(TEAMS, shape.team_blocks, shape.lanes, BLOCK, dtype=shape.weight_dtype),
        plgpu.SMEM((shape.lanes, shape.H), shape.dtype),
        plgpu.SMEM((TEAMS - 1, shape.H, shape.lanes), jnp.float32),
        plgpu.SMEM((TEAMS - 1, 2, shape.lanes), jnp.float32),
        smem(TEAMS, BLOCK, shape.H, dtype=jnp.float16) if shape.narrow else None,
    )


def _barriers(shape: _Shape) -> tuple[Any, ...]:
    def barrier(count: int, arrivals: int = 1) -> Any:
        return plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)

    slots = TEAMS * shape.stages
    teams = barrier(2), barrier(2, TEAMS), barrier(TEAMS - 1), barrier(TEAMS - 1)
    return barrier(slots, shape.copies), barrier(slots), *teams


# The memory warpgroup.


def _memory_warpgroup(shape: _Shape, refs: _Refs) -> None:
    """A team's warps take turns with the blocks of its stream: a unit's keys, then its values, then the next unit's."""

    @plgpu.warp_map
    def _(warp: jax.Array) -> None:
        for team in range(TEAMS):
            for mine in range(shape.fetchers):
                fetch = functools.partial(_fetch, shape, refs, team, mine)
                pl.when(warp == team * (WARPS // TEAMS) + mine)(fetch)


def _fetch(shape: _Shape, refs: _Refs, team: int, mine: int) -> None:
    stages, fetchers = jnp.int32(shape.stages), jnp.int32(shape.fetchers)
    size = min(shape.page_size, BLOCK)

    def visit(unit: Unit, share: Share, step: jax.Array, before: jax.Array) -> None:
        del share
        begin, count = unit.blocks(shape.rows, team, TEAMS)
        stream = 2 * before  # keys and values of the units before
        skip = lax.rem(mine - stream, fetchers)
        start = jnp.where(skip < 0, skip + fetchers, skip)
        if team == mine == 0:
            _fetch_queries(shape, refs, unit, step)

        @pl.loop(0, lax.div(2 * count - start + (fetchers - 1), fetchers))
        def _(turn: jax.Array) -> None:
            place = start + turn * fetchers
            values = place >= count
            key = begin + jnp.where(values, place - count, place) * (TEAMS * BLOCK)
            pages = [_page_of(shape, refs, unit, key + copy * size) for copy in range(shape.copies)]
            done = stream + place
            slot = lax.rem(done, stages)
            barrier = team * shape.stages + slot
            pl.when(done >= stages)(lambda: plgpu.barrier_wait(refs.free.at[barrier]))
            for is_values, source in ((False, refs.k), (True, refs.v)):

                @pl.when(values == is_values)
                def _(source: Any = source) -> None:
                    for copy, (page, rows) in enumerate(pages):
                        target = refs.ring.at[team, slot, pl.ds(copy * size, size)]
                        plgpu.copy_gmem_to_smem(source.at[page, unit.head, rows], target, refs.full.at[barrier])

    share, blocks = walk(shape.rows, refs.plan, refs.lens, team, TEAMS, visit)
    if shape.interpret:  # which wants every arrival waited for
        _drain(shape, refs, team, mine, share, blocks)


def _drain(shape: _Shape, refs: _Refs, team: int, mine: int, share: Share, blocks: jax.Array) -> None:
    if team == mine == 0:
        units = share.end - share.begin
        for slot in range(2):
            pl.when(units > slot)(lambda slot=slot: plgpu.barrier_wait(refs.q_free.at[slot]))

    @pl.loop(jnp.maximum(2 * blocks - shape.stages, 0), 2 * blocks)
    def _(done: jax.Array) -> None:
        @pl.when(lax.rem(done, jnp.int32(shape.fetchers)) == mine)
        def _() -> None:
            plgpu.barrier_wait(refs.free.at[team * shape.stages + lax.rem(done, jnp.int32(shape.stages))])


def _fetch_queries(shape: _Shape, refs: _Refs, unit: Unit, step: jax.Array) -> None:
    slot = lax.rem(step, jnp.int32(2))
    pl.when(step >= 2)(lambda: plgpu.barrier_wait(refs.q_free.at[slot]))
    tile = lax.div(unit.head, jnp.int32(shape.heads_a_tile))
    plgpu.copy_gmem_to_smem(refs.q.at[unit.row, tile], refs.q_smem.at[slot], refs.q_full.at[slot])


def _provably(value: jax.Array, multiple: int) -> jax.Array:
    """A value that is a multiple, in a form that says so; pl.multiple_of does not exist for single warps in 0.11."""
    return lax.div(value, jnp.int32(multiple)) * multiple


def _page_of(shape: _Shape, refs: _Refs, unit: Unit, key: jax.Array) -> tuple[jax.Array, Any]:
    """Page and rows in it of one copy, whose first key is `key`.

    Before the window and past the row's keys stand the nearest visible page's.
    """
    size = min(shape.page_size, BLOCK)
    visible = jnp.clip(key, shape.rows.lowest(unit.kv_len), unit.kv_len - 1)
    page = refs.table[unit.row, lax.div(visible, jnp.int32(shape.page_size))]
    first = _provably(lax.rem(key, jnp.int32(shape.page_size)), size) if shape.page_size > size else 0
    return page, pl.ds(first, size)


# The compute warpgroup.


def _compute_warpgroup(shape: _Shape, refs: _Refs, team: int) -> None:
    def visit(unit: Unit, share: Share, step: jax.Array, before: jax.Array) -> None:
        found = _attend(shape, refs, team, unit, step, 2 * before)
        if team > 0:
            _hand_over(refs, team - 1, step, found)
            return
        for other in range(TEAMS - 1):
            found = _take_over(shape, refs, other, found)
        splits = shape.rows.splits(unit.kv_len)[1]
        pl.when(splits == 1)(lambda: _store(shape, refs, unit.row, unit.head, found[0], found[2]))
        pl.when(splits > 1)(lambda: _leave(shape, refs, unit, share, step, found))

    share = walk(shape.rows, refs.plan, refs.lens, team, TEAMS, visit)[0]
    if team == 0:
        _finish(shape, refs, share)
    elif shape.interpret:  # which wants every arrival waited for
        pl.when(share.end > share.begin)(lambda: plgpu.barrier_wait(refs.merge_free.at[team - 1]))


def _hand_over(refs: _Refs, mine: int, step: jax.Array, found: Carry) -> None:
    """A unit's sums to the first team."""
    pl.when(step > 0)(lambda: plgpu.barrier_wait(refs.merge_free.at[mine]))
    refs.merged.at[mine][...], refs.merged_stats.at[mine, 0][...], refs.merged_stats.at[mine, 1][...] = (
        found[0],
        found[1],
        found[2],
    )
    plgpu.barrier_arrive(refs.merge_full.at[mine])


def _take_over(shape: _Shape, refs: _Refs, other: int, found: Carry) -> Carry:
    column = plgpu.Layout.WGMMA.reduce(0)
    plgpu.barrier_wait(refs.merge_full.at[other])
    acc = plgpu.load(refs.merged.at[other], layout=plgpu.Layout.WGMMA, optimized=False)
    top = plgpu.load(refs.merged_stats.at[other, 0], layout=column, optimized=False)
    total = plgpu.load(refs.merged_stats.at[other, 1], layout=column, optimized=False)
    plgpu.barrier_arrive(refs.merge_free.at[other])
    return _added(shape, found, (acc, top, total))


def _added(shape: _Shape, one: Carry, other: Carry) -> Carry:
    """Sums over two sets of keys, each with its maximum and total a column."""
    dims = shape.H, shape.lanes
    new = jnp.maximum(one[1], other[1])
    old, its = jnp.exp2(one[1] - new), jnp.exp2(other[1] - new)
    acc = one[0] * lax.broadcast_in_dim(old, dims, [1]) + other[0] * lax.broadcast_in_dim(its, dims, [1])
    return acc, new, one[2] * old + other[2] * its


def _leave(shape: _Shape, refs: _Refs, unit: Unit, share: Share, step: jax.Array, found: Carry) -> None:
    """A split's sums in device memory; after a row's last, all of them added, if they are this program's."""
    first, splits = shape.rows.splits(unit.kv_len)
    own = unit.split - first
    now = share.begin + step
    row_begin, row_last = now - own, now - own + splits - 1
    holder = share.holder(row_last, shape.rows.programs)
    foreign = row_begin < share.begin
    here = lax.axis_index("program") == holder
    place = jnp.where(here & jnp.logical_not(foreign), 1, 0)
    refs.partial.at[holder, place, own][...] = found[0]
    refs.stats.at[holder, place, own, 0][...] = found[1]
    refs.stats.at[holder, place, own, 1][...] = found[2]
    pl.when(jnp.logical_not(here))(lambda: _count(shape, refs, holder))
    pl.when(here & jnp.logical_not(foreign) & (own + 1 == splits))(
        lambda: _fold(shape, refs, unit.row, unit.head, 1, splits)
    )


def _finish(shape: _Shape, refs: _Refs, share: Share) -> None:
    """The row whose first splits are earlier programs', if it ends here."""
    program = lax.axis_index("program")
    row, head, split = (refs.plan[program, field] for field in range(3))
    first, splits = shape.rows.splits(refs.lens[row])
    missing = split - first
    ends_here = share.begin - missing + splits <= share.end

    @pl.when((share.end > share.begin) & (missing > 0) & ends_here)
    def _() -> None:
        _await(shape, refs, program, missing)
        _fold(shape, refs, row, head, 0, splits)

    plgpu.wait_smem_to_gmem(0)


def _count(shape: _Shape, refs: _Refs, holder: jax.Array) -> None:
    """One more split of the row that `holder` will finish lies in device memory."""

    def signal(_: Any, counter: Any) -> None:
        mgpu.utils.warpgroup_barrier()
        mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(counter)).signal(1, memory_scope="gpu")

    if not shape.interpret:
        call: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(signal)
        call(refs.counters.at[holder])


def _await(shape: _Shape, refs: _Refs, program: jax.Array, missing: jax.Array) -> None:
    """Wait until the earlier programs' splits are there; leaves the counter at 0."""

    def wait(_: Any, counter: Any, value: Any) -> None:
        semaphore = mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(counter))
        semaphore.wait(value.registers.item(), decrement=True, memory_scope="gpu")

    if not shape.interpret:
        call: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))(wait)
        call(refs.counters.at[program], missing)


def _full(dims: tuple[int, ...], value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full(dims, value, jnp.float32), plgpu.Layout.WGMMA)


def _product(dims: tuple[int, int], left: Any, right: Any) -> jax.Array:
    def product(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(dims, jnp.float32))


def _attend(shape: _Shape, refs: _Refs, team: int, unit: Unit, step: jax.Array, stream: jax.Array) -> Carry:
    """Sums over a team's blocks of a split, f32[H, lanes], and their maximum and total a column."""
    top, total = _weights(shape, refs, team, unit, step, stream)
    acc = _values(shape, refs, team, unit, stream + unit.blocks(shape.rows, team, TEAMS)[1])
    return acc, top, total


def _weights(
    shape: _Shape, refs: _Refs, team: int, unit: Unit, step: jax.Array, stream: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Leave the softmax weights in shared memory; their maximum and sum a column."""
    begin, count = unit.blocks(shape.rows, team, TEAMS)
    dims = BLOCK, shape.lanes
    turn = lax.rem(step, jnp.int32(2))
    plgpu.barrier_wait(refs.q_full.at[turn])
    factor = _factor(shape, refs, unit)

    def score(block: jax.Array, highest: jax.Array) -> jax.Array:
        slot = lax.rem(stream + block, jnp.int32(shape.stages))
        plgpu.barrier_wait(refs.full.at[team * shape.stages + slot])
        wide = BLOCK, shape.parts * shape.lanes
        keys, first = refs.ring.at[team, slot], begin + block * (TEAMS * BLOCK)
        _patch(refs, unit, first, keys, refs.new_k, refs.k)
        scores = _product(wide, keys, refs.q_smem.at[turn].transpose((1, 0)))
        plgpu.barrier_arrive(refs.free.at[team * shape.stages + slot])
        if shape.narrow:
            scores = scores[:, : shape.lanes] + scores[:, shape.lanes :] * (1 / LOW_PART)
        scores = _visible(shape, unit, first, scores, factor)
        refs.scores.at[team, block][...] = scores
        return jnp.maximum(highest, scores)

    highest = lax.fori_loop(0, count, score, _full(dims, _FLOOR))
    plgpu.barrier_arrive(refs.q_free.at[turn])
    top = highest.max(axis=0)

    def weigh(block: jax.Array, total: jax.Array) -> jax.Array:
        scores = plgpu.load(refs.scores.at[team, block], layout=plgpu.Layout.WGMMA)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(top, dims, [1]))
        narrow = plgpu.layout_cast(weights.astype(shape.weight_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        refs.weights.at[team, block].transpose((1, 0))[...] = narrow
        return total + weights

    total = lax.fori_loop(0, count, weigh, _full(dims, 0.0))
    plgpu.commit_smem()
    return top, total.sum(axis=0)


def _factor(shape: _Shape, refs: _Refs, unit: Unit) -> Any:
    """What makes products scores: a number, or one a column."""
    if not shape.narrow:
        return shape.scale
    tile = lax.div(unit.head, jnp.int32(shape.heads_a_tile))
    found = plgpu.load(refs.factor.at[unit.row, tile], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return lax.broadcast_in_dim(found, (BLOCK, shape.lanes), [1])


def _visible(shape: _Shape, unit: Unit, first: jax.Array, scores: jax.Array, factor: Any) -> jax.Array:
    """Scores in base 2; hidden ones far below everything."""
    factor = factor * LOG2E
    if shape.soft_cap is not None:
        cap = shape.soft_cap
        scores = cap - 2.0 * cap / (jnp.exp2(scores * (factor * (2.0 / cap))) + 1.0)
        factor = LOG2E
    layout = plgpu.Layout.WGMMA
    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=layout) + first
    last = unit.kv_len - shape.rows.queries
    if shape.rows.queries == 1:
        visible = key <= last
        if shape.rows.window is not None:
            visible &= key > last - shape.rows.window
    else:
        column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=layout)
        own = jnp.minimum(lax.div(column, jnp.int32(shape.group)), shape.rows.queries - 1) + last
        visible = key <= own
        if shape.rows.window is not None:
            visible &= key > own - shape.rows.window
    return jnp.where(visible, scores * factor, _MASKED)


def _values(shape: _Shape, refs: _Refs, team: int, unit: Unit, stream: jax.Array) -> jax.Array:
    """Weighted sum of values, transposed: f32[H, lanes]."""
    begin, count = unit.blocks(shape.rows, team, TEAMS)
    dims = shape.H, shape.lanes

    def one(block: jax.Array, acc: jax.Array) -> jax.Array:
        slot = lax.rem(stream + block, jnp.int32(shape.stages))
        barrier = team * shape.stages + slot
        plgpu.barrier_wait(refs.full.at[barrier])
        first = begin + block * (TEAMS * BLOCK)
        values = refs.ring.at[team, slot]
        if shape.narrow:
            _widen(shape, unit, first, values, refs.wide.at[team])
            plgpu.barrier_arrive(refs.free.at[barrier])
            values = refs.wide.at[team]
        else:
            pl.when(_has_hidden(shape, unit, first))(lambda: _clear(shape, unit, first, values))
            _patch(refs, unit, first, values, refs.new_v, refs.v)
        acc += _product(dims, values.transpose((1, 0)), refs.weights.at[team, block].transpose((1, 0)))
        if not shape.narrow:
            plgpu.barrier_arrive(refs.free.at[barrier])
        return acc

    acc = lax.fori_loop(0, count, one, _full(dims, 0.0))
    return acc * refs.v_scale[unit.head] if shape.narrow else acc


def _patch(refs: _Refs, unit: Unit, first: jax.Array, block: Any, new: Any, pages: Any) -> None:
    """Put a row's newest key or value in its block, which came without it, and in its page."""
    if new is None:
        return
    position = unit.kv_len - 1

    @pl.when(position < first + BLOCK)
    def _() -> None:
        layout, page_size = plgpu.Layout.WGMMA, pages.shape[2]
        it = plgpu.load(new.at[unit.row, unit.head], layout=layout.reduce(0), optimized=False)
        found = plgpu.load(block, layout=layout)
        key = plgpu.broadcasted_iota(jnp.int32, found.shape, 0, layout=layout) + first
        block[...] = jnp.where(key == position, lax.broadcast_in_dim(it, found.shape, [1]), found)
        plgpu.commit_smem()
        page = refs.table[unit.row, lax.div(position, jnp.int32(page_size))]
        pages.at[page, unit.head, lax.rem(position, jnp.int32(page_size))][...] = it


def _has_hidden(shape: _Shape, unit: Unit, first: jax.Array) -> jax.Array:
    """Whether a block holds values that no query sees, which may be NaN: their weight is 0, and 0 * NaN is not."""
    hidden = unit.keys(shape.rows)[1] < first + BLOCK
    if shape.rows.window is not None:
        hidden |= first < shape.rows.lowest(unit.kv_len)
    return hidden


def _cleared(shape: _Shape, unit: Unit, first: jax.Array, values: jax.Array, layout: Any) -> jax.Array:
    key = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=layout) + first
    held = (key < unit.kv_len) & (key >= shape.rows.lowest(unit.kv_len))
    return jnp.where(held, values, jnp.zeros_like(values))


def _clear(shape: _Shape, unit: Unit, first: jax.Array, values: Any) -> None:
    """Zero the hidden values of a block."""
    layout = plgpu.Layout.WGMMA
    values[...] = _cleared(shape, unit, first, plgpu.load(values, layout=layout), layout)
    plgpu.commit_smem()


def _widen(shape: _Shape, unit: Unit, first: jax.Array, values: Any, wide: Any) -> None:
    """e4m3 values of a block as float16, hidden ones as 0."""
    layout = plgpu.Layout.SMEM_GMEM_COPY((BLOCK, shape.H), jnp.float16, 128)
    found = plgpu.load(values, layout=layout).astype(jnp.float16)
    hidden = _has_hidden(shape, unit, first)

    @pl.when(hidden)
    def _() -> None:
        wide[...] = _cleared(shape, unit, first, found, layout)

    @pl.when(jnp.logical_not(hidden))
    def _() -> None:
        wide[...] = found

    plgpu.commit_smem()


def _fold(shape: _Shape, refs: _Refs, row: jax.Array, head: jax.Array, place: int, splits: jax.Array) -> None:
    """Add a row's splits in order; many are read at once, as each read waits for the second-level cache."""
    plgpu.commit_smem()  # for its barrier: this program's sums are read by other threads than wrote them
    few = jnp.int32(FOLDED[0])
    pl.when(splits <= few)(lambda: _fold_by(shape, refs, row, head, place, splits, FOLDED[0]))
    if shape.max_splits > FOLDED[0]:
        pl.when(splits > few)(lambda: _fold_by(shape, refs, row, head, place, splits, FOLDED[1]))


def _fold_by(
    shape: _Shape, refs: _Refs, row: jax.Array, head: jax.Array, place: int, splits: jax.Array, at_once: int
) -> None:
    program = lax.axis_index("program")
    dims, column = (shape.H, shape.lanes), plgpu.Layout.WGMMA.reduce(0)

    def read(split: jax.Array) -> Carry:
        at = program, place, jnp.minimum(split, splits - 1)
        part = plgpu.load(refs.partial.at[at], layout=plgpu.Layout.WGMMA, optimized=False)
        top = plgpu.load(refs.stats.at[(*at, 0)], layout=column, optimized=False)
        total = plgpu.load(refs.stats.at[(*at, 1)], layout=column, optimized=False)
        return part, top + jnp.where(split < splits, 0.0, _MASKED), total

    def chunk(number: jax.Array, carry: Carry) -> Carry:
        parts = [read(number * at_once + each) for each in range(at_once)]
        return functools.reduce(functools.partial(_added, shape), parts, carry)

    def column_full(value: float) -> jax.Array:
        return plgpu.layout_cast(jnp.full((shape.lanes,), value, jnp.float32), column)

    start = _full(dims, 0.0), column_full(_FLOOR), column_full(0.0)
    acc, _, total = lax.fori_loop(0, pl.cdiv(splits, at_once), chunk, start)
    _store(shape, refs, row, head, acc, total)


def _store(shape: _Shape, refs: _Refs, row: jax.Array, head: jax.Array, acc: jax.Array, total: jax.Array) -> None:
    seen = total > 0
    factor = jnp.where(seen, 1.0 / jnp.where(seen, total, 1.0), 0.0)
    out = (acc * lax.broadcast_in_dim(factor, acc.shape, [1])).astype(shape.dtype)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last output has left shared memory
    refs.out_smem.transpose((1, 0))[...] = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    tile, column = lax.div(head, jnp.int32(shape.heads_a_tile)), lax.rem(head, jnp.int32(shape.heads_a_tile))
    rows = pl.ds(column * shape.columns, shape.columns if shape.heads_a_tile > 1 else shape.lanes)
    plgpu.copy_smem_to_gmem(refs.out_smem.at[rows], refs.out.at[row, tile, rows])
