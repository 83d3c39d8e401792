"""Products with quantised weights on Hopper in Pallas Mosaic GPU: weights stream by TMA and meet WGMMA in registers.

In: activations [M, K] in bf16, weights packed by packing.py, scales; already checked by api.py. Out: [M, N]. Sides are
swapped: a warpgroup's 64 rows are outputs and its columns are rows of x, so that one row of x costs no more than
eight. Each thread reads its own 16 bytes of packed weights, widens them to bf16 in registers (exactly: integers up to
255 are bf16) and gives them to WGMMA as its first operand; x lies in shared memory. One warpgroup fetches, the others
compute, each 64 outputs; programs walk units of work and the fetching one runs ahead across them. Order of the sum
over inputs: blocks of 128 (or groups, where smaller) in an accumulator of their own, scaled, added one after the other
in f32; K is cut into `splits` ranges, whose sums are added in order. None of it depends on M, so a row's bits do not
depend on the rows around it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import tuning
from pallas_kernels.lowered_once import call_shorter
from pallas_kernels.quant_matmul import packing, reference

BLOCK = 128  # inputs accumulated at once; decides bits
ROWS = 64  # outputs a warpgroup
MOST_NARROW_ROWS = 512  # of e4m3 x: beyond, the tensor cores are what bounds the product
CHUNK = 32  # columns that leave through shared memory at once
SHARED_BYTES = 222 * 1024  # of 227 KiB; barriers take some
TILES = BLOCK // packing.TILE  # packed tiles a block and warpgroup


@dataclass(frozen=True)
class Blocks:
    """How units are cut: none of these decides bits."""

    warpgroups: int = 4  # that compute
    columns: int = 8  # rows of x
    stages: int = 8  # blocks in flight
    programs: int = 132
    cluster: int = 1  # programs of neighbouring outputs that fetch x together


@dataclass(frozen=True)
class Kind:
    """What the weight is made of."""

    name: str  # int8, int4, e4m3
    group: int | None = None  # inputs that share a scale; None: one scale an output
    zeros: bool = False
    by_row: bool = False  # x has scales of its own

    @property
    def narrow(self) -> bool:
        """Weights and activations are e4m3, and both in shared memory."""
        return self.name == "e4m3"

    @property
    def bits(self) -> int:
        return 4 if self.name == "int4" else 8

    @property
    def groups(self) -> int:
        """Separately scaled parts of a block."""
        return 1 if self.group is None else max(1, BLOCK // self.group)


@dataclass(frozen=True)
class Shape:
    """What the kernel knows when it is compiled."""

    M: int
    N: int
    K: int
    kind: Kind
    splits: int
    dtype: Any
    blocks: Blocks
    interpret: bool

    @property
    def outputs(self) -> int:
        return ROWS * self.blocks.warpgroups

    @property
    def units(self) -> int:
        """Units of work of a cluster: one tile of outputs each of its programs."""
        return self.N // (self.outputs * self.blocks.cluster) * (self.M // self.blocks.columns) * self.splits

    @property
    def clusters(self) -> int:
        return min(self.blocks.programs // self.blocks.cluster, self.units)


@dataclass(frozen=True)
class _Refs:
    """Everything a warpgroup touches: device memory, then shared memory, then barriers."""

    x: Any  # [M, K]
    w: Any  # i32[N / 64, K / 64, rows, 128]
    scale: Any  # [K / group, N], or f32[N]
    zero: Any  # [K / group, N], or nothing
    x_scale: Any  # f32[K / 128, M], or f32[M], or nothing
    out: Any  # [splits, M, N]
    x_smem: Any  # [stages, columns, BLOCK]
    w_smem: Any  # [stages, warpgroups, TILES, rows, 128]
    scale_smem: Any  # [stages, groups, outputs]
    zero_smem: Any
    x_scale_smem: Any  # [stages, 1, columns]
    out_smem: Any  # [warpgroups, CHUNK or fewer columns, 64]
    full: Any
    free: Any


@dataclass(frozen=True)
class _Unit:
    """One tile of the output over one range of inputs, as scalars."""

    split: jax.Array
    row: jax.Array  # of x, in tiles
    output: jax.Array  # in tiles
    first: jax.Array  # block of inputs
    last: jax.Array


def splits_of(N: int, K: int) -> int:
    """Ranges that K is cut into: enough units for the device's multiprocessors. Decides bits, so it knows no M."""
    tiles, blocks = max(1, N // 256), K // BLOCK
    if tiles >= 100:
        return 1
    return max(1, min(8, 128 // tiles, blocks // 4))


def int8_matmul(
    x: jax.Array,  # bf16[M, K]
    words: jax.Array,  # i32[N / 64, K / 64, 8, 128]
    scale: jax.Array,  # f32[N]
    *,
    out_dtype: Any = jnp.float32,
    **options: Any,
) -> jax.Array:
    """W = scale * q."""
    refuse(x)
    return _multiply(Kind("int8"), x, (words, scale), out_dtype, **options)


def int4_matmul(
    x: jax.Array,  # bf16[M, K]
    words: jax.Array,  # i32[N / 64, K / 64, 4, 128]
    scale: jax.Array,  # [K / group, N]
    zero: jax.Array | None = None,  # [K / group, N]
    *,
    out_dtype: Any = jnp.float32,
    **options: Any,
) -> jax.Array:
    """W = scale * (q - zero); without `zero`, q is signed."""
    refuse(x)
    kind = Kind("int4", group=x.shape[1] // scale.shape[0], zeros=zero is not None)
    return _multiply(kind, x, (words, scale) if zero is None else (words, scale, zero), out_dtype, **options)


def fp8_matmul(
    x: jax.Array,  # [M, K]
    weight: jax.Array,  # e4m3[N, K]
    scale: jax.Array,  # f32[N] or f32[K / 128, N]
    x_scale: jax.Array | None = None,
    *,
    out_dtype: Any = jnp.float32,
    **options: Any,
) -> jax.Array:
    """x is rounded to e4m3 by XLA, which fuses that into what made x."""
    refuse(x)
    if scale.ndim == 1 and x.shape[0] > MOST_NARROW_ROWS:
        raise NotImplementedError(
            f"{x.shape[0]} rows, more than {MOST_NARROW_ROWS}, are faster in XLA's own e4m3 product (measured)"
        )
    narrow, scales = reference.narrowed(x, scale.ndim == 2, x_scale)
    kind = Kind("e4m3", group=None if scale.ndim == 1 else BLOCK, by_row=True)
    return _multiply(kind, narrow, (weight, scale, scales), out_dtype, **options)


def refuse(x: jax.Array) -> None:
    """NotImplementedError for what this implementation does not do."""
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"WGMMA takes bfloat16 activations here, got {x.dtype}")


def _multiply(
    kind: Kind,
    x: jax.Array,
    weights: tuple[jax.Array, ...],  # the weight, its scales, and zeros or scales of x
    out_dtype: Any,
    *,
    blocks: Blocks | None = None,
    splits: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    (M, K), N = x.shape, weights[0].shape[0] * (1 if kind.narrow else ROWS)
    if blocks is None:
        blocks = tuning.choose(
            "quant_matmul/mosaic_sm90", tuning_key(kind.name, M, N, K), default_blocks(M, N, kind.bits)
        )
    if extra := -M % blocks.columns:
        x = jnp.pad(x, ((0, extra), (0, 0)))
        if kind.by_row:
            *others, x_scale = weights
            weights = (*others, jnp.pad(x_scale, ((0, 0),) * (x_scale.ndim - 1) + ((0, extra),)))
    splits = splits or splits_of(N, K)
    dtype = jnp.dtype(out_dtype if splits == 1 else jnp.float32)
    shape = Shape(M + extra, N, K, kind, splits, dtype, blocks, interpret is not None)
    return _summed(_call(shape, (x, *weights), interpret), M, out_dtype)


def _summed(parts: jax.Array, M: int, dtype: Any) -> jax.Array:
    """The sum of the ranges, left to XLA, which fuses it into whatever reads it."""
    total = functools.reduce(jnp.add, [parts[split] for split in range(parts.shape[0])])
    return total[:M].astype(dtype)


def tuning_key(kind: str, M: int, N: int, K: int) -> str:
    return f"{kind} {pl.next_power_of_2(M)} x {K} x {N}"


def default_blocks(M: int, N: int, bits: int) -> Blocks:
    columns = next((size for size in (8, 16, 32, 64) if size >= M), 128)
    warpgroups = next(count for count in (4, 2, 1) if N % (ROWS * count) == 0)
    if columns == 128:
        warpgroups = min(warpgroups, 2)
    scales = warpgroups * ROWS * (32 if bits == 4 else 4) + columns * 4  # at most: groups of 32 with zeros
    stage = warpgroups * ROWS * BLOCK * bits // 8 + columns * BLOCK * 2 + scales
    stages = max(2, min(16, (SHARED_BYTES - warpgroups * ROWS * min(CHUNK, columns) * 4) // stage))
    return Blocks(warpgroups, columns, stages)


def _call(shape: Shape, inputs: tuple[jax.Array, ...], interpret: Any) -> jax.Array:
    call = _kernel(shape, inputs[2].dtype, interpret)
    if interpret is not None:
        return call(*inputs)
    result = jax.ShapeDtypeStruct((shape.splits, shape.M, shape.N), shape.dtype)
    return call_shorter(call, inputs, {}, [result])[0]


@functools.cache
def _kernel(shape: Shape, scale_dtype: Any, interpret: Any) -> Callable[..., jax.Array]:
    def kernel(*arrays: Any) -> None:
        x, w, scales, *extra, out = arrays
        zero = extra.pop(0) if shape.kind.zeros else None
        x_scale = extra.pop(0) if shape.kind.by_row else None

        def body(scratch: tuple[Any, ...], barriers: tuple[Any, ...]) -> None:
            refs = _Refs(x, w, scales, zero, x_scale, out, *scratch, *barriers)
            wg = lax.axis_index("wg")
            pl.when(wg == shape.blocks.warpgroups)(lambda: _memory_warpgroup(shape, refs))
            pl.when(wg < shape.blocks.warpgroups)(lambda: _compute_warpgroup(shape, refs, wg))

        pl.run_scoped(body, _scratch(shape, scale_dtype), _barriers(shape), collective_axes="wg")

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((shape.splits, shape.M, shape.N), shape.dtype),
        grid=(shape.clusters,),
        grid_names=("program",),
        cluster=(shape.blocks.cluster,),
        cluster_names=("share",),
        num_threads=shape.blocks.warpgroups + 1,
        thread_name="wg",
        kernel_name=f"quant_matmul_{shape.kind.name}",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def _scratch(shape: Shape, scale_dtype: Any) -> tuple[Any, ...]:
    tiling: Any = plgpu.TilingTransform  # typed as abstract in 0.11
    swizzle: Any = plgpu.SwizzleTransform
    blocks = shape.blocks
    x_dtype = jnp.float8_e4m3fn if shape.kind.narrow else jnp.bfloat16
    tile_bytes = min(128, BLOCK // shape.kind.groups * x_dtype.dtype.itemsize)  # a product takes whole tiles
    swizzled = (tiling((8, tile_bytes // x_dtype.dtype.itemsize)), swizzle(tile_bytes))
    x = plgpu.SMEM((blocks.stages, blocks.columns, BLOCK), x_dtype, transforms=swizzled)
    if shape.kind.narrow:
        w = plgpu.SMEM((blocks.stages, shape.outputs, BLOCK), x_dtype, transforms=swizzled)
    else:
        rows = packing.rows_of(shape.kind.bits)
        w = plgpu.SMEM((blocks.stages, blocks.warpgroups, TILES, rows, packing.LANES), jnp.int32)
    per_group = plgpu.SMEM((blocks.stages, shape.kind.groups, shape.outputs), scale_dtype)
    out = plgpu.SMEM((blocks.warpgroups, min(CHUNK, blocks.columns), ROWS), shape.dtype)
    x_scales = plgpu.SMEM((blocks.stages, 1, max(32, blocks.columns)), jnp.float32)  # copies start at 128 bytes
    grouped = shape.kind.group is not None
    return (
        x,
        w,
        per_group if grouped else None,
        per_group if shape.kind.zeros else None,
        x_scales if grouped and shape.kind.by_row else None,
        out,
    )


def _barriers(shape: Shape) -> tuple[Any, ...]:
    copies = 2 + shape.kind.zeros + (0 if shape.kind.group is None else 1 + shape.kind.by_row)
    stages, warpgroups = shape.blocks.stages, shape.blocks.warpgroups
    full = plgpu.Barrier(num_barriers=stages, num_arrivals=copies)
    if shape.blocks.cluster == 1:
        return full, plgpu.Barrier(num_barriers=stages, num_arrivals=warpgroups)
    # x goes to all programs of the cluster at once, so a stage is free when all of them are done with it.
    return full, plgpu.ClusterBarrier(collective_axes=("share",), num_barriers=stages, num_arrivals=warpgroups)


def _walk(shape: Shape, visit: Any) -> jax.Array:
    """visit(unit, blocks seen before) for this program's share; how many blocks it saw."""
    programs, program, cluster = shape.clusters, lax.axis_index("program"), shape.blocks.cluster
    tiles_n, tiles_m = shape.N // (shape.outputs * cluster), shape.M // shape.blocks.columns
    count = shape.K // BLOCK

    def one(step: jax.Array, before: jax.Array) -> jax.Array:
        number = program + step * programs
        output, rest = lax.rem(number, jnp.int32(tiles_n)), lax.div(number, jnp.int32(tiles_n))
        row, split = lax.rem(rest, jnp.int32(tiles_m)), lax.div(rest, jnp.int32(tiles_m))
        first = lax.div(split * count, jnp.int32(shape.splits))
        last = lax.div((split + 1) * count, jnp.int32(shape.splits))
        output = output * cluster + lax.axis_index("share")
        visit(_Unit(split, row, output, first, last), before)
        return before + last - first

    steps = lax.div(jnp.int32(shape.units + programs - 1) - program, jnp.int32(programs))
    return lax.fori_loop(0, steps, one, jnp.int32(0))


def _registers(blocks: Blocks) -> tuple[int, int] | None:
    """What threads that fetch keep, and what threads that compute get of the rest; more would be waited for forever.

    None where threads have the most there is from the start.
    """
    fetching = 24 if blocks.columns >= 64 else 40
    launched = 65536 // (128 * (blocks.warpgroups + 1)) // 8 * 8
    computing = (launched + (launched - fetching) // blocks.warpgroups) // 8 * 8
    return (fetching, computing) if launched < 248 else None


def _memory_warpgroup(shape: Shape, refs: _Refs) -> None:
    blocks = shape.blocks
    if registers := _registers(blocks):
        plgpu.set_max_registers(registers[0], action="decrease")

    def visit(unit: _Unit, before: jax.Array) -> None:
        @pl.loop(0, unit.last - unit.first)
        def _(step: jax.Array) -> None:
            done = before + step
            slot = lax.rem(done, jnp.int32(blocks.stages))
            block = unit.first + step
            pl.when(done >= blocks.stages)(lambda: plgpu.barrier_wait(refs.free.at[slot]))
            full = refs.full.at[slot]
            if shape.kind.narrow:
                where = pl.ds(unit.output * shape.outputs, shape.outputs), pl.ds(block * BLOCK, BLOCK)
            else:
                where = pl.ds(unit.output * blocks.warpgroups, blocks.warpgroups), pl.ds(block * TILES, TILES)
            plgpu.copy_gmem_to_smem(refs.w.at[where], refs.w_smem.at[slot], full)
            rows = pl.ds(unit.row * blocks.columns, blocks.columns)
            x_block = refs.x.at[rows, pl.ds(block * BLOCK, BLOCK)]
            together = "share" if blocks.cluster > 1 else None
            plgpu.copy_gmem_to_smem(x_block, refs.x_smem.at[slot], full, collective_axes=together)
            if shape.kind.group is not None:
                group = block * BLOCK // shape.kind.group if shape.kind.group > BLOCK else block * shape.kind.groups
                where = pl.ds(group, shape.kind.groups), pl.ds(unit.output * shape.outputs, shape.outputs)
                plgpu.copy_gmem_to_smem(refs.scale.at[where], refs.scale_smem.at[slot], full)
                if shape.kind.zeros:
                    plgpu.copy_gmem_to_smem(refs.zero.at[where], refs.zero_smem.at[slot], full)
                if shape.kind.by_row:
                    target = refs.x_scale_smem.at[slot, :, pl.ds(0, blocks.columns)]
                    plgpu.copy_gmem_to_smem(refs.x_scale.at[pl.ds(block, 1), rows], target, full)

    seen = _walk(shape, visit)

    @pl.loop(jnp.maximum(seen - blocks.stages, 0), seen)  # every arrival is waited for, if only for the interpreter
    def _(done: jax.Array) -> None:
        plgpu.barrier_wait(refs.free.at[lax.rem(done, jnp.int32(blocks.stages))])


def _compute_warpgroup(shape: Shape, refs: _Refs, wg: jax.Array) -> None:
    if registers := _registers(shape.blocks):
        plgpu.set_max_registers(registers[1], action="increase")
    blocks = shape.blocks

    def visit(unit: _Unit, before: jax.Array) -> None:
        def step(number: jax.Array, total: jax.Array) -> jax.Array:
            slot = lax.rem(before + number, jnp.int32(blocks.stages))
            plgpu.barrier_wait(refs.full.at[slot])
            total = (_narrow_block if shape.kind.narrow else _block)(shape, refs, wg, slot, total)
            plgpu.commit_smem()  # ordinary reads before the copy engine overwrites
            plgpu.barrier_arrive(refs.free.at[slot])
            return total

        output = unit.output * shape.outputs + wg * ROWS
        scale = None
        if shape.kind.group is None:  # asked for now: nothing waits for it until the end
            scale = plgpu.load(refs.scale.at[pl.ds(output, ROWS)], layout=by_output(), optimized=False)
        start = plgpu.layout_cast(jnp.zeros((ROWS, blocks.columns), jnp.float32), plgpu.Layout.WGMMA)
        total = lax.fori_loop(0, unit.last - unit.first, step, start)
        if scale is not None:
            total *= lax.broadcast_in_dim(scale.astype(jnp.float32), total.shape, [0])
            if shape.kind.by_row:
                rows = pl.ds(unit.row * blocks.columns, blocks.columns)
                x_scale = plgpu.load(refs.x_scale.at[rows], layout=_by_row(), optimized=False)
                total *= lax.broadcast_in_dim(x_scale, total.shape, [1])
        _store(shape, refs, wg, unit, total, output)

    _walk(shape, visit)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the end of the kernel makes writes visible


def by_output() -> Any:
    """The layout of one number an output beside an accumulator."""
    return plgpu.Layout.WGMMA.reduce(1)


def _by_row() -> Any:
    """The layout of one number a row of x beside an accumulator."""
    return plgpu.Layout.WGMMA.reduce(0)


def _narrow_block(shape: Shape, refs: _Refs, wg: jax.Array, slot: jax.Array, total: jax.Array) -> jax.Array:
    """total plus one block's product of e4m3 operands, both in shared memory."""
    weights = refs.w_smem.at[slot, pl.ds(wg * ROWS, ROWS)]
    if shape.interpret:
        w, x = (array[...].astype(jnp.float32) for array in (weights, refs.x_smem.at[slot]))
        product = _on_a_cpu(w, x)
    else:

        def multiply(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, weights, refs.x_smem.at[slot].T)
            return acc[...]

        product = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, shape.blocks.columns), jnp.float32))
    if shape.kind.group is not None:
        mine = pl.ds(wg * ROWS, ROWS)
        scale = plgpu.load(refs.scale_smem.at[slot, 0, mine], layout=by_output(), optimized=False)
        x_scale = plgpu.load(
            refs.x_scale_smem.at[slot, 0, pl.ds(0, shape.blocks.columns)], layout=_by_row(), optimized=False
        )
        product *= lax.broadcast_in_dim(scale, product.shape, [0]) * lax.broadcast_in_dim(x_scale, product.shape, [1])
    return total + product


def _block(shape: Shape, refs: _Refs, wg: jax.Array, slot: jax.Array, total: jax.Array) -> jax.Array:
    """total plus one block's product, group by group."""
    size = BLOCK // shape.kind.groups
    loaded = refs.w_smem.at[slot, wg]
    words_layout = plgpu.Layout.WG_STRIDED((TILES, packing.rows_of(shape.kind.bits), packing.LANES), vec_size=4)
    words = plgpu.load(loaded, layout=words_layout)
    for group in range(shape.kind.groups):
        zero = None
        mine = pl.ds(wg * ROWS, ROWS)
        if shape.kind.zeros:
            zero = plgpu.load(refs.zero_smem.at[slot, group, mine], layout=by_output(), optimized=False)
            zero = zero.astype(jnp.float32)
        weights = widen(shape, words, zero, group * size, size)
        columns = refs.x_smem.at[slot, :, pl.ds(group * size, size)]
        product = _product(shape, weights, columns)
        if shape.kind.group is not None:
            scale = plgpu.load(refs.scale_smem.at[slot, group, mine], layout=by_output(), optimized=False)
            product *= lax.broadcast_in_dim(scale.astype(jnp.float32), product.shape, [0])
        total += product
    return total


def _product(shape: Shape, weights: jax.Array, columns: Any) -> jax.Array:
    """[64, columns] in f32. The interpreter (up to 0.12) has no WGMMA with an operand in registers."""
    if shape.interpret:
        x = columns[...]
        plgpu.commit_smem()
        return _on_a_cpu(weights, x)

    def product(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, weights, columns.T)
        return acc[...]

    return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, shape.blocks.columns), jnp.float32))


def _on_a_cpu(weights: jax.Array, x: jax.Array) -> jax.Array:
    """weights @ x.T, eight columns at a time: a CPU's order of sums changes with the shape."""
    contract = (((1,), (1,)), ((), ()))
    parts = [
        lax.dot_general(weights, x[column : column + 8], contract, preferred_element_type=jnp.float32)
        for column in range(0, x.shape[0], 8)
    ]
    return jnp.concatenate(parts, axis=1)


def widen(shape: Shape, words: jax.Array, zero: jax.Array | None, start: int, size: int) -> jax.Array:
    """bf16[64, size] of the block's inputs from `start`: q, or q - zero."""
    if shape.interpret:
        values = jnp.concatenate(
            [packing.unpack(tile[None, None], shape.kind.bits, signed=zero is None) for tile in words], axis=1
        )
        wide = values[:, start : start + size].astype(jnp.float32)
        return (wide if zero is None else wide - zero[:, None]).astype(jnp.bfloat16)
    layout = plgpu.Layout.WG_STRIDED(words.shape, vec_size=4)
    arguments = (words,) if zero is None else (words, zero)
    kinds = (layout,) if zero is None else (layout, by_output())

    @plgpu.inline_mgpu(
        arg_types=kinds, return_type=plgpu.ShapeDtypeStruct((ROWS, size), jnp.bfloat16, layout=plgpu.Layout.WGMMA)
    )
    def widen(ctx: Any, words: Any, zero: Any = None) -> Any:
        del ctx
        return _widen_registers(shape.kind.bits, words, zero, start, size)

    return widen(*arguments)


def _widen_registers(bits: int, words: Any, zero: Any, start: int, size: int) -> Any:
    """The same in one thread's registers, as Mosaic's dialect. `words` are vectors of four."""
    i32 = ir.IntegerType.get_signless(32)
    bf16x2 = ir.VectorType.get((2,), ir.BF16Type.get())

    def constant(value: int) -> Any:
        return arith.constant(i32, ir.IntegerAttr.get(i32, value))

    def asm(text: str, *operands: Any) -> Any:
        return llvm.inline_asm(i32, list(operands), text, "=r" + ",r" * len(operands))

    per_vector = 4
    vectors = list(words.registers.flat)
    per_step = 1 if bits == 4 else 2
    out = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((ROWS, size)), dtype=object)
    biases = [constant(0x43084308)] * 2
    if zero is not None:
        # 128 + zero, twice, for rows g and g + 8 of this thread.
        halves = list(zero.registers.flat)
        biases = [
            asm(
                "{ .reg .f32 s; add.f32 s, $1, 0f43000000; cvt.rn.bf16x2.f32 $0, s, s; }",
                arith.bitcast(i32, half if not isinstance(half.type, ir.VectorType) else vector.extract(half, [], [0])),
            )
            for half in halves
        ]
    for step in range(size // packing.STEP):
        place = (start // packing.STEP + step) * per_step
        found = [
            vector.extract(vectors[(place + part) // per_vector], [], [(place + part) % per_vector])
            for part in range(per_step)
        ]
        for register in range(4):
            half, part = register % 2, register // 2
            if bits == 4:
                flip = "0x43004300, 0xea" if zero is not None else "0x43084308, 0x6a"
                shift = f"shr.u32 t, $1, {4 * register};" if register else "mov.b32 t, $1;"
                text = f"{{ .reg .b32 t; {shift} lop3.b32 t, t, 0x000F000F, {flip}; sub.bf16x2 $0, t, $2; }}"
                made = asm(text, found[0], biases[half])
            else:
                pick = "0x4342" if register % 2 else "0x4140"
                text = (
                    f"{{ .reg .b32 s<3>; prmt.b32 s0, $1, 0x43, {pick}; and.b32 s1, s0, 0xff7fff7f; "
                    "and.b32 s2, s0, 0xff80ff80; sub.bf16x2 $0, s1, s2; }"
                )
                made = asm(text, found[part])
            out[0, 2 * step + part, 0, 0, half, 0, 0, 0, 0] = mgpu.utils.bitcast(made, bf16x2)
    return mgpu.FragmentedArray(_registers=out, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


def _store(shape: Shape, refs: _Refs, wg: jax.Array, unit: _Unit, total: jax.Array, output: jax.Array) -> None:
    staged = refs.out_smem.at[wg]
    size = min(CHUNK, shape.blocks.columns)
    for column in range(0, shape.blocks.columns, size):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was there has left shared memory
        part = total[:, column : column + size]
        if shape.interpret:
            staged[...] = part.T.astype(shape.dtype)
        else:
            staged.T[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED).astype(shape.dtype)
        plgpu.commit_smem()
        rows = pl.ds(unit.row * shape.blocks.columns + column, size)
        plgpu.copy_smem_to_gmem(staged, refs.out.at[unit.split, rows, pl.ds(output, ROWS)])
