"""Paged decode attention on Hopper in Pallas Mosaic GPU: TMA copies of pages, WGMMA over transposed scores.

In: one query a row (or a few, when a draft is verified), one layer's pages, page tables, lengths, already checked by
api.py. Out: attention outputs.
A row is cut at absolute key positions 0, SPLIT, 2 * SPLIT, ... and each split, for one kv head, is a unit of work. A
fixed number of programs walks the units of all rows in order, each a contiguous share of them; its memory warpgroup runs
ahead across units, one TMA copy a page. The compute warpgroup takes all keys of a split first: S^T = K q^T with 64 keys
in the tall dimension of the tensor cores and the queries of a kv head in the narrow one, so nothing is wasted on padding
and a split needs one softmax; then O^T = V^T P^T while values arrive.
Splits of one row leave their sums in device memory; the program that holds a row's last split adds them in order. If
some belong to earlier programs it does so at its end, after waiting for their count: it waits only for programs that
started before it and never wait before they have counted.
Bits: a row's splits, the order of additions in a split and the order of splits depend on nothing but its own length.
It does not know how pages are written.
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
from jax._src.lib.mlir import ir  # type: ignore[import-untyped]
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning

LOG2E = math.log2(math.e)
SPLIT = 512  # keys a split; a constant of the op, not a tuning knob: it decides bits
BLOCK = 64  # keys a block: the tall dimension of WGMMA
WARPS = 4
COMPUTE, MEMORY = 0, 1  # warpgroups
SMEM_BYTES = 226 * 1024  # of 227 KB; reductions and barriers take the rest
_MASKED, _FLOOR = -1e30, -1e20  # a masked score lies far under the floor of the maximum: weight 0
FOLDED = 4, 16  # splits of a row read at once, for few and for many
FIELDS = 6  # of a program's entry in the plan
type Carry = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Blocks:
    """Numbers that change only speed."""

    programs: int = 132  # one a multiprocessor
    stages: int | None = None  # blocks of keys or values in flight; None = as many as shared memory holds
    early: bool = False  # start before the kernel in front has ended, and wait for it once inside


@dataclass(frozen=True)
class _Shape:
    """What the kernel knows when it is compiled."""

    B: int
    K: int
    H: int
    page_size: int
    dtype: Any
    queries: int  # a row
    group: int  # query heads a kv head
    heads_a_tile: int  # kv heads whose queries share a tile of lanes
    lanes: int  # queries of a tile: columns of the products
    scale: float
    window: int | None
    soft_cap: float | None
    stages: int
    programs: int
    max_splits: int
    early: bool
    interpret: bool

    @property
    def columns(self) -> int:
        """Queries of one kv head of one row."""
        return self.queries * self.group

    @property
    def copies(self) -> int:
        """TMA copies a block."""
        return max(1, BLOCK // self.page_size)


@dataclass(frozen=True)
class _Refs:
    q: Any  # [B, K / heads_a_tile, lanes, H]
    k: Any  # [P, K, page_size, H]
    v: Any
    table: Any  # i32[B, W]
    lens: Any  # i32[B]
    plan: Any  # i32[programs, FIELDS]
    counters: Any  # i32[programs], 0 before and after
    out: Any  # as q
    partial: Any  # f32[programs, 2, max_splits, H, lanes]
    stats: Any  # f32[programs, 2, max_splits, 2, lanes]
    ring: Any  # [stages, BLOCK, H]
    q_smem: Any  # [2, lanes, H]
    scores: Any  # f32[SPLIT / BLOCK, BLOCK, lanes]
    weights: Any  # [SPLIT / BLOCK, lanes, BLOCK]
    out_smem: Any  # [lanes, H]
    full: Any  # one a stage
    free: Any
    q_full: Any  # two
    q_free: Any


@dataclass(frozen=True)
class _Unit:
    """One split of one row for one kv head, as scalars."""

    row: jax.Array
    head: jax.Array
    split: jax.Array
    kv_len: jax.Array

    def keys(self, shape: _Shape) -> tuple[jax.Array, jax.Array]:
        """First key, a multiple of BLOCK, and one past the last."""
        begin = self.split * SPLIT
        end = jnp.minimum(begin + SPLIT, self.kv_len)
        if shape.window is not None:
            begin = jnp.maximum(begin, lax.div(_lowest(shape, self.kv_len), jnp.int32(BLOCK)) * BLOCK)
        return begin, end

    def blocks(self, shape: _Shape) -> jax.Array:
        begin, end = self.keys(shape)
        return jnp.maximum(lax.div(end - begin + (BLOCK - 1), jnp.int32(BLOCK)), 0)


def _lowest(shape: _Shape, kv_len: jax.Array) -> jax.Array:
    """The first key any query of the row sees."""
    if shape.window is None:
        return jnp.zeros_like(kv_len)
    return jnp.maximum(kv_len - (shape.queries - 1) - shape.window, 0)


def _splits(kv_len: jax.Array, window: int | None, queries: int) -> tuple[jax.Array, jax.Array]:
    """First live split of a row, and how many; one for length 0, whose output somebody must write."""
    stop = lax.div(kv_len + (SPLIT - 1), jnp.int32(SPLIT))
    if window is None:
        return jnp.zeros_like(kv_len), jnp.maximum(stop, 1)
    first = lax.div(jnp.maximum(kv_len - (queries - 1) - window, 0), jnp.int32(SPLIT))
    return first, jnp.maximum(stop - first, 1)


def plan(kv_lens: jax.Array, K: int, programs: int, window: int | None, queries: int) -> jax.Array:
    """i32[programs, FIELDS]: each program's first row, head and split, its first unit, the next one's, and the total.

    A small XLA computation of the lengths alone: the layers of a step share it.
    """
    first, splits = _splits(kv_lens, window, queries)
    units = splits * K
    ends = jnp.cumsum(units, dtype=jnp.int32)
    total = ends[-1]
    edges = (jnp.arange(programs + 1, dtype=jnp.int32) * total) // programs
    start = edges[:-1]
    row = jnp.minimum((ends[None, :] <= start[:, None]).sum(axis=1, dtype=jnp.int32), kv_lens.shape[0] - 1)
    within = start - (ends - units)[row]
    head = within // splits[row]
    split = within - head * splits[row] + first[row]
    return jnp.stack([row, head, split, start, edges[1:], jnp.full_like(row, total)], axis=1)


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
    blocks: Blocks | None = None,
    counters: Any = None,
    interpret: Any = None,
) -> jax.Array:
    """One query a row, at position kv_lens - 1. Rows of length 0 come out 0."""
    verify = functools.partial(verify_attention, scale=scale, window=window, soft_cap=soft_cap, counters=counters)
    return verify(q[:, None], k_pages, v_pages, page_table, kv_lens, blocks=blocks, interpret=interpret)[:, 0]


def refuse(q: jax.Array, k_pages: jax.Array) -> None:
    """NotImplementedError for what this implementation does not do. q is [B, queries, N, H]."""
    queries, N, H = q.shape[1:]
    K, page_size = k_pages.shape[1:3]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"WGMMA takes bfloat16 or float16 queries here, got {q.dtype}")
    if k_pages.dtype != q.dtype:
        raise NotImplementedError(f"pages must be {q.dtype} like the queries, got {k_pages.dtype}")
    if H not in (64, 128, 256):
        raise NotImplementedError(f"head dim must be 64, 128 or 256 for 128-byte swizzles, got {H}")
    if page_size % 8 or (BLOCK % page_size and page_size % BLOCK):
        raise NotImplementedError(f"page size must divide {BLOCK} or be a multiple of it, got {page_size}")
    if queries * (N // K) > 32:
        raise NotImplementedError(f"{queries} queries of {N // K} heads a kv head: at most 32 together")


def verify_attention(
    q: jax.Array,  # [B, queries, N, H]
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,
    page_table: jax.Array,  # i32[B, W]
    kv_lens: jax.Array,  # i32[B]
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    blocks: Blocks | None = None,
    counters: Any = None,
    interpret: Any = None,
) -> jax.Array:
    """The last `queries` queries of each row, whose keys are all in the pages; each has the bits of a decode step."""
    refuse(q, k_pages)
    B, queries, N, H = q.shape
    P, K, page_size = k_pages.shape[:3]
    group = N // K
    packed = queries == 1 and 8 % group == 0 and N % 8 == 0
    heads_a_tile = 8 // group if packed else 1
    lanes = 8 if packed else pl.cdiv(queries * group, 8) * 8
    blocks = blocks or tuning.choose("paged_attention.decode/mosaic_sm90", f"H{H}", Blocks())
    splits = pl.cdiv(page_table.shape[1] * page_size, SPLIT)
    if window is not None:
        splits = min(splits, pl.cdiv(window + queries - 2, SPLIT) + 1)
    stages = blocks.stages or _stages(H, lanes)
    shape = _Shape(
        B, K, H, page_size, q.dtype, queries, group, heads_a_tile, lanes, scale, window, soft_cap,
        stages, blocks.programs, max(splits, 1), blocks.early, interpret is not None,
    )  # fmt: skip
    # An operand of the copy engine must start at 256 bytes; any arithmetic makes a slice an array of its own.
    page_table = jnp.clip(page_table, 0, P - 1)
    tiles = _tiled(q, shape)
    counters = jnp.zeros((blocks.programs,), jnp.int32) if counters is None else counters
    work = plan(kv_lens, K, blocks.programs, window, queries)
    out = _call(shape, tiles, k_pages, v_pages, page_table, kv_lens, work, counters, interpret)
    return _untiled(out, q.shape, shape)


def _stages(H: int, lanes: int) -> int:
    """How many blocks fit beside queries, scores, weights and outputs."""
    taken = 2 * 2 * lanes * H + SPLIT * lanes * (4 + 2) + 2 * lanes * H
    return min(12, (SMEM_BYTES - 2048 - taken) // (2 * BLOCK * H))


def _tiled(q: jax.Array, shape: _Shape) -> jax.Array:
    """[B, queries, N, H] -> [B, K / heads_a_tile, lanes, H]: a bitcast if the heads of a tile fill it."""
    if shape.heads_a_tile * shape.columns == shape.lanes and shape.queries == 1:
        return q.reshape(shape.B, -1, shape.lanes, shape.H)
    apart = q.reshape(shape.B, shape.queries, shape.K, shape.group, shape.H).swapaxes(1, 2)
    apart = apart.reshape(shape.B, shape.K, shape.columns, shape.H)
    return jnp.pad(apart, ((0, 0), (0, 0), (0, shape.lanes - shape.columns), (0, 0)))


def _untiled(out: jax.Array, dims: tuple[int, ...], shape: _Shape) -> jax.Array:
    if shape.heads_a_tile * shape.columns == shape.lanes and shape.queries == 1:
        return out.reshape(dims)
    apart = out[:, :, : shape.columns].reshape(shape.B, shape.K, shape.queries, shape.group, shape.H)
    return apart.swapaxes(1, 2).reshape(dims)


def _call(shape: _Shape, q: jax.Array, *arrays: Any) -> jax.Array:
    *inputs, interpret = arrays
    f32 = jnp.float32
    results = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((shape.programs, 2, shape.max_splits, shape.H, shape.lanes), f32),
        jax.ShapeDtypeStruct((shape.programs, 2, shape.max_splits, 2, shape.lanes), f32),
    ]

    def kernel(*refs: Any) -> None:
        def body(scratch: tuple[Any, ...], barriers: tuple[Any, ...]) -> None:
            everything: tuple[Any, ...] = (*refs, *scratch, *barriers)
            found = _Refs(*everything)
            wg = lax.axis_index("wg")
            if shape.early and not shape.interpret:
                plgpu.griddepcontrol_wait()
            pl.when(wg == MEMORY)(lambda: _memory_warpgroup(shape, found))
            pl.when(wg == COMPUTE)(lambda: _compute_warpgroup(shape, found))

        pl.run_scoped(body, _scratch(shape), _barriers(shape), collective_axes="wg")

    return plgpu.kernel(
        kernel,
        out_type=results,
        grid=(shape.programs,),
        grid_names=("program",),
        num_threads=2,
        thread_name="wg",
        kernel_name="paged_decode",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(q, *inputs)[0]


def _scratch(shape: _Shape) -> tuple[Any, ...]:
    tiling: Any = plgpu.TilingTransform  # typed as abstract in 0.11
    swizzle: Any = plgpu.SwizzleTransform
    transforms = (tiling((8, 64)), swizzle(128))

    def smem(*dims: int) -> Any:
        return plgpu.SMEM(dims, shape.dtype, transforms=transforms)

    blocks = SPLIT // BLOCK
    return (
        smem(shape.stages, BLOCK, shape.H),
        smem(2, shape.lanes, shape.H),
        plgpu.SMEM((blocks, BLOCK, shape.lanes), jnp.float32),
        smem(blocks, shape.lanes, BLOCK),
        plgpu.SMEM((shape.lanes, shape.H), shape.dtype),
    )


def _barriers(shape: _Shape) -> tuple[Any, ...]:
    def barrier(count: int, arrivals: int = 1) -> Any:
        return plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)

    return barrier(shape.stages, shape.copies), barrier(shape.stages), barrier(2), barrier(2)


@dataclass(frozen=True)
class _Share:
    """A program's share of the units."""

    begin: jax.Array  # unit
    end: jax.Array
    total: jax.Array  # of all programs


def _walk(
    shape: _Shape, refs: _Refs, visit: Callable[[_Unit, _Share, jax.Array, jax.Array], None]
) -> tuple[_Share, jax.Array]:
    """Call visit(unit, share, how many units came before, how many blocks of keys came before) in order."""
    program = lax.axis_index("program")
    row, head, split, begin, end, total = (refs.plan[program, field] for field in range(FIELDS))
    share = _Share(begin, end, total)

    def one(step: jax.Array, carry: Carry) -> Carry:
        row, head, split, kv_len, blocks = carry
        following = refs.lens[jnp.minimum(row + 1, shape.B - 1)]  # fetched early: nothing waits for it
        unit = _Unit(row, head, split, kv_len)
        visit(unit, share, step, blocks)
        first, splits = _splits(kv_len, shape.window, shape.queries)
        next_head = split + 1 == first + splits
        next_row = next_head & (head + 1 == shape.K)
        then = jnp.where(next_row, following, kv_len)
        return (
            row + next_row.astype(jnp.int32),
            jnp.where(next_row, 0, head + next_head.astype(jnp.int32)),
            jnp.where(next_head, _splits(then, shape.window, shape.queries)[0], split + 1),
            then,
            blocks + unit.blocks(shape),
        )

    start = (row, head, split, refs.lens[row], jnp.int32(0))
    return share, lax.fori_loop(0, end - begin, one, start)[-1]


# The memory warpgroup.


def _memory_warpgroup(shape: _Shape, refs: _Refs) -> None:
    """Every warp takes each fourth block of the stream: the keys of a unit, then its values, then the next unit's."""

    @plgpu.warp_map
    def _(warp: jax.Array) -> None:
        for mine in range(WARPS):
            pl.when(warp == mine)(functools.partial(_fetch, shape, refs, mine))


def _fetch(shape: _Shape, refs: _Refs, mine: int) -> None:
    stages = shape.stages
    size = min(shape.page_size, BLOCK)

    def visit(unit: _Unit, share: _Share, step: jax.Array, before: jax.Array) -> None:
        del share
        begin, _ = unit.keys(shape)
        count = unit.blocks(shape)
        stream = 2 * before  # keys and values of the units before
        skip = lax.rem(mine - stream, jnp.int32(WARPS))
        start = jnp.where(skip < 0, skip + WARPS, skip)
        if mine == 0:
            _fetch_queries(shape, refs, unit, step)

        @pl.loop(0, lax.div(2 * count - start + (WARPS - 1), jnp.int32(WARPS)))
        def _(turn: jax.Array) -> None:
            place = start + turn * WARPS
            values = place >= count
            key = begin + jnp.where(values, place - count, place) * BLOCK
            pages = [_page_of(shape, refs, unit, key + copy * size) for copy in range(shape.copies)]
            done = stream + place
            slot = lax.rem(done, jnp.int32(stages))
            pl.when(done >= stages)(lambda: plgpu.barrier_wait(refs.free.at[slot]))
            for is_values, source in ((False, refs.k), (True, refs.v)):

                @pl.when(values == is_values)
                def _(source: Any = source) -> None:
                    for copy, (page, rows) in enumerate(pages):
                        target = refs.ring.at[slot, pl.ds(copy * size, size)]
                        plgpu.copy_gmem_to_smem(source.at[page, unit.head, rows], target, refs.full.at[slot])

    share, blocks = _walk(shape, refs, visit)
    if shape.interpret:  # which wants every arrival waited for
        _drain(shape, refs, mine, share, blocks)


def _drain(shape: _Shape, refs: _Refs, mine: int, share: _Share, blocks: jax.Array) -> None:
    if mine == 0:
        units = share.end - share.begin
        for slot in range(2):
            pl.when(units > slot)(lambda slot=slot: plgpu.barrier_wait(refs.q_free.at[slot]))

    @pl.loop(jnp.maximum(2 * blocks - shape.stages, 0), 2 * blocks)
    def _(done: jax.Array) -> None:
        @pl.when(lax.rem(done, jnp.int32(WARPS)) == mine)
        def _() -> None:
            plgpu.barrier_wait(refs.free.at[lax.rem(done, jnp.int32(shape.stages))])


def _fetch_queries(shape: _Shape, refs: _Refs, unit: _Unit, step: jax.Array) -> None:
    slot = lax.rem(step, jnp.int32(2))
    pl.when(step >= 2)(lambda: plgpu.barrier_wait(refs.q_free.at[slot]))
    tile = lax.div(unit.head, jnp.int32(shape.heads_a_tile))
    plgpu.copy_gmem_to_smem(refs.q.at[unit.row, tile], refs.q_smem.at[slot], refs.q_full.at[slot])


def _provably(value: jax.Array, multiple: int) -> jax.Array:
    """A value that is a multiple, in a form that says so; pl.multiple_of does not exist for single warps in 0.11."""
    return lax.div(value, jnp.int32(multiple)) * multiple


def _page_of(shape: _Shape, refs: _Refs, unit: _Unit, key: jax.Array) -> tuple[jax.Array, Any]:
    """Page and rows in it of one copy, whose first key is `key`.

    Before the window and past the row's keys stand the nearest visible page's.
    """
    size = min(shape.page_size, BLOCK)
    visible = jnp.clip(key, _lowest(shape, unit.kv_len), unit.kv_len - 1)
    page = refs.table[unit.row, lax.div(visible, jnp.int32(shape.page_size))]
    first = _provably(lax.rem(key, jnp.int32(shape.page_size)), size) if shape.page_size > size else 0
    return page, pl.ds(first, size)


# The compute warpgroup.


def _compute_warpgroup(shape: _Shape, refs: _Refs) -> None:
    def visit(unit: _Unit, share: _Share, step: jax.Array, before: jax.Array) -> None:
        top, total = _weights(shape, refs, unit, step, 2 * before)
        acc = _values(shape, refs, unit, 2 * before + unit.blocks(shape))
        first, splits = _splits(unit.kv_len, shape.window, shape.queries)

        @pl.when(splits == 1)
        def _() -> None:
            _store(shape, refs, unit.row, unit.head, acc, total)

        @pl.when(splits > 1)
        def _() -> None:
            own = unit.split - first
            now = share.begin + step
            row_begin, row_last = now - own, now - own + splits - 1
            holder = lax.div((row_last + 1) * shape.programs - 1, share.total)
            foreign = row_begin < share.begin
            here = lax.axis_index("program") == holder
            place = jnp.where(here & jnp.logical_not(foreign), 1, 0)
            refs.partial.at[holder, place, own][...] = acc
            refs.stats.at[holder, place, own, 0][...] = top
            refs.stats.at[holder, place, own, 1][...] = total
            pl.when(jnp.logical_not(here))(lambda: _count(shape, refs, holder))
            pl.when(here & jnp.logical_not(foreign) & (own + 1 == splits))(
                lambda: _fold(shape, refs, unit.row, unit.head, 1, splits)
            )

    share, _ = _walk(shape, refs, visit)
    program = lax.axis_index("program")
    row, head, split = (refs.plan[program, field] for field in range(3))
    first, splits = _splits(refs.lens[row], shape.window, shape.queries)
    missing = split - first
    ends_here = share.begin - missing + splits <= share.end

    @pl.when((share.end > share.begin) & (missing > 0) & ends_here)
    def _() -> None:
        _await(shape, refs, program, missing)
        _fold(shape, refs, row, head, 0, splits)

    plgpu.wait_smem_to_gmem(0)


def _count(shape: _Shape, refs: _Refs, holder: jax.Array) -> None:
    """One more split of the row that `holder` will finish lies in device memory."""
    if shape.interpret:
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def signal(_: Any, counter: Any) -> None:
        mgpu.utils.warpgroup_barrier()
        mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(counter)).signal(1, memory_scope="gpu")

    signal(refs.counters.at[holder])


def _await(shape: _Shape, refs: _Refs, program: jax.Array, missing: jax.Array) -> None:
    """Wait until the earlier programs' splits are there; leaves the counter at 0."""
    if shape.interpret:
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def wait(_: Any, counter: Any, value: Any) -> None:
        semaphore = mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(counter))
        semaphore.wait(value.registers.item(), decrement=True, memory_scope="gpu")

    wait(refs.counters.at[program], missing)


def _full(dims: tuple[int, ...], value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full(dims, value, jnp.float32), plgpu.Layout.WGMMA)


def _product(shape: _Shape, dims: tuple[int, int], left: Any, right: Any) -> jax.Array:
    def product(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(dims, jnp.float32))


def _weights(
    shape: _Shape, refs: _Refs, unit: _Unit, step: jax.Array, stream: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Leave the softmax weights of a split in shared memory; their maximum and sum a column."""
    begin, _ = unit.keys(shape)
    count = unit.blocks(shape)
    dims = BLOCK, shape.lanes
    turn = lax.rem(step, jnp.int32(2))
    plgpu.barrier_wait(refs.q_full.at[turn])

    def score(block: jax.Array, highest: jax.Array) -> jax.Array:
        slot = lax.rem(stream + block, jnp.int32(shape.stages))
        plgpu.barrier_wait(refs.full.at[slot])
        scores = _product(shape, dims, refs.ring.at[slot], refs.q_smem.at[turn].transpose((1, 0)))
        plgpu.barrier_arrive(refs.free.at[slot])
        scores = _visible(shape, unit, begin + block * BLOCK, scores)
        refs.scores.at[block][...] = scores
        return jnp.maximum(highest, scores)

    highest = lax.fori_loop(0, count, score, _full(dims, _FLOOR))
    plgpu.barrier_arrive(refs.q_free.at[turn])
    top = highest.max(axis=0)

    def weigh(block: jax.Array, total: jax.Array) -> jax.Array:
        scores = plgpu.load(refs.scores.at[block], layout=plgpu.Layout.WGMMA)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(top, dims, [1]))
        narrow = plgpu.layout_cast(weights.astype(shape.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        refs.weights.at[block].transpose((1, 0))[...] = narrow
        return total + weights

    total = lax.fori_loop(0, count, weigh, _full(dims, 0.0))
    plgpu.commit_smem()
    return top, total.sum(axis=0)


def _visible(shape: _Shape, unit: _Unit, first: jax.Array, scores: jax.Array) -> jax.Array:
    """Scaled scores in base 2; hidden ones far below everything."""
    factor = shape.scale * LOG2E
    if shape.soft_cap is not None:
        cap = shape.soft_cap
        scores = cap - 2.0 * cap / (jnp.exp2(scores * (2.0 * factor / cap)) + 1.0)
        factor = LOG2E
    layout = plgpu.Layout.WGMMA
    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=layout) + first
    last = unit.kv_len - shape.queries
    if shape.queries == 1:
        visible = key <= last
        if shape.window is not None:
            visible &= key > last - shape.window
    else:
        column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=layout)
        own = jnp.minimum(lax.div(column, jnp.int32(shape.group)), shape.queries - 1) + last
        visible = key <= own
        if shape.window is not None:
            visible &= key > own - shape.window
    return jnp.where(visible, scores * factor, _MASKED)


def _values(shape: _Shape, refs: _Refs, unit: _Unit, stream: jax.Array) -> jax.Array:
    """Weighted sum of a split's values, transposed: f32[H, lanes]."""
    begin, end = unit.keys(shape)
    dims = shape.H, shape.lanes

    def one(block: jax.Array, acc: jax.Array) -> jax.Array:
        slot = lax.rem(stream + block, jnp.int32(shape.stages))
        plgpu.barrier_wait(refs.full.at[slot])
        _clear(shape, refs, unit, begin + block * BLOCK, end, slot)
        values = refs.ring.at[slot].transpose((1, 0))
        acc += _product(shape, dims, values, refs.weights.at[block].transpose((1, 0)))
        plgpu.barrier_arrive(refs.free.at[slot])
        return acc

    return lax.fori_loop(0, unit.blocks(shape), one, _full(dims, 0.0))


def _clear(shape: _Shape, refs: _Refs, unit: _Unit, first: jax.Array, end: jax.Array, slot: jax.Array) -> None:
    """Zero the values that no query sees, which may be NaN: their weight is 0, and 0 * NaN is not."""
    lowest = _lowest(shape, unit.kv_len)
    partial = end < first + BLOCK
    if shape.window is not None:
        partial |= first < lowest

    @pl.when(partial)
    def _() -> None:
        values = refs.ring.at[slot]
        found = plgpu.load(values, layout=plgpu.Layout.WGMMA)
        key = plgpu.broadcasted_iota(jnp.int32, found.shape, 0, layout=plgpu.Layout.WGMMA) + first
        held = (key < end) & (key >= lowest)
        values[...] = jnp.where(held, found, jnp.zeros_like(found))
        plgpu.commit_smem()


def _fold(shape: _Shape, refs: _Refs, row: jax.Array, head: jax.Array, place: int, splits: jax.Array) -> None:
    """Add a row's splits in order; many are read at once, as each read waits for the second-level cache."""
    few = jnp.int32(FOLDED[0])
    pl.when(splits <= few)(lambda: _fold_by(shape, refs, row, head, place, splits, FOLDED[0]))
    if shape.max_splits > FOLDED[0]:
        pl.when(splits > few)(lambda: _fold_by(shape, refs, row, head, place, splits, FOLDED[1]))


def _fold_by(
    shape: _Shape, refs: _Refs, row: jax.Array, head: jax.Array, place: int, splits: jax.Array, at_once: int
) -> None:
    program = lax.axis_index("program")
    dims, column = (shape.H, shape.lanes), plgpu.Layout.WGMMA.reduce(0)

    def read(split: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        at = program, place, jnp.minimum(split, splits - 1)
        part = plgpu.load(refs.partial.at[at], layout=plgpu.Layout.WGMMA, optimized=False)
        top = plgpu.load(refs.stats.at[(*at, 0)], layout=column, optimized=False)
        total = plgpu.load(refs.stats.at[(*at, 1)], layout=column, optimized=False)
        return part, top + jnp.where(split < splits, 0.0, _MASKED), total

    def chunk(number: jax.Array, carry: Carry) -> Carry:
        acc, top, total = carry
        for part, its_top, its_total in [read(number * at_once + each) for each in range(at_once)]:
            new = jnp.maximum(top, its_top)
            old, its = jnp.exp2(top - new), jnp.exp2(its_top - new)
            acc = acc * lax.broadcast_in_dim(old, dims, [1]) + part * lax.broadcast_in_dim(its, dims, [1])
            top, total = new, total * old + its_total * its
        return acc, top, total

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
