"""Ragged paged attention on Hopper in Pallas Mosaic GPU: TMA, WGMMA, two compute warpgroups and one for memory.

In: flat ragged queries, one layer's pages, page tables, lengths, already checked by api.py. Out: attention outputs.
Queries are cut on the device into tiles of 128 of one row and one head; the tile list, longest first, is a small XLA
computation shared by the layers of a step. A fixed number of programs walks (tile, head) pairs in snake order; each
keeps its memory warpgroup running ahead across tiles, following the page table with one TMA copy a page.
Compute warpgroups hold 64 queries each and visit key blocks from the last to the first. Inside one, the softmax of a
visit runs beside the value product of the visit before; between the two, `turn` barriers let one use the tensor cores
while the other does its softmax.
The copy engine moves tiles whose first token is a multiple of 8 (Mosaic's tiling asks for that); other tiles' queries
come through registers. Tiles that start elsewhere or end early store query by query: what follows is somebody else's.
Rows of one query go to the decode kernel, so that their bits are those of a decode step.
A row's bits do not depend on the batch: blocks lie at fixed key positions, and those a query cannot see change
nothing. It does not know how pages are written.
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

from pallas_kernels import tuning
from pallas_kernels.paged_attention import triton
from pallas_kernels.paged_attention.tiles import ALIGN, TILE, Tile, Visit, tile_list, walk

LOG2E = math.log2(math.e)
ROWS = 64  # queries a compute warpgroup
WARPS = 4  # a warpgroup
COMPUTE, MEMORY = 2, 2  # compute warpgroups are 0 and 1; the memory warpgroup is number 2
LANES = 8  # columns that four threads share: partial totals of a row
CHUNK = 64  # columns of an output that go through the row-wise store at once
_MASKED, _FLOOR = -1e30, -1e20  # a masked score, scaled, lies far under the floor of the running maximum: weight 0
type Carry = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Blocks:
    """How tiles are walked: `block_keys` decides bits, the others only speed."""

    block_keys: int = 128
    stages: int = 2  # key and value blocks in flight
    programs: int = 132  # one a multiprocessor


@dataclass(frozen=True)
class _Shape:
    """What the kernel knows when it is compiled."""

    T: int
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

    @property
    def copies(self) -> int:
        """TMA copies a block."""
        return max(1, self.blocks.block_keys // self.page_size)

    @property
    def own_output(self) -> bool:
        """Outputs have shared memory of their own, so that the next tile's queries can be fetched meanwhile."""
        return self.H <= 128


@dataclass(frozen=True)
class _Refs:
    """Everything a warpgroup touches: device memory, then shared memory, then barriers."""

    q: Any  # [T, N, H]
    k: Any  # [P, K, page_size, H]
    v: Any
    table: Any  # i32[R, W]
    tiles: Any  # i32[tiles, 6]
    count: Any  # i32[1]
    out: Any  # [T, N, H]
    q_smem: Any  # [2, 64, H]
    k_smem: Any  # [stages, block_keys, H]
    v_smem: Any
    out_smem: Any  # [2, 64, H], or q_smem
    rows_smem: Any  # [2, 64, CHUNK], plain
    q_full: Any  # one a compute warpgroup
    q_free: Any
    k_full: Any  # one a stage
    v_full: Any
    k_free: Any
    v_free: Any
    turn: Any  # one a compute warpgroup
    cleaned: Any


@dataclass(frozen=True)
class _Half:
    """The 64 queries of a tile that one compute warpgroup holds, `skip` of them from before the tile."""

    wg: jax.Array
    skip: jax.Array
    token: jax.Array
    position: jax.Array


def paged_attention(
    q: jax.Array,  # [T, N, H]
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,
    page_table: jax.Array,  # i32[R, W]
    kv_lens: jax.Array,  # i32[R]
    query_starts: jax.Array,  # i32[R + 1]
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Row r owns q[query_starts[r] : query_starts[r + 1]], the last queries of its kv_lens[r] keys."""
    page_size, default = k_pages.shape[2], default_blocks(q.shape[2])
    blocks = blocks or tuning.choose("paged_attention/mosaic_sm90", tuning_key(q.shape[2], page_size), default)
    refuse(q, k_pages, scale, blocks)
    out = ragged_attention(
        q,
        k_pages,
        v_pages,
        page_table,
        kv_lens,
        query_starts,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        blocks=blocks,
        interpret=interpret,
        fewest=2,
    )
    if interpret is not None:  # the interpreter's threads and other work of the CPU's small pool can starve each other
        out, q = lax.optimization_barrier((out, q))
    first = query_starts[:-1]
    lens = jnp.where(query_starts[1:] - first == 1, kv_lens, 0)
    options: dict[str, Any] = {"scale": scale, "window": window, "soft_cap": soft_cap}
    rows = first, k_pages, v_pages, page_table, lens
    return triton.decode_among(q, out, *rows, **options, interpret=interpret is not None)


def tuning_key(H: int, page_size: int) -> str:
    return f"H{H} page {page_size}"


def default_blocks(H: int) -> Blocks:
    return Blocks() if H <= 128 else Blocks(block_keys=64)


def refuse(q: jax.Array, k_pages: jax.Array, scale: float, blocks: Blocks) -> None:
    """NotImplementedError for what this implementation does not do."""
    page_size, H = k_pages.shape[2], q.shape[2]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"WGMMA takes bfloat16 or float16 queries here, got {q.dtype}")
    if k_pages.dtype != q.dtype:
        raise NotImplementedError(f"pages must be {q.dtype} like the queries, got {k_pages.dtype}")
    if H not in (64, 128, 256):
        raise NotImplementedError(f"head dim must be 64, 128 or 256 for 128-byte swizzles, got {H}")
    if page_size % 8 or (blocks.block_keys % page_size and page_size % blocks.block_keys):
        raise NotImplementedError(f"page size must divide {blocks.block_keys} or be a multiple of it, got {page_size}")
    if scale <= 0:
        raise NotImplementedError(f"the running maximum assumes a positive scale, got {scale}")


def ragged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    query_starts: jax.Array,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    blocks: Blocks,
    interpret: Any = None,
    fewest: int = 1,
) -> jax.Array:
    """As paged_attention, all in one kernel; rows of fewer than `fewest` queries are left unwritten."""
    # A copy engine's operand must start at 256 bytes, and XLA hands a slice of a larger array over in place: this makes
    # the table an array of its own, as any arithmetic does.
    page_table = jnp.clip(page_table, 0, k_pages.shape[0] - 1)
    T, N, H = q.shape
    padded = max(ROWS, pl.cdiv(T, ALIGN) * ALIGN)  # tiles of ALIGN tokens; a tile's loads stay inside the array
    if padded > T:
        q = jnp.pad(q, ((0, padded - T), (0, 0), (0, 0)))
    K, page_size = k_pages.shape[1:3]
    shape = _Shape(q.shape[0], N, K, H, page_size, q.dtype, scale, window, soft_cap, blocks, interpret is not None)
    tiles, count = tile_list(q.shape[0], kv_lens, query_starts, fewest)

    def kernel(*arrays: Any) -> None:
        def body(scratch: tuple[Any, ...], barriers: tuple[Any, ...]) -> None:
            q_smem, k_smem, v_smem, out_smem, rows_smem = scratch
            out_smem = q_smem if out_smem is None else out_smem
            everything: tuple[Any, ...] = (*arrays, q_smem, k_smem, v_smem, out_smem, rows_smem, *barriers)
            refs = _Refs(*everything)
            wg = lax.axis_index("wg")
            pl.when(wg == MEMORY)(lambda: _memory_warpgroup(shape, refs))
            pl.when(wg != MEMORY)(lambda: _compute_warpgroup(shape, refs, wg))

        pl.run_scoped(body, _scratch(shape), _barriers(shape), collective_axes="wg")

    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(blocks.programs,),
        grid_names=("program",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        kernel_name="paged_attention_ragged",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(q, k_pages, v_pages, page_table, tiles, count)
    return out[:T]


def _scratch(shape: _Shape) -> tuple[Any, ...]:
    tiling: Any = plgpu.TilingTransform  # typed as abstract in 0.11
    swizzle: Any = plgpu.SwizzleTransform
    transforms = (tiling((8, 64)), swizzle(128))

    def smem(*dims: int) -> Any:
        return plgpu.SMEM(dims, shape.dtype, transforms=transforms)

    keys = smem(shape.blocks.stages, shape.blocks.block_keys, shape.H)
    queries = smem(COMPUTE, ROWS, shape.H)
    rows = plgpu.SMEM((COMPUTE, ROWS, CHUNK), shape.dtype)
    return queries, keys, keys, queries if shape.own_output else None, rows


def _barriers(shape: _Shape) -> tuple[Any, ...]:
    def barrier(count: int, arrivals: int = 1) -> Any:
        return plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)

    stages = shape.blocks.stages
    full, free = barrier(stages, shape.copies), barrier(stages, COMPUTE)
    return barrier(COMPUTE), barrier(COMPUTE), full, full, free, free, barrier(COMPUTE), barrier(1, COMPUTE)


def _walk(shape: _Shape, refs: _Refs, visit: Visit) -> tuple[jax.Array, jax.Array]:
    blocks_of = functools.partial(_key_blocks, shape)
    return walk(refs.tiles, refs.count, shape.N, shape.blocks.programs, blocks_of, visit)


def _key_blocks(shape: _Shape, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """First and one past last key block that any of the tile's queries sees; at least one, if only to be masked."""
    size = jnp.int32(shape.blocks.block_keys)
    last = pl.cdiv(jnp.minimum(tile.kv_len, tile.position + TILE), size)
    if shape.window is None:
        return jnp.int32(0), jnp.maximum(last, 1)
    first = lax.div(_lowest(shape, tile), size)
    return first, jnp.maximum(last, first + 1)


# The memory warpgroup.


def _memory_warpgroup(shape: _Shape, refs: _Refs) -> None:
    """Even warps fetch keys, odd ones values, each its share of a block's pages; the first also fetches queries."""
    plgpu.set_max_registers(24, action="decrease")

    @plgpu.warp_map
    def _(warp: jax.Array) -> None:
        for mine in range(WARPS):
            odd = mine % 2
            pages, smem, full, free = (
                (refs.v, refs.v_smem, refs.v_full, refs.v_free)
                if odd
                else (refs.k, refs.k_smem, refs.k_full, refs.k_free)
            )
            share = tuple(range(mine // 2, shape.copies, WARPS // 2))
            if share:
                fetch = functools.partial(_fetch, shape, refs, pages, smem, full, free, share, mine == 0)
                pl.when(warp == mine)(fetch)


def _fetch(
    shape: _Shape,
    refs: _Refs,
    pages: Any,
    smem: Any,
    full: Any,
    free: Any,
    share: tuple[int, ...],
    with_queries: bool,
) -> None:
    """One warp's share of the copies, tile after tile, as far ahead as there is room."""
    stages = shape.blocks.stages
    size = min(shape.page_size, shape.blocks.block_keys)

    def visit(tile: Tile, step: jax.Array, before: jax.Array) -> None:
        kv_head = lax.div(tile.head, jnp.int32(shape.N // shape.K))
        first, last = _key_blocks(shape, tile)

        def block(number: jax.Array) -> None:
            done = before + number
            slot = lax.rem(done, jnp.int32(stages))
            places = [_page_of(shape, refs, tile, last - 1 - number, copy) for copy in share]
            pl.when(done >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            for copy, (page, rows) in zip(share, places, strict=True):
                target = smem.at[slot, pl.ds(copy * size, size)]
                plgpu.copy_gmem_to_smem(pages.at[page, kv_head, rows], target, full.at[slot])

        block(jnp.int32(0))  # before the queries: there is room for it earlier
        if with_queries:
            _fetch_queries(refs, tile, step)
        pl.loop(1, last - first)(block)

    steps, blocks = _walk(shape, refs, visit)

    # Every arrival is waited for, if only for the interpreter's sake.
    if with_queries:

        @pl.when(steps > 0)
        def _() -> None:
            for wg in range(COMPUTE):
                plgpu.barrier_wait(refs.q_free.at[wg])

    @pl.loop(jnp.maximum(blocks - stages, 0), blocks)
    def _(done: jax.Array) -> None:
        plgpu.barrier_wait(free.at[lax.rem(done, jnp.int32(stages))])


def _fetch_queries(refs: _Refs, tile: Tile, step: jax.Array) -> None:
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


def _lowest(shape: _Shape, tile: Tile) -> jax.Array:
    """The first key any of the tile's queries sees."""
    return jnp.int32(0) if shape.window is None else jnp.maximum(tile.position - (shape.window - 1), 0)


def _page_of(shape: _Shape, refs: _Refs, tile: Tile, block: jax.Array, copy: int) -> tuple[jax.Array, Any]:
    """Page and rows in it of one copy of a key block.

    Before the window and past the row's keys stand the nearest visible page's; a row of no keys gets page 0.
    """
    size = min(shape.page_size, shape.blocks.block_keys)
    key = block * shape.blocks.block_keys + copy * size
    last = jnp.maximum(jnp.minimum(tile.kv_len, tile.position + TILE) - 1, 0)
    entry = lax.div(jnp.clip(key, _lowest(shape, tile), last), jnp.int32(shape.page_size))
    page = jnp.where(tile.kv_len > 0, refs.table[tile.row, entry], 0)
    first = _provably(lax.rem(key, jnp.int32(shape.page_size)), size) if shape.page_size > size else 0
    return page, pl.ds(first, size)


# The compute warpgroups.


def _compute_warpgroup(shape: _Shape, refs: _Refs, wg: jax.Array) -> None:
    plgpu.set_max_registers(240, action="increase")
    pl.when(wg == 1)(lambda: plgpu.barrier_arrive(refs.turn.at[0]))  # warpgroup 0 goes first

    def visit(tile: Tile, step: jax.Array, before: jax.Array) -> None:
        half = _queries(shape, refs, wg, tile)
        acc, total = _attend(shape, refs, half, tile, before)
        seen = total > 0
        factor = jnp.where(seen, 1.0 / jnp.where(seen, total, 1.0), 0.0)
        wide = lax.broadcast_in_dim(factor, acc.shape, [0])
        _store(shape, refs, half, tile, jnp.where(wide > 0, acc * wide, 0.0).astype(shape.dtype))
        if not shape.own_output:
            plgpu.wait_smem_to_gmem(0)
            plgpu.barrier_arrive(refs.q_free.at[wg])

    _walk(shape, refs, visit)
    plgpu.wait_smem_to_gmem(0)
    pl.when(wg == 0)(lambda: plgpu.barrier_wait(refs.turn.at[0]))


def _queries(shape: _Shape, refs: _Refs, wg: jax.Array, tile: Tile) -> _Half:
    """See that this warpgroup's queries are in shared memory."""
    offset = wg * ROWS
    # Through registers nothing is clipped at the array's end: start earlier instead.
    over = jnp.maximum(tile.token + offset - (shape.T - ROWS), 0)
    skip = jnp.where(tile.aligned, 0, over)
    half = _Half(wg, skip, tile.token + offset - skip, tile.position + offset - skip)

    @pl.when(tile.aligned)
    def _() -> None:
        plgpu.barrier_wait(refs.q_full.at[wg])

    @pl.when(jnp.logical_not(tile.aligned))
    def _() -> None:
        source = refs.q.at[pl.ds(half.token, ROWS), tile.head]
        refs.q_smem.at[wg][...] = plgpu.load(source, layout=plgpu.Layout.WGMMA, optimized=False)
        plgpu.commit_smem()

    return half


def _start(shape: _Shape) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Accumulator, running maximum and partial totals of a tile that has seen nothing."""
    layout = plgpu.Layout.WGMMA

    def full(dims: tuple[int, ...], value: float, where: Any) -> jax.Array:
        return plgpu.layout_cast(jnp.full(dims, value, jnp.float32), where)

    return (
        full((ROWS, shape.H), 0.0, layout),
        full((ROWS,), _FLOOR, layout.reduce(1)),
        full((ROWS, LANES), 0.0, layout),
    )


def _clean_blocks(shape: _Shape, half: _Half) -> tuple[jax.Array, jax.Array]:
    """First and one past last of the blocks that every query of this warpgroup sees whole."""
    size = jnp.int32(shape.blocks.block_keys)
    stop = lax.div(jnp.maximum(half.position + 1, 0), size)
    if shape.window is None:
        return jnp.int32(0), stop
    return pl.cdiv(jnp.maximum(half.position + ROWS - shape.window, 0), size), stop


def _softmax(
    shape: _Shape,
    half: _Half,
    block: jax.Array,
    masked: bool,
    scores: jax.Array,  # f32[64, block_keys], raw
    highest: jax.Array,  # f32[64], of scaled scores
    totals: jax.Array,  # f32[64, LANES]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Weights of one block in f32, how much everything before shrinks, new maximum, new totals."""
    factor = shape.scale * LOG2E
    if shape.soft_cap is not None:
        cap = shape.soft_cap
        scores = cap - 2.0 * cap / (jnp.exp2(scores * (2.0 * factor / cap)) + 1.0)
        factor = LOG2E
    if masked:
        layout = plgpu.Layout.WGMMA
        query = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=layout) + half.position
        key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=layout) + block * shape.blocks.block_keys
        visible = key <= query  # and so below the row's length; queries past the row's end go nowhere
        if shape.window is not None:
            visible &= key > query - shape.window
        scores = jnp.where(visible, scores, _MASKED)
    # Totals stay apart by residue: the sum across threads is left for the end.
    new_highest = jnp.maximum(highest, _narrowed(jnp.maximum, scores).max(axis=1) * factor)
    shrink = jnp.exp2(highest - new_highest)
    weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_highest, scores.shape, [0]))
    return weights, shrink, new_highest, _shrunk(totals, shrink) + _narrowed(jnp.add, weights)


def _narrowed(combine: Callable[[jax.Array, jax.Array], jax.Array], wide: jax.Array) -> jax.Array:
    """[64, block_keys] -> [64, LANES] by short chains: columns of one residue lie in one thread."""
    parts = [wide[:, column : column + LANES] for column in range(0, wide.shape[1], LANES)]
    first, second = (functools.reduce(combine, parts[start::2]) for start in range(2))
    return combine(first, second)


def _shrunk(acc: jax.Array, shrink: jax.Array) -> jax.Array:
    return acc * lax.broadcast_in_dim(shrink, acc.shape, [0])


def _attend(shape: _Shape, refs: _Refs, half: _Half, tile: Tile, before: jax.Array) -> tuple[jax.Array, jax.Array]:
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
        softmax = functools.partial(_softmax, shape, half, last - 1 - visit, masked)
        between = functools.partial(scored, visit), functools.partial(await_next, visit)
        return _both_products(shape, refs, half.wg, slot_of(visit), slot_of(visit - 1), carry, softmax, between)

    zero = jnp.int32(0)
    acc, highest, totals = _start(shape)
    plgpu.barrier_wait(refs.k_full.at[slot_of(zero)])
    scores = _score_product(shape, refs, half.wg, slot_of(zero))
    scored(zero)
    weights, _, highest, totals = _softmax(shape, half, last - 1, True, scores, highest, totals)
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
    acc, _, totals, weights = carry
    final = slot_of(visits - 1)
    acc = _value_product(shape, refs, half.wg, acc, weights, final)
    plgpu.barrier_arrive(refs.v_free.at[final])
    return acc, totals.sum(axis=1)


def _score_product(shape: _Shape, refs: _Refs, wg: jax.Array, slot: jax.Array) -> jax.Array:
    """Raw scores of one key block, in this warpgroup's turn."""
    plgpu.barrier_wait(refs.turn.at[wg])

    def product(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, refs.q_smem.at[wg], refs.k_smem.at[slot].transpose((1, 0)))
        plgpu.barrier_arrive(refs.turn.at[1 - wg])
        return acc[...]

    return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, shape.blocks.block_keys), jnp.float32))


def _value_product(
    shape: _Shape, refs: _Refs, wg: jax.Array, acc: jax.Array, weights: jax.Array, slot: jax.Array
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
    shape: _Shape,
    refs: _Refs,
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


def _clear_tail(shape: _Shape, refs: _Refs, wg: jax.Array, tile: Tile, block: jax.Array, slot: jax.Array) -> None:
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


def _store(shape: _Shape, refs: _Refs, half: _Half, tile: Tile, out: jax.Array) -> None:
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
        for column in range(0, shape.H, CHUNK):
            staged[...] = out[:, column : column + CHUNK]
            plgpu.commit_smem()

            @pl.loop(half.skip, half.skip + live)
            def _(row: jax.Array, column: int = column) -> None:
                target = refs.out.at[pl.ds(half.token + row, 1), tile.head, pl.ds(column, CHUNK)]
                plgpu.copy_smem_to_gmem(staged.at[pl.ds(row, 1)], target)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
