"""What the warpgroups of the ragged kernel do; mosaic_sm90.py says how, and calls it.

In: a Shape, known at compile time, and references to device memory, shared memory and barriers. Out: nothing but what
is written there. It does not know how queries become tiles, nor which dtypes and sizes are welcome.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.tiles import ALIGN, TILE, Carry, Tile, Visit, walk

LOG2E = math.log2(math.e)
ROWS = 64  # queries a compute warpgroup
WARPS = 4  # a warpgroup
COMPUTE, MEMORY, WIDEN = 2, 2, 3  # compute warpgroups are 0 and 1; the memory warpgroup is number 2
LANES = 8  # columns that four threads share: partial totals of a row
COLUMNS = 64  # of a row-wise store at once, 128 bytes: the copy engine reads shared memory at multiples of that only
WIDENED = 32  # rows of a block that become wide at once
LOWEST = -1e30  # the log-sum-exp of nothing
_MASKED, _FLOOR = -1e30, -1e20  # a masked score, scaled, lies far under the floor of the running maximum: weight 0


@dataclass(frozen=True)
class Blocks:
    """How tiles are walked: `block_keys` decides bits, the others only speed."""

    block_keys: int = 128
    stages: int = 2  # key and value blocks in flight
    programs: int = 132  # one a multiprocessor


@dataclass(frozen=True)
class Shape:
    """What the kernel knows when it is compiled."""

    N: int
    K: int
    H: int
    page_size: int
    dtype: Any
    scale: float
    window: int | None
    soft_cap: float | None
    blocks: Blocks
    interpret: bool
    narrow: bool = False  # pages are e4m3, with scales
    limited: bool = False  # each query brings the number of leading keys it sees, in place of a position
    packed: bool = False  # no pages: a row's keys lie together, from a multiple of ALIGN

    @property
    def warpgroups(self) -> int:
        return COMPUTE + (2 if self.narrow else 1)

    @property
    def copies(self) -> int:
        """TMA copies a block."""
        return max(1, self.blocks.block_keys // self.page_size)

    @property
    def own_output(self) -> bool:
        """Outputs have shared memory of their own, so that the next tile's queries can be fetched meanwhile."""
        return self.H <= 128 and not self.narrow

    @property
    def swizzle(self) -> int:
        """Bytes of a row that lie together in shared memory: a row is a whole number of them, without padding."""
        return next(size for size in (128, 64, 32) if 2 * self.H % size == 0)


@dataclass(frozen=True)
class Refs:
    """Everything a warpgroup touches: device memory, then shared memory, then barriers."""

    q: Any  # [T, N, H]
    k: Any  # [P, K, page_size, H], or [S, K, H] if packed
    v: Any
    table: Any  # i32[R, W]; i32[R], where a row's keys begin, if packed
    tiles: Any  # i32[tiles, 6]
    count: Any  # i32[1]
    visible: Any  # i32[T], if limited
    sinks: Any  # f32[N], or None
    k_scale: Any  # f32[K], if narrow
    v_scale: Any
    out: Any  # [T, N, H]
    lse: Any  # f32[tiles * N * COMPUTE, 64], if wanted: of the rows a warpgroup held
    q_smem: Any  # [2, 64, H]
    k_smem: Any  # [stages, block_keys, H]
    v_smem: Any
    out_smem: Any  # [2, 64, H], or q_smem
    rows_smem: Any  # [2, 64, COLUMNS], plain, the last part of a row's columns in the first of them
    raw_k: Any  # e4m3[block_keys, H], if narrow
    raw_v: Any
    q_full: Any  # one a compute warpgroup
    q_free: Any
    k_full: Any  # one a stage
    v_full: Any
    k_free: Any
    v_free: Any
    turn: Any  # one a compute warpgroup
    cleaned: Any
    raw_k_full: Any  # if narrow
    raw_v_full: Any
    raw_k_free: Any
    raw_v_free: Any


@dataclass(frozen=True)
class _Half:
    """The 64 queries of a tile that one compute warpgroup holds, `skip` of them from before the tile."""

    wg: jax.Array
    skip: jax.Array
    token: jax.Array
    position: jax.Array  # of the first query; if limited, one below the fewest keys that any sees
    scale: Any  # of scores


def scratch(shape: Shape) -> tuple[Any, ...]:
    tiling: Any = plgpu.TilingTransform  # typed as abstract in 0.11
    swizzle: Any = plgpu.SwizzleTransform

    def smem(*dims: int, dtype: Any = shape.dtype, bytes_: int = shape.swizzle) -> Any:
        transforms = tiling((8, bytes_ // jnp.dtype(dtype).itemsize)), swizzle(bytes_)
        return plgpu.SMEM(dims, dtype, transforms=transforms)

    keys = smem(shape.blocks.stages, shape.blocks.block_keys, shape.H)
    queries = smem(COMPUTE, ROWS, shape.H)
    rows = plgpu.SMEM((COMPUTE, ROWS, COLUMNS), shape.dtype)
    raw = None
    if shape.narrow:
        raw = smem(shape.blocks.block_keys, shape.H, dtype=jnp.float8_e4m3fn, bytes_=shape.swizzle // 2)
    return queries, keys, keys, queries if shape.own_output else None, rows, raw, raw


def barriers(shape: Shape) -> tuple[Any, ...]:
    def barrier(count: int, arrivals: int = 1) -> Any:
        return plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)

    stages = shape.blocks.stages
    full, free = barrier(stages, 1 if shape.narrow else shape.copies), barrier(stages, COMPUTE)
    raw = (barrier(1, shape.copies),) * 2 + (barrier(1),) * 2 if shape.narrow else (None,) * 4
    return barrier(COMPUTE), barrier(COMPUTE), full, full, free, free, barrier(COMPUTE), barrier(1, COMPUTE), *raw


def walk_tiles(shape: Shape, refs: Refs, visit: Visit) -> tuple[jax.Array, jax.Array]:
    blocks_of = functools.partial(_key_blocks, shape)
    return walk(refs.tiles, refs.count, shape.N, shape.blocks.programs, blocks_of, visit)


def _key_blocks(shape: Shape, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """First and one past last key block that any of the tile's queries sees; at least one, if only to be masked."""
    size = jnp.int32(shape.blocks.block_keys)
    last = pl.cdiv(_stop(shape, tile), size)
    if shape.window is None:
        return jnp.int32(0), jnp.maximum(last, 1)
    first = lax.div(_lowest(shape, tile), size)
    return first, jnp.maximum(last, first + 1)


def _stop(shape: Shape, tile: Tile) -> jax.Array:
    """One past the last key any of the tile's queries sees."""
    return tile.kv_len if shape.limited else jnp.minimum(tile.kv_len, tile.position + TILE)


# The memory warpgroup.


def memory_warpgroup(shape: Shape, refs: Refs) -> None:
    """Even warps fetch keys, odd ones values, each its share of a block's pages; the first also fetches queries."""
    plgpu.set_max_registers(24, action="decrease")

    @plgpu.warp_map
    def _(warp: jax.Array) -> None:
        for mine in range(WARPS):
            share = tuple(range(mine // 2, shape.copies, WARPS // 2))
            if share:
                fetch = functools.partial(_fetch, shape, refs, _ring(shape, refs, mine % 2 == 1), share, mine == 0)
                pl.when(warp == mine)(fetch)


@dataclass(frozen=True)
class _Ring:
    """Where keys, or values, go from their pages."""

    pages: Any
    slots: Callable[[Any], Any]
    full: Any
    free: Any
    stages: int


def _ring(shape: Shape, refs: Refs, values: bool) -> _Ring:
    pages = refs.v if values else refs.k
    if shape.narrow:
        raw, full, free = (
            (refs.raw_v, refs.raw_v_full, refs.raw_v_free) if values else (refs.raw_k, refs.raw_k_full, refs.raw_k_free)
        )
        return _Ring(pages, lambda slot: raw, full, free, 1)
    wide, full, free = (refs.v_smem, refs.v_full, refs.v_free) if values else (refs.k_smem, refs.k_full, refs.k_free)
    return _Ring(pages, lambda slot: wide.at[slot], full, free, shape.blocks.stages)


def _fetch(shape: Shape, refs: Refs, ring: _Ring, share: tuple[int, ...], with_queries: bool) -> None:
    """One warp's share of the copies, tile after tile, as far ahead as there is room."""
    stages, full, free = ring.stages, ring.full, ring.free
    size = min(shape.page_size, shape.blocks.block_keys)

    def visit(tile: Tile, step: jax.Array, before: jax.Array) -> None:
        kv_head = _kv_head(shape, tile)
        first, last = _key_blocks(shape, tile)

        def block(number: jax.Array) -> None:
            done = before + number
            slot = lax.rem(done, jnp.int32(stages))
            places = [_place_of(shape, refs, tile, last - 1 - number, copy) for copy in share]
            pl.when(done >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            for copy, (page, rows) in zip(share, places, strict=True):
                target = ring.slots(slot).at[pl.ds(copy * size, size)]
                source = ring.pages.at[rows, kv_head] if shape.packed else ring.pages.at[page, kv_head, rows]
                plgpu.copy_gmem_to_smem(source, target, full.at[slot])

        block(jnp.int32(0))  # before the queries: there is room for it earlier
        if with_queries:
            _fetch_queries(refs, tile, step)
        pl.loop(1, last - first)(block)

    steps, blocks = walk_tiles(shape, refs, visit)

    # Every arrival is waited for, if only for the interpreter's sake.
    if with_queries:

        @pl.when(steps > 0)
        def _() -> None:
            for wg in range(COMPUTE):
                plgpu.barrier_wait(refs.q_free.at[wg])

    @pl.loop(jnp.maximum(blocks - stages, 0), blocks)
    def _(done: jax.Array) -> None:
        plgpu.barrier_wait(free.at[lax.rem(done, jnp.int32(stages))])


def _fetch_queries(refs: Refs, tile: Tile, step: jax.Array) -> None:
    for wg in range(COMPUTE):
        pl.when(step > 0)(lambda wg=wg: plgpu.barrier_wait(refs.q_free.at[wg]))

        @pl.when(tile.aligned)
        def _(wg: int = wg) -> None:
            token = _provably(tile.token + wg * ROWS, ALIGN)
            queries = refs.q.at[pl.ds(token, ROWS), tile.head]
            plgpu.copy_gmem_to_smem(queries, refs.q_smem.at[wg], refs.q_full.at[wg])


def _provably(value: jax.Array, multiple: int) -> jax.Array:
    """A value that is a multiple, in a form that says so; pl.multiple_of does not exist for single warps in 0.11."""
    return lax.div(value, jnp.int32(multiple)) * multiple


def _lowest(shape: Shape, tile: Tile) -> jax.Array:
    """The first key any of the tile's queries sees."""
    return jnp.int32(0) if shape.window is None else jnp.maximum(tile.position - (shape.window - 1), 0)


def _place_of(shape: Shape, refs: Refs, tile: Tile, block: jax.Array, copy: int) -> tuple[Any, Any]:
    """Page and rows in it of one copy of a key block; packed keys have no pages, and blocks may end in others' keys.

    Before the window and past the row's keys stand the nearest visible page's; a row of no keys gets page 0.
    """
    size = min(shape.page_size, shape.blocks.block_keys)
    key = block * shape.blocks.block_keys + copy * size
    if shape.packed:
        return None, pl.ds(_provably(refs.table[tile.row] + key, ALIGN), size)
    last = jnp.maximum(_stop(shape, tile) - 1, 0)
    entry = lax.div(jnp.clip(key, _lowest(shape, tile), last), jnp.int32(shape.page_size))
    page = jnp.where(tile.kv_len > 0, refs.table[tile.row, entry], 0)
    first = _provably(lax.rem(key, jnp.int32(shape.page_size)), size) if shape.page_size > size else 0
    return page, pl.ds(first, size)


# The warpgroup between, with e4m3 pages.


def widening_warpgroup(shape: Shape, refs: Refs) -> None:
    """Blocks as they come from their pages, made as wide as the queries; the compute warpgroups see no difference."""
    plgpu.set_max_registers(40, action="decrease")
    stages = shape.blocks.stages

    def visit(tile: Tile, step: jax.Array, before: jax.Array) -> None:
        del step
        first, last = _key_blocks(shape, tile)

        @pl.loop(0, last - first)
        def _(number: jax.Array) -> None:
            done = before + number
            slot = lax.rem(done, jnp.int32(stages))
            for raw, raw_full, raw_free, wide, full, free in (
                (refs.raw_k, refs.raw_k_full, refs.raw_k_free, refs.k_smem, refs.k_full, refs.k_free),
                (refs.raw_v, refs.raw_v_full, refs.raw_v_free, refs.v_smem, refs.v_full, refs.v_free),
            ):
                plgpu.barrier_wait(raw_full.at[0])
                pl.when(done >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                _widen(shape, raw, wide.at[slot])
                plgpu.barrier_arrive(raw_free.at[0])
                plgpu.barrier_arrive(full.at[slot])

    blocks = walk_tiles(shape, refs, visit)[1]

    @pl.loop(jnp.maximum(blocks - stages, 0), blocks)
    def _(done: jax.Array) -> None:
        for free in (refs.k_free, refs.v_free):
            plgpu.barrier_wait(free.at[lax.rem(done, jnp.int32(stages))])


def _widen(shape: Shape, raw: Any, wide: Any) -> None:
    columns = 64 if shape.H % 64 == 0 else shape.H
    layout = plgpu.Layout.SMEM_GMEM_COPY((WIDENED, columns), shape.dtype, shape.swizzle)
    for row in range(0, shape.blocks.block_keys, WIDENED):
        for column in range(0, shape.H, columns):
            part = pl.ds(row, WIDENED), pl.ds(column, columns)
            found = plgpu.load(raw.at[part], layout=layout)
            exact = found.astype(jnp.float16)  # what the hardware makes of e4m3
            wide.at[part][...] = exact if shape.dtype == jnp.float16 else exact.astype(jnp.float32).astype(shape.dtype)
    plgpu.commit_smem()


# The compute warpgroups.


def compute_warpgroup(shape: Shape, refs: Refs, wg: jax.Array) -> None:
    plgpu.set_max_registers(224 if shape.narrow else 240, action="increase")
    pl.when(wg == 1)(lambda: plgpu.barrier_arrive(refs.turn.at[0]))  # warpgroup 0 goes first

    def visit(tile: Tile, step: jax.Array, before: jax.Array) -> None:
        half = _queries(shape, refs, wg, tile)
        acc, highest, total = _attend(shape, refs, half, tile, before)
        seen = total > 0
        if refs.sinks is not None:
            total += jnp.exp2(refs.sinks[tile.head] * LOG2E - highest)
        factor = jnp.where(seen, _value_scale(shape, refs, tile) / jnp.where(seen, total, 1.0), 0.0)
        if refs.lse is not None:
            found = (highest + jnp.log2(jnp.where(seen, total, 1.0))) * (1 / LOG2E)
            refs.lse.at[tile.item * COMPUTE + wg][...] = jnp.where(seen, found, LOWEST)
        wide = lax.broadcast_in_dim(factor, acc.shape, [0])
        _store(shape, refs, half, tile, jnp.where(wide > 0, acc * wide, 0.0).astype(shape.dtype))
        if not shape.own_output:
            plgpu.wait_smem_to_gmem(0)
            plgpu.barrier_arrive(refs.q_free.at[wg])

    walk_tiles(shape, refs, visit)
    plgpu.wait_smem_to_gmem(0)
    pl.when(wg == 0)(lambda: plgpu.barrier_wait(refs.turn.at[0]))


def _kv_head(shape: Shape, tile: Tile) -> jax.Array:
    return lax.div(tile.head, jnp.int32(shape.N // shape.K))


def _value_scale(shape: Shape, refs: Refs, tile: Tile) -> Any:
    return refs.v_scale[_kv_head(shape, tile)] if shape.narrow else 1.0


def _queries(shape: Shape, refs: Refs, wg: jax.Array, tile: Tile) -> _Half:
    """See that this warpgroup's queries are in shared memory."""
    offset = wg * ROWS
    # Through registers nothing is clipped at the array's end: start earlier instead.
    over = jnp.maximum(offset + ROWS - tile.room, 0)
    skip = jnp.where(tile.aligned, 0, over)
    position = tile.position if shape.limited else tile.position + offset - skip
    scale = shape.scale * refs.k_scale[_kv_head(shape, tile)] if shape.narrow else shape.scale
    half = _Half(wg, skip, tile.token + offset - skip, position, scale)

    @pl.when(tile.aligned)
    def _() -> None:
        plgpu.barrier_wait(refs.q_full.at[wg])

    @pl.when(jnp.logical_not(tile.aligned))
    def _() -> None:
        source = refs.q.at[pl.ds(half.token, ROWS), tile.head]
        refs.q_smem.at[wg][...] = plgpu.load(source, layout=plgpu.Layout.WGMMA, optimized=False)
        plgpu.commit_smem()

    return half


def _start(shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Accumulator, running maximum and partial totals of a tile that has seen nothing."""
    layout = plgpu.Layout.WGMMA

    def full(dims: tuple[int, ...], value: float, where: Any) -> jax.Array:
        return plgpu.layout_cast(jnp.full(dims, value, jnp.float32), where)

    return (
        full((ROWS, shape.H), 0.0, layout),
        full((ROWS,), _FLOOR, layout.reduce(1)),
        full((ROWS, LANES), 0.0, layout),
    )


def _clean_blocks(shape: Shape, half: _Half) -> tuple[jax.Array, jax.Array]:
    """First and one past last of the blocks that every query of this warpgroup sees whole."""
    size = jnp.int32(shape.blocks.block_keys)
    stop = lax.div(jnp.maximum(half.position + 1, 0), size)
    if shape.window is None:
        return jnp.int32(0), stop
    return pl.cdiv(jnp.maximum(half.position + ROWS - shape.window, 0), size), stop


def _softmax(
    shape: Shape,
    refs: Refs,
    half: _Half,
    block: jax.Array,
    masked: bool,
    scores: jax.Array,  # f32[64, block_keys], raw
    highest: jax.Array,  # f32[64], of scaled scores
    totals: jax.Array,  # f32[64, LANES]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Weights of one block in f32, how much everything before shrinks, new maximum, new totals."""
    factor = half.scale * LOG2E
    if shape.soft_cap is not None:
        cap = shape.soft_cap
        scores = cap - 2.0 * cap / (jnp.exp2(scores * (2.0 * factor / cap)) + 1.0)
        factor = LOG2E
    if masked:
        scores = jnp.where(_visible(shape, refs, half, block, scores.shape), scores, _MASKED)
    # Totals stay apart by residue: the sum across threads is left for the end.
    new_highest = jnp.maximum(highest, _narrowed(jnp.maximum, scores).max(axis=1) * factor)
    shrink = jnp.exp2(highest - new_highest)
    weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_highest, scores.shape, [0]))
    return weights, shrink, new_highest, _shrunk(totals, shrink) + _narrowed(jnp.add, weights)


def _visible(shape: Shape, refs: Refs, half: _Half, block: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    """Which keys of a block each query sees; of queries past the row's end nothing goes anywhere."""
    layout = plgpu.Layout.WGMMA
    key = plgpu.broadcasted_iota(jnp.int32, dims, 1, layout=layout) + block * shape.blocks.block_keys
    if shape.limited:
        limits = refs.visible.at[pl.ds(half.token, ROWS)]
        return key < lax.broadcast_in_dim(plgpu.load(limits, layout=layout.reduce(1), optimized=False), dims, [0])
    query = plgpu.broadcasted_iota(jnp.int32, dims, 0, layout=layout) + half.position
    visible = key <= query  # and so below the row's length
    if shape.window is not None:
        visible &= key > query - shape.window
    return visible


def _narrowed(combine: Callable[[jax.Array, jax.Array], jax.Array], wide: jax.Array) -> jax.Array:
    """[64, block_keys] -> [64, LANES] by short chains: columns of one residue lie in one thread."""
    parts = [wide[:, column : column + LANES] for column in range(0, wide.shape[1], LANES)]
    first, second = (functools.reduce(combine, parts[start::2]) for start in range(2))
    return combine(first, second)


def _shrunk(acc: jax.Array, shrink: jax.Array) -> jax.Array:
    return acc * lax.broadcast_in_dim(shrink, acc.shape, [0])


def _attend(shape: Shape, refs: Refs, half: _Half, tile: Tile, before: jax.Array) -> Carry:
    """Visit the key blocks from the last; the score product of a visit goes out with the value product of the last."""
    first, last = _key_blocks(shape, tile)
    visits = last - first

    def slot_of(visit: jax.Array) -> jax.Array:
        return lax.rem(before + visit, jnp.int32(shape.blocks.stages))

    def await_next(visit: jax.Array) -> None:
        """The next visit's keys, if there is one, and this one's values."""

        @pl.when(visit + 1 < visits)
        def _() -> None:
            plgpu.barrier_wait(refs.k_full.at[slot_of(visit + 1)])

        plgpu.barrier_wait(refs.v_full.at[slot_of(visit)])

    def scored(visit: jax.Array) -> None:
        """The keys of a visit are done with; after the last visit, so are the queries."""
        plgpu.barrier_arrive(refs.k_free.at[slot_of(visit)])
        if shape.own_output:
            pl.when(visit + 1 == visits)(lambda: plgpu.barrier_arrive(refs.q_free.at[half.wg]))

    def step(visit: jax.Array, carry: Carry, *, masked: bool) -> Carry:
        softmax = functools.partial(_softmax, shape, refs, half, last - 1 - visit, masked)
        between = functools.partial(scored, visit), functools.partial(await_next, visit)
        return _both_products(shape, refs, half.wg, slot_of(visit), slot_of(visit - 1), carry, softmax, between)

    zero = jnp.int32(0)
    acc, highest, totals = _start(shape)
    plgpu.barrier_wait(refs.k_full.at[slot_of(zero)])
    scores = _score_product(shape, refs, half.wg, slot_of(zero))
    scored(zero)
    weights, _, highest, totals = _softmax(shape, refs, half, last - 1, True, scores, highest, totals)
    await_next(zero)
    _clear_tail(shape, refs, half.wg, tile, last - 1, slot_of(zero))

    carry = acc, highest, totals, weights.astype(shape.dtype)
    clean = _clean_blocks(shape, half)
    enter = jnp.clip(last - clean[1], 1, visits)
    leave = visits if shape.window is None else jnp.clip(last - clean[0], enter, visits)
    carry = lax.fori_loop(1, enter, functools.partial(step, masked=True), carry)
    carry = lax.fori_loop(enter, leave, functools.partial(step, masked=False), carry)
    if shape.window is not None:
        carry = lax.fori_loop(leave, visits, functools.partial(step, masked=True), carry)
    acc, highest, totals, weights = carry
    final = slot_of(visits - 1)
    acc = _value_product(shape, refs, half.wg, acc, weights, final)
    plgpu.barrier_arrive(refs.v_free.at[final])
    return acc, highest, totals.sum(axis=1)


def _score_product(shape: Shape, refs: Refs, wg: jax.Array, slot: jax.Array) -> jax.Array:
    """Raw scores of one key block, in this warpgroup's turn."""
    plgpu.barrier_wait(refs.turn.at[wg])

    def product(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, refs.q_smem.at[wg], refs.k_smem.at[slot].transpose((1, 0)))
        plgpu.barrier_arrive(refs.turn.at[1 - wg])
        return acc[...]

    return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, shape.blocks.block_keys), jnp.float32))


def _value_product(
    shape: Shape, refs: Refs, wg: jax.Array, acc: jax.Array, weights: jax.Array, slot: jax.Array
) -> jax.Array:
    """acc + weights @ values, in this warpgroup's turn.

    The interpreter (up to 0.12) has neither an accumulator with a start value nor weights in registers.
    """
    plgpu.barrier_wait(refs.turn.at[wg])
    if shape.interpret:
        values = refs.v_smem.at[slot][...]
        plgpu.commit_smem()  # an ordinary read before the copy engine overwrites
        plgpu.barrier_arrive(refs.turn.at[1 - wg])
        return acc + jnp.dot(weights, values, preferred_element_type=jnp.float32)

    def product(ref: Any) -> None:
        plgpu.wgmma(ref, weights, refs.v_smem.at[slot])
        plgpu.barrier_arrive(refs.turn.at[1 - wg])

    summed: Any = pl.run_state(product)(plgpu.WGMMAAccumulatorRef.init(acc))
    return summed


def _both_products(
    shape: Shape,
    refs: Refs,
    wg: jax.Array,
    key_slot: jax.Array,
    value_slot: jax.Array,
    carry: Carry,
    softmax: Callable[..., tuple[jax.Array, jax.Array, jax.Array, jax.Array]],
    between: tuple[Callable[[], None], Callable[[], None]],
) -> Carry:
    """Issue the scores of this visit, then the values of the last; softmax as soon as the first is there.

    `between` runs after the scores are there, and after the softmax.
    """
    acc, highest, totals, weights = carry
    scored, await_next = between
    if shape.interpret:
        acc = _value_product(shape, refs, wg, acc, weights, value_slot)
        scores = pl.run_scoped(
            lambda ref: (plgpu.wgmma(ref, refs.q_smem.at[wg], refs.k_smem.at[key_slot].transpose((1, 0))), ref[...])[1],
            plgpu.WGMMAAccumulatorRef((ROWS, shape.blocks.block_keys), jnp.float32),
        )
        scored()
        weights, shrink, highest, totals = softmax(scores, highest, totals)
        await_next()
        plgpu.barrier_arrive(refs.v_free.at[value_slot])
        return _shrunk(acc, shrink), highest, totals, weights.astype(shape.dtype)

    plgpu.barrier_wait(refs.turn.at[wg])  # before the accumulators exist: ptxas drops their zeros only within a block

    def products(score_ref: Any, acc_ref: Any) -> Carry:
        acc_ref[...] = acc
        plgpu.wgmma(score_ref, refs.q_smem.at[wg], refs.k_smem.at[key_slot].transpose((1, 0)))
        plgpu.wgmma(acc_ref, weights, refs.v_smem.at[value_slot])
        plgpu.barrier_arrive(refs.turn.at[1 - wg])
        scores = lax.optimization_barrier(plgpu.wgmma_accumulator_load(score_ref, wait_n=1))
        scored()
        # Without the barrier LLVM, and without the branch in await_next ptxas, would move the wait for the value
        # product before the softmax.
        new_weights, shrink, new_highest, new_totals = lax.optimization_barrier(softmax(scores, highest, totals))
        await_next()
        # Narrowed only once the value product is done: registers it reads must not be defined while it runs.
        summed, new_weights = lax.optimization_barrier((acc_ref[...], new_weights))
        plgpu.barrier_arrive(refs.v_free.at[value_slot])
        return _shrunk(summed, shrink), new_highest, new_totals, new_weights.astype(shape.dtype)

    scored_ref = plgpu.WGMMAAccumulatorRef((ROWS, shape.blocks.block_keys), jnp.float32)
    return pl.run_scoped(products, scored_ref, plgpu.WGMMAAccumulatorRef((ROWS, shape.H), jnp.float32))


def _clear_tail(shape: Shape, refs: Refs, wg: jax.Array, tile: Tile, block: jax.Array, slot: jax.Array) -> None:
    """Zero the values past the row's last key, which may be NaN: their weight is 0, and 0 * NaN is not.

    With a window, this last block may also repeat the last page before the first visible key.
    """
    size = shape.blocks.block_keys

    @pl.when(tile.kv_len < (block + 1) * size)
    def _() -> None:
        for part in range(size // ROWS):

            @pl.when(wg == part % COMPUTE)
            def _(part: int = part) -> None:
                values = refs.v_smem.at[slot, pl.ds(part * ROWS, ROWS)]
                key = plgpu.broadcasted_iota(jnp.int32, (ROWS, shape.H), 0, layout=plgpu.Layout.WGMMA)
                key += block * size + part * ROWS
                held = key < tile.kv_len
                if shape.window is not None:
                    held &= key >= _lowest(shape, tile)
                found = plgpu.load(values, layout=plgpu.Layout.WGMMA)
                values[...] = jnp.where(held, found, jnp.zeros_like(found))

        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.cleaned)
        plgpu.barrier_wait(refs.cleaned)


def _store(shape: Shape, refs: Refs, half: _Half, tile: Tile, out: jax.Array) -> None:
    """Whole halves at once, by the copy engine if aligned, else from registers; others query by query."""
    live = jnp.minimum(tile.live - half.wg * ROWS, ROWS)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile's output has left shared memory
    at_once = tile.aligned & (live == ROWS)

    @pl.when(at_once)
    def _() -> None:
        staged = refs.out_smem.at[half.wg]
        staged[...] = out
        plgpu.commit_smem()
        token = _provably(half.token, ALIGN)
        plgpu.copy_smem_to_gmem(staged, refs.out.at[pl.ds(token, ROWS), tile.head])

    @pl.when(jnp.logical_not(tile.aligned) & (live == ROWS) & (half.skip == 0))
    def _() -> None:
        refs.out.at[pl.ds(half.token, ROWS), tile.head][...] = out

    @pl.when((live > 0) & ((live < ROWS) | (half.skip > 0)))
    def _() -> None:
        staged = refs.rows_smem.at[half.wg]
        for column in range(0, shape.H, COLUMNS):
            width = min(COLUMNS, shape.H - column)
            staged.at[:, pl.ds(0, width)][...] = out[:, column : column + width]
            plgpu.commit_smem()

            @pl.loop(half.skip, half.skip + live)
            def _(row: jax.Array, column: int = column, width: int = width) -> None:
                target = refs.out.at[pl.ds(half.token + row, 1), tile.head, pl.ds(column, width)]
                plgpu.copy_smem_to_gmem(staged.at[pl.ds(row, 1), pl.ds(0, width)], target)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
