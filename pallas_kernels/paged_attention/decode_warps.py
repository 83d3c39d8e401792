"""What the warpgroups of the paged decode kernel do; decode_sm90.py says how, and calls it.

In: a Shape, known at compile time and references to device memory, shared memory and barriers. Out: nothing but what is
written there. It does not know how queries become tiles, nor which dtypes and sizes are welcome.
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

from pallas_kernels.paged_attention.units import BLOCK, SPLIT, Carry, Rows, Share, Unit, walk

LOG2E = math.log2(math.e)
TEAMS = 2  # compute warpgroups; each takes every second block of a split. Decides bits
WARPS = 4  # a warpgroup
REDUCTION_BYTES = 2048  # of shared memory a team
FOLDED = 4, 8  # splits of a row read at once, for few and for many
LOW_PART = 16.0  # what the second part of narrow queries is multiplied by, to be as large as the first
_MASKED, _FLOOR = -1e30, -1e20  # a masked score lies far under the floor of the maximum: weight 0


@dataclass(frozen=True)
class Shape:
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
class Refs:
    """Device memory, then shared memory, then barriers."""

    q: Any  # [B, K / heads_a_tile, parts * lanes, H]
    factor: Any  # f32[B, K / heads_a_tile, lanes], of scores, and f32[K], of values, with e4m3 pages
    v_scale: Any
    new_k: Any  # [B, K, H], if written
    new_v: Any
    sinks: Any  # f32[K, lanes], or None
    k: Any  # [P, K, page_size, H]
    v: Any
    table: Any  # i32[B, W]
    lens: Any  # i32[B]
    plan: Any  # i32[programs, FIELDS]
    counters: Any  # i32[programs], 0 before and after
    out: Any  # [B, K / heads_a_tile, lanes, H]
    partial: Any  # f32[programs, 2, max_splits, H, lanes]
    stats: Any  # f32[programs, 2, max_splits, 2, lanes]
    lse: Any  # f32[B, K, lanes], if wanted
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


def scratch(shape: Shape) -> tuple[Any, ...]:
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


def barriers(shape: Shape) -> tuple[Any, ...]:
    def barrier(count: int, arrivals: int = 1) -> Any:
        return plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)

    slots = TEAMS * shape.stages
    teams = barrier(2), barrier(2, TEAMS), barrier(TEAMS - 1), barrier(TEAMS - 1)
    return barrier(slots, shape.copies), barrier(slots), *teams


# The memory warpgroup.


def memory_warpgroup(shape: Shape, refs: Refs) -> None:
    """A team's warps take turns with the blocks of its stream: a unit's keys, then its values, then the next unit's."""

    @plgpu.warp_map
    def _(warp: jax.Array) -> None:
        for team in range(TEAMS):
            for mine in range(shape.fetchers):
                fetch = functools.partial(_fetch, shape, refs, team, mine)
                pl.when(warp == team * (WARPS // TEAMS) + mine)(fetch)


def _fetch(shape: Shape, refs: Refs, team: int, mine: int) -> None:
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


def _drain(shape: Shape, refs: Refs, team: int, mine: int, share: Share, blocks: jax.Array) -> None:
    if team == mine == 0:
        units = share.end - share.begin
        for slot in range(2):
            pl.when(units > slot)(lambda slot=slot: plgpu.barrier_wait(refs.q_free.at[slot]))

    @pl.loop(jnp.maximum(2 * blocks - shape.stages, 0), 2 * blocks)
    def _(done: jax.Array) -> None:
        @pl.when(lax.rem(done, jnp.int32(shape.fetchers)) == mine)
        def _() -> None:
            plgpu.barrier_wait(refs.free.at[team * shape.stages + lax.rem(done, jnp.int32(shape.stages))])


def _fetch_queries(shape: Shape, refs: Refs, unit: Unit, step: jax.Array) -> None:
    slot = lax.rem(step, jnp.int32(2))
    pl.when(step >= 2)(lambda: plgpu.barrier_wait(refs.q_free.at[slot]))
    tile = lax.div(unit.head, jnp.int32(shape.heads_a_tile))
    plgpu.copy_gmem_to_smem(refs.q.at[unit.row, tile], refs.q_smem.at[slot], refs.q_full.at[slot])


def _provably(value: jax.Array, multiple: int) -> jax.Array:
    """A value that is a multiple, in a form that says so; pl.multiple_of does not exist for single warps in 0.11."""
    return lax.div(value, jnp.int32(multiple)) * multiple


def _page_of(shape: Shape, refs: Refs, unit: Unit, key: jax.Array) -> tuple[jax.Array, Any]:
    """Page and rows in it of one copy, whose first key is `key`.

    Before the window and past the row's keys stand the nearest visible page's.
    """
    size = min(shape.page_size, BLOCK)
    visible = jnp.clip(key, shape.rows.lowest(unit.kv_len), unit.kv_len - 1)
    page = refs.table[unit.row, lax.div(visible, jnp.int32(shape.page_size))]
    first = _provably(lax.rem(key, jnp.int32(shape.page_size)), size) if shape.page_size > size else 0
    return page, pl.ds(first, size)


# The compute warpgroup.


def compute_warpgroup(shape: Shape, refs: Refs, team: int) -> None:
    def visit(unit: Unit, share: Share, step: jax.Array, before: jax.Array) -> None:
        found = _attend(shape, refs, team, unit, step, 2 * before)
        if team > 0:
            _hand_over(refs, team - 1, step, found)
            return
        for other in range(TEAMS - 1):
            found = _take_over(shape, refs, other, found)
        splits = shape.rows.splits(unit.kv_len)[1]
        pl.when(splits == 1)(lambda: _store(shape, refs, unit.row, unit.head, found))
        pl.when(splits > 1)(lambda: _leave(shape, refs, unit, share, step, found))

    share = walk(shape.rows, refs.plan, refs.lens, team, TEAMS, visit)[0]
    if team == 0:
        _finish(shape, refs, share)
    elif shape.interpret:  # which wants every arrival waited for
        pl.when(share.end > share.begin)(lambda: plgpu.barrier_wait(refs.merge_free.at[team - 1]))


def _hand_over(refs: Refs, mine: int, step: jax.Array, found: Carry) -> None:
    """A unit's sums to the first team."""
    pl.when(step > 0)(lambda: plgpu.barrier_wait(refs.merge_free.at[mine]))
    refs.merged.at[mine][...], refs.merged_stats.at[mine, 0][...], refs.merged_stats.at[mine, 1][...] = (
        found[0],
        found[1],
        found[2],
    )
    plgpu.barrier_arrive(refs.merge_full.at[mine])


def _take_over(shape: Shape, refs: Refs, other: int, found: Carry) -> Carry:
    column = plgpu.Layout.WGMMA.reduce(0)
    plgpu.barrier_wait(refs.merge_full.at[other])
    acc = plgpu.load(refs.merged.at[other], layout=plgpu.Layout.WGMMA, optimized=False)
    top = plgpu.load(refs.merged_stats.at[other, 0], layout=column, optimized=False)
    total = plgpu.load(refs.merged_stats.at[other, 1], layout=column, optimized=False)
    plgpu.barrier_arrive(refs.merge_free.at[other])
    return _added(shape, found, (acc, top, total))


def _added(shape: Shape, one: Carry, other: Carry) -> Carry:
    """Sums over two sets of keys, each with its maximum and total a column."""
    dims = shape.H, shape.lanes
    new = jnp.maximum(one[1], other[1])
    old, its = jnp.exp2(one[1] - new), jnp.exp2(other[1] - new)
    acc = one[0] * lax.broadcast_in_dim(old, dims, [1]) + other[0] * lax.broadcast_in_dim(its, dims, [1])
    return acc, new, one[2] * old + other[2] * its


def _leave(shape: Shape, refs: Refs, unit: Unit, share: Share, step: jax.Array, found: Carry) -> None:
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


def _finish(shape: Shape, refs: Refs, share: Share) -> None:
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


def _count(shape: Shape, refs: Refs, holder: jax.Array) -> None:
    """One more split of the row that `holder` will finish lies in device memory."""

    def signal(_: Any, counter: Any) -> None:
        mgpu.utils.warpgroup_barrier()
        mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(counter)).signal(1, memory_scope="gpu")

    if not shape.interpret:
        call: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(signal)
        call(refs.counters.at[holder])


def _await(shape: Shape, refs: Refs, program: jax.Array, missing: jax.Array) -> None:
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


def _attend(shape: Shape, refs: Refs, team: int, unit: Unit, step: jax.Array, stream: jax.Array) -> Carry:
    """Sums over a team's blocks of a split, f32[H, lanes], and their maximum and total a column."""
    top, total = _weights(shape, refs, team, unit, step, stream)
    acc = _values(shape, refs, team, unit, stream + unit.blocks(shape.rows, team, TEAMS)[1])
    return acc, top, total


def _weights(
    shape: Shape, refs: Refs, team: int, unit: Unit, step: jax.Array, stream: jax.Array
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


def _factor(shape: Shape, refs: Refs, unit: Unit) -> Any:
    """What makes products scores: a number, or one a column."""
    if not shape.narrow:
        return shape.scale
    tile = lax.div(unit.head, jnp.int32(shape.heads_a_tile))
    found = plgpu.load(refs.factor.at[unit.row, tile], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return lax.broadcast_in_dim(found, (BLOCK, shape.lanes), [1])


def _visible(shape: Shape, unit: Unit, first: jax.Array, scores: jax.Array, factor: Any) -> jax.Array:
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


def _values(shape: Shape, refs: Refs, team: int, unit: Unit, stream: jax.Array) -> jax.Array:
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


def _patch(refs: Refs, unit: Unit, first: jax.Array, block: Any, new: Any, pages: Any) -> None:
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


def _has_hidden(shape: Shape, unit: Unit, first: jax.Array) -> jax.Array:
    """Whether a block holds values that no query sees, which may be NaN: their weight is 0, and 0 * NaN is not."""
    hidden = unit.keys(shape.rows)[1] < first + BLOCK
    if shape.rows.window is not None:
        hidden |= first < shape.rows.lowest(unit.kv_len)
    return hidden


def _cleared(shape: Shape, unit: Unit, first: jax.Array, values: jax.Array, layout: Any) -> jax.Array:
    key = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=layout) + first
    held = (key < unit.kv_len) & (key >= shape.rows.lowest(unit.kv_len))
    return jnp.where(held, values, jnp.zeros_like(values))


def _clear(shape: Shape, unit: Unit, first: jax.Array, values: Any) -> None:
    """Zero the hidden values of a block."""
    layout = plgpu.Layout.WGMMA
    values[...] = _cleared(shape, unit, first, plgpu.load(values, layout=layout), layout)
    plgpu.commit_smem()


def _widen(shape: Shape, unit: Unit, first: jax.Array, values: Any, wide: Any) -> None:
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


def _fold(shape: Shape, refs: Refs, row: jax.Array, head: jax.Array, place: int, splits: jax.Array) -> None:
    """Add a row's splits in order; many are read at once, as each read waits for the second-level cache."""
    plgpu.commit_smem()  # for its barrier: this program's sums are read by other threads than wrote them
    few = jnp.int32(FOLDED[0])
    pl.when(splits <= few)(lambda: _fold_by(shape, refs, row, head, place, splits, FOLDED[0]))
    if shape.max_splits > FOLDED[0]:
        pl.when(splits > few)(lambda: _fold_by(shape, refs, row, head, place, splits, FOLDED[1]))


def _fold_by(
    shape: Shape, refs: Refs, row: jax.Array, head: jax.Array, place: int, splits: jax.Array, at_once: int
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
    _store(shape, refs, row, head, lax.fori_loop(0, pl.cdiv(splits, at_once), chunk, start))


def _store(shape: Shape, refs: Refs, row: jax.Array, head: jax.Array, found: Carry) -> None:
    acc, top, total = found
    seen = total > 0
    if refs.sinks is not None:
        sinks = plgpu.load(refs.sinks.at[head], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        total += jnp.exp2(sinks * LOG2E - top)
    if refs.lse is not None:
        lse = (top + jnp.log2(jnp.where(seen, total, 1.0))) * (1 / LOG2E)
        refs.lse.at[row, head][...] = jnp.where(seen, lse, _MASKED)
    factor = jnp.where(seen, 1.0 / jnp.where(seen, total, 1.0), 0.0)
    out = (acc * lax.broadcast_in_dim(factor, acc.shape, [1])).astype(shape.dtype)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last output has left shared memory
    refs.out_smem.transpose((1, 0))[...] = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    tile, column = lax.div(head, jnp.int32(shape.heads_a_tile)), lax.rem(head, jnp.int32(shape.heads_a_tile))
    rows = pl.ds(column * shape.columns, shape.columns if shape.heads_a_tile > 1 else shape.lanes)
    plgpu.copy_smem_to_gmem(refs.out_smem.at[rows], refs.out.at[row, tile, rows])
