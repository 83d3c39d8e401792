"""Tiles of tokens times their expert's weights on Hopper in Pallas Mosaic GPU: weights stream, tokens are narrow.

In: tiles of tokens [tiles, N, K] (or one tile that all share), weights [E, rows, K], which expert each tile is for, and
on the device how many tiles there are. Out: [tiles, N, rows], or [tiles, N, rows / 2] after silu(gate) * up when the
weights are gate over up. Tiles past the count are left unwritten.
Weight rows are the wide side of the tensor cores' product (M = 64 a warpgroup's instruction) and tokens the narrow one
(N = 8 and up), so that a decode step's few tokens waste nothing: one warp streams weights through a deep ring by TMA.
A fixed number of programs deals out (tile, block of rows) units; sums run along K in one order whatever N is.
A kernel that is `early` starts before the one that makes its tokens has ended (programmatic dependent launch): weights,
and which experts are wanted, do not depend on that one, so one warp fetches them at once while another waits to fetch
tokens. A program takes all of a multiprocessor's shared memory: two smaller ones side by side measured slower.
It does not know routing: plan.py makes tiles of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lowered_once import call_shorter

SHARED_BYTES = 226 * 1024  # of the 227 KB a program may have; the rest is barriers
ROWS = 64  # weight rows of one instruction
HELD = 2 * ROWS  # weight rows a compute warpgroup holds: gate and up, or two blocks of rows
MOST_TILES = 1024  # the kernel is lowered for: what it is told is how many are real
SWIZZLED = 64  # elements of a 128-byte row of shared memory


@dataclass(frozen=True)
class Blocks:
    """How units are cut and walked: none of it decides bits."""

    warpgroups: int = 1  # that compute; each holds HELD weight rows
    block_k: int = 128
    stages: int = 8  # at most; as many as fit are used
    programs: int = 132  # one a multiprocessor


@dataclass(frozen=True)
class _Shape:
    """What the kernel knows when it is compiled."""

    N: int
    K: int
    rows: int  # of an expert's output
    gated: bool
    shared: bool  # one tile of tokens for every expert
    dtype: Any
    blocks: Blocks
    stages: int
    early: bool
    interpret: bool

    @property
    def own_rows(self) -> int:
        """Output rows a warpgroup makes of the HELD it holds."""
        return ROWS if self.gated else HELD

    @property
    def row_blocks(self) -> int:
        return self.rows // (self.own_rows * self.blocks.warpgroups)

    @property
    def steps(self) -> int:
        return self.K // self.blocks.block_k

    @property
    def behind(self) -> int:
        """Products still running when the next is issued: tensor cores are the limit only for wide tiles."""
        return 1 if self.N >= 64 else 0

    @property
    def copies(self) -> int:
        """TMA copies a stage."""
        return 1 + self.blocks.warpgroups * (2 if self.gated else 1)


@dataclass(frozen=True)
class _Refs:
    """Everything a warpgroup touches: device memory, then shared memory, then barriers."""

    x: Any  # [tiles or 1, N, K]
    w: Any  # [E, rows or 2 rows, K]
    experts: Any  # i32[tiles]
    count: Any  # i32[1]
    out: Any  # [tiles, N, rows]
    w_smem: Any  # [stages, warpgroups, HELD, block_k]
    x_smem: Any  # [stages, N, block_k]
    out_smem: Any  # [warpgroups, N, ROWS]
    full: Any  # one a stage
    free: Any


@dataclass(frozen=True)
class _Unit:
    """One block of an expert's rows for one tile; `begun` counts the ring's stages used before it."""

    tile: jax.Array
    row: jax.Array
    begun: jax.Array


def tiles_matmul(
    x: jax.Array,  # [tiles, N, K], or [1, N, K]: the same for every tile
    w: jax.Array,  # [E, rows, K], or gated [E, 2 rows, K]: gate, then up
    experts: jax.Array,  # i32[tiles]
    count: jax.Array,  # i32[1]
    *,
    gated: bool,
    early: bool = False,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> jax.Array:
    """out[i] = x[i] @ w[experts[i]].T for i < count. Of x's N rows a multiple of 8 is made, out's later rows are void.

    `early` asks that whatever made w, experts and count was done before the kernel that makes x began.
    """
    tiles, (shared, T, K) = experts.shape[0], x.shape
    N = pl.cdiv(T, 8) * 8
    blocks = blocks or default_blocks(N, K, w.shape[1])
    refuse(x, w, gated, blocks)
    if T > 8 or interpret is not None:  # up to 8 the copy engine fills up what is not there; its interpreter does not
        x = jnp.pad(x, ((0, 0), (0, N - T), (0, 0)))
    rows = w.shape[1] // 2 if gated else w.shape[1]
    stages = min(blocks.stages, _stages_that_fit(N, blocks))
    shape = _Shape(N, K, rows, gated, shared == 1, x.dtype, blocks, stages, early, interpret is not None)

    if interpret is not None:
        return _kernel(shape, tiles, interpret)(x, w, experts, count)
    longest = max(MOST_TILES, pl.next_power_of_2(tiles))
    lengths = {2: longest} if shape.shared else {0: longest, 2: longest}
    result = jax.ShapeDtypeStruct((tiles, N, rows), x.dtype)
    return call_shorter(_kernel(shape, longest, None), (x, w, experts, count), lengths, [result])[0]


@functools.cache
def _kernel(shape: _Shape, tiles: int, interpret: Any) -> Callable[..., jax.Array]:
    def kernel(*arrays: Any) -> None:
        def body(scratch: tuple[Any, ...], barriers: tuple[Any, ...]) -> None:
            everything: tuple[Any, ...] = (*arrays, *scratch, *barriers)
            refs = _Refs(*everything)
            wg = lax.axis_index("wg")
            pl.when(wg == shape.blocks.warpgroups)(lambda: _memory_warpgroup(shape, refs))
            pl.when(wg < shape.blocks.warpgroups)(lambda: _compute_warpgroup(shape, refs, wg))

        pl.run_scoped(body, _scratch(shape), _barriers(shape), collective_axes="wg")

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tiles, shape.N, shape.rows), shape.dtype),
        grid=(shape.blocks.programs,),
        grid_names=("program",),
        num_threads=shape.blocks.warpgroups + 1,
        thread_name="wg",
        kernel_name="grouped_gate_up" if shape.gated else "grouped_matmul",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def default_blocks(N: int, K: int, rows: int) -> Blocks:
    """Few tokens: one warpgroup keeps up with memory. Many: two share each token's block, if an expert's rows allow."""
    if N < 128:
        return Blocks(block_k=128 if K % 128 == 0 else 64)
    if rows % (2 * HELD):
        return Blocks(block_k=64)
    return Blocks(warpgroups=2, block_k=64)


def _stages_that_fit(N: int, blocks: Blocks) -> int:
    stage = (blocks.warpgroups * HELD + N) * blocks.block_k * 2
    return (SHARED_BYTES - blocks.warpgroups * N * ROWS * 2) // stage


def refuse(x: jax.Array, w: jax.Array, gated: bool, blocks: Blocks) -> None:
    """NotImplementedError for what this implementation does not do."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"WGMMA takes bfloat16 or float16 tokens here, got {x.dtype}")
    if w.dtype != x.dtype:
        raise NotImplementedError(f"weights must be {x.dtype} like the tokens, got {w.dtype}")
    T, K = x.shape[1:]
    if T > 256:
        raise NotImplementedError(f"tiles must have at most 256 tokens, got {T}")
    if K % blocks.block_k:
        raise NotImplementedError(f"inputs must be a multiple of {blocks.block_k} wide, got {K}")
    block = blocks.warpgroups * HELD
    if w.shape[1] % block:
        raise NotImplementedError(f"weights must have a multiple of {block} rows an expert, got {w.shape[1]}")


def _scratch(shape: _Shape) -> tuple[Any, ...]:
    tiling: Any = plgpu.TilingTransform  # typed as abstract in 0.11
    swizzle: Any = plgpu.SwizzleTransform
    transforms = (tiling((8, SWIZZLED)), swizzle(128))

    def smem(*dims: int) -> Any:
        return plgpu.SMEM(dims, shape.dtype, transforms=transforms)

    blocks = shape.blocks
    weights = smem(shape.stages, blocks.warpgroups, HELD, blocks.block_k)
    return weights, smem(shape.stages, shape.N, blocks.block_k), smem(blocks.warpgroups, shape.N, ROWS)


def _barriers(shape: _Shape) -> tuple[Any, ...]:
    full = plgpu.Barrier(num_barriers=shape.stages, num_arrivals=shape.copies)
    return full, plgpu.Barrier(num_barriers=shape.stages, num_arrivals=shape.blocks.warpgroups)


def _walk(shape: _Shape, refs: _Refs, visit: Callable[[_Unit], None]) -> jax.Array:
    """Visit this program's units; returns how many stages of the ring they used."""
    program, programs = lax.axis_index("program"), jnp.int32(shape.blocks.programs)
    units = refs.count[0] * shape.row_blocks
    mine = lax.div(jnp.maximum(units - program, 0) + programs - 1, programs)

    @pl.loop(0, mine)
    def _(turn: jax.Array) -> None:
        number = program + turn * programs
        blocks = jnp.int32(shape.row_blocks)
        row = lax.rem(number, blocks) * (shape.own_rows * shape.blocks.warpgroups)
        visit(_Unit(lax.div(number, blocks), row, turn * shape.steps))

    return mine * shape.steps


# The memory warpgroup.


def _after_the_kernel_before(shape: _Shape) -> None:
    """Wait for it, then let the next one begin: whatever this one waited for is done."""
    if not shape.interpret:
        plgpu.griddepcontrol_wait()
        plgpu.griddepcontrol_launch_dependents()


def _memory_warpgroup(shape: _Shape, refs: _Refs) -> None:
    """One warp fetches weights, one tokens: only these wait if the kernel is early."""

    @plgpu.warp_map
    def _(warp: jax.Array) -> None:
        for mine, fetch in enumerate((_fetch_weights, _fetch_tokens)):

            @pl.when(warp == mine)
            def _(fetch: Callable[..., None] = fetch) -> None:
                if fetch is _fetch_tokens or not shape.early:
                    _after_the_kernel_before(shape)
                used = _walk(shape, refs, lambda unit: _ahead(shape, refs, unit, fetch))

                @pl.loop(jnp.maximum(used - shape.stages, 0), used)  # for the interpreter: every arrival is waited for
                def _(done: jax.Array) -> None:
                    plgpu.barrier_wait(refs.free.at[lax.rem(done, jnp.int32(shape.stages))])


def _ahead(shape: _Shape, refs: _Refs, unit: _Unit, fetch: Callable[..., None]) -> None:
    """One unit's weights or tokens, as far ahead as there is room."""
    expert = refs.experts[unit.tile]
    size = shape.blocks.block_k

    @pl.loop(0, shape.steps)
    def _(step: jax.Array) -> None:
        done = unit.begun + step
        slot = lax.rem(done, jnp.int32(shape.stages))
        pl.when(done >= shape.stages)(lambda: plgpu.barrier_wait(refs.free.at[slot]))
        fetch(shape, refs, unit, expert, slot, pl.ds(step * size, size))


def _fetch_weights(shape: _Shape, refs: _Refs, unit: _Unit, expert: jax.Array, slot: jax.Array, columns: Any) -> None:
    for wg in range(shape.blocks.warpgroups):
        row = unit.row + wg * shape.own_rows
        target = refs.w_smem.at[slot, wg]
        if shape.gated:
            for half, first in enumerate((row, row + shape.rows)):
                source = refs.w.at[expert, pl.ds(first, ROWS), columns]
                plgpu.copy_gmem_to_smem(source, target.at[pl.ds(half * ROWS, ROWS)], refs.full.at[slot])
        else:
            plgpu.copy_gmem_to_smem(refs.w.at[expert, pl.ds(row, HELD), columns], target, refs.full.at[slot])


def _fetch_tokens(shape: _Shape, refs: _Refs, unit: _Unit, expert: jax.Array, slot: jax.Array, columns: Any) -> None:
    tile = jnp.int32(0) if shape.shared else unit.tile
    source = refs.x.at[tile, pl.ds(0, shape.N), columns]
    plgpu.copy_gmem_to_smem(source, refs.x_smem.at[slot], refs.full.at[slot])


# The compute warpgroups.


def _compute_warpgroup(shape: _Shape, refs: _Refs, wg: jax.Array) -> None:
    if not shape.early:
        _after_the_kernel_before(shape)  # the count of tiles is its

    def visit(unit: _Unit) -> None:
        acc = _product(shape, refs, wg, unit)
        first, second = acc[:ROWS], acc[ROWS:]
        row = unit.row + wg * shape.own_rows
        if shape.gated:
            _store(shape, refs, wg, unit.tile, row, first / (1.0 + jnp.exp(-first)) * second)
        else:
            _store(shape, refs, wg, unit.tile, row, first)
            _store(shape, refs, wg, unit.tile, row + ROWS, second)

    _walk(shape, refs, visit)
    plgpu.wait_smem_to_gmem(0)


def _product(shape: _Shape, refs: _Refs, wg: jax.Array, unit: _Unit) -> jax.Array:
    """[HELD, N]: this warpgroup's rows times the tile's tokens, along K from the start."""

    def slot_of(step: jax.Array) -> jax.Array:
        return lax.rem(unit.begun + step, jnp.int32(shape.stages))

    def product(acc: Any) -> jax.Array:
        @pl.loop(0, shape.steps)
        def _(step: jax.Array) -> None:
            slot = slot_of(step)
            plgpu.barrier_wait(refs.full.at[slot])
            plgpu.wgmma(acc, refs.w_smem.at[slot, wg], refs.x_smem.at[slot].transpose((1, 0)))
            plgpu.wgmma_wait(shape.behind)
            release = functools.partial(plgpu.barrier_arrive, refs.free.at[slot_of(step - shape.behind)])
            pl.when(step >= shape.behind)(release)

        return acc[...]

    acc = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((HELD, shape.N), jnp.float32))
    if shape.behind:
        plgpu.barrier_arrive(refs.free.at[slot_of(jnp.int32(shape.steps - 1))])
    return acc


def _store(shape: _Shape, refs: _Refs, wg: jax.Array, tile: jax.Array, row: jax.Array, values: jax.Array) -> None:
    """[ROWS, N] of the output, turned on the way to shared memory."""
    staged = refs.out_smem.at[wg]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    staged.transpose((1, 0))[...] = values.astype(shape.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, refs.out.at[tile, :, pl.ds(row, ROWS)])
