"""Packed weights back to bf16 [N, K] at the speed of memory: the first half of a product with many rows.

In: packed words and, for int4, scales and zeros. Out: q in bf16 (int8; exact, to be scaled after the product) or
scale * (q - zero) rounded to bf16 (int4). With many rows of x a product is bound by the tensor cores, and XLA's own
bf16 product is the best there is; this pass costs what reading the packed weight and writing the wide one costs.
One warpgroup fetches, four widen 64 outputs by 128 inputs at a time. It does not know what is multiplied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lowered_once import call_shorter
from pallas_kernels.quant_matmul import packing
from pallas_kernels.quant_matmul.mosaic_sm90 import BLOCK, ROWS, TILES, Blocks, Kind, Shape, by_output, refuse, widen

STAGES = {4: 4, 8: 2}  # blocks coming in, by bits
STAGED = 2  # tiles of a warpgroup going out
PROGRAMS = 132


def int8_matmul(
    x: jax.Array, words: jax.Array, scale: jax.Array, *, out_dtype: Any = jnp.float32, **options: Any
) -> jax.Array:
    refuse(x)
    return (_project(x, widened(words, bits=8, **options)) * scale).astype(out_dtype)


def int4_matmul(
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    out_dtype: Any = jnp.float32,
    **options: Any,
) -> jax.Array:
    refuse(x)
    return _project(x, widened(words, scale, zero, bits=4, **options), out_dtype)


def _project(x: jax.Array, weight: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def widened(
    words: jax.Array,  # i32[N / 64, K / 64, rows, 128]
    scale: jax.Array | None = None,  # [K / group, N]
    zero: jax.Array | None = None,
    *,
    bits: int,
    programs: int = PROGRAMS,
    interpret: Any = None,
) -> jax.Array:
    """bf16[N, K]."""
    N, K = words.shape[0] * packing.TILE, words.shape[1] * packing.TILE
    warpgroups = next(count for count in (4, 2, 1) if N % (ROWS * count) == 0)
    group = None if scale is None else K // scale.shape[0]
    kind = Kind("int4" if bits == 4 else "int8", group=group, zeros=zero is not None)
    stages = STAGES[bits]
    blocks = Blocks(warpgroups=warpgroups, stages=stages, programs=programs)
    shape = Shape(ROWS, N, K, kind, 1, jnp.dtype(jnp.bfloat16), blocks, interpret is not None)
    given = [array for array in (words, scale, zero) if array is not None]
    call = _kernel(shape, tuple(array.dtype for array in given[1:]), interpret)
    if interpret is not None:
        return call(*given)
    return call_shorter(call, given, {}, [jax.ShapeDtypeStruct((N, K), jnp.bfloat16)])[0]


@functools.cache
def _kernel(shape: Shape, scale_dtypes: tuple[Any, ...], interpret: Any) -> Callable[..., jax.Array]:
    K, kind, warpgroups, stages = shape.K, shape.kind, shape.blocks.warpgroups, shape.blocks.stages
    total = shape.N // shape.outputs * (K // BLOCK)
    grid = min(shape.blocks.programs, total)

    def kernel(*arrays: Any) -> None:
        *inputs, out = arrays

        def body(smem: tuple[Any, ...], staged: Any, full: Any, free: Any) -> None:
            wg, program = lax.axis_index("wg"), lax.axis_index("program")
            steps = lax.div(jnp.int32(total - 1) - program, jnp.int32(grid)) + 1

            def place(step: jax.Array) -> tuple[jax.Array, jax.Array]:
                unit = program + step * grid
                return lax.div(unit, jnp.int32(K // BLOCK)), lax.rem(unit, jnp.int32(K // BLOCK))

            def fetch() -> None:
                @pl.loop(0, steps)
                def _(step: jax.Array) -> None:
                    slot = lax.rem(step, jnp.int32(stages))
                    pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    output, block = place(step)
                    tiles = pl.ds(output * warpgroups, warpgroups), pl.ds(block * TILES, TILES)
                    group = block * kind.groups
                    groups = pl.ds(group, kind.groups), pl.ds(output * shape.outputs, shape.outputs)
                    for number, (source, target) in enumerate(zip(inputs, smem, strict=True)):
                        where = groups if number else tiles
                        plgpu.copy_gmem_to_smem(source.at[where], target.at[slot], full.at[slot])

                @pl.loop(jnp.maximum(steps - stages, 0), steps)  # every arrival is waited for
                def _(step: jax.Array) -> None:
                    plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(stages))])

            def compute() -> None:
                @pl.loop(0, steps)
                def _(step: jax.Array) -> None:
                    slot, mine = lax.rem(step, jnp.int32(stages)), staged.at[wg, lax.rem(step, jnp.int32(STAGED))]
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wait_smem_to_gmem(STAGED - 1, wait_read_only=True)
                    _tile(shape, smem, slot, wg, mine)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(free.at[slot])
                    output, block = place(step)
                    rows = pl.ds(output * shape.outputs + wg * ROWS, ROWS)
                    plgpu.copy_smem_to_gmem(mine, out.at[rows, pl.ds(block * BLOCK, BLOCK)])

                plgpu.wait_smem_to_gmem(0)

            pl.when(wg == warpgroups)(fetch)
            pl.when(wg < warpgroups)(compute)

        tiling: Any = plgpu.TilingTransform  # typed as abstract in 0.11
        swizzle: Any = plgpu.SwizzleTransform
        rows, wide = packing.rows_of(kind.bits), min(64, BLOCK // kind.groups)
        per_group = [plgpu.SMEM((stages, kind.groups, shape.outputs), dtype) for dtype in scale_dtypes]
        pl.run_scoped(
            body,
            (plgpu.SMEM((stages, warpgroups, TILES, rows, packing.LANES), jnp.int32), *per_group),
            plgpu.SMEM(
                (warpgroups, STAGED, ROWS, BLOCK), jnp.bfloat16, transforms=(tiling((8, wide)), swizzle(2 * wide))
            ),
            plgpu.Barrier(num_barriers=stages, num_arrivals=1 + len(scale_dtypes)),
            plgpu.Barrier(num_barriers=stages, num_arrivals=warpgroups),
            collective_axes="wg",
        )

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((shape.N, K), jnp.bfloat16),
        grid=(grid,),
        grid_names=("program",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        kernel_name=f"quant_widen_{kind.name}",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def _tile(shape: Shape, smem: tuple[Any, ...], slot: jax.Array, wg: jax.Array, out: Any) -> None:
    """One warpgroup's 64 x 128 into shared memory, group by group."""
    kind = shape.kind
    size, mine = BLOCK // kind.groups, pl.ds(wg * ROWS, ROWS)
    layout = plgpu.Layout.WG_STRIDED((TILES, packing.rows_of(kind.bits), packing.LANES), vec_size=4)
    words = plgpu.load(smem[0].at[slot, wg], layout=layout)

    def by_group(array: Any, group: int) -> jax.Array:
        return plgpu.load(array.at[slot, group, mine], layout=by_output(), optimized=False).astype(jnp.float32)

    for group in range(kind.groups):
        zero = by_group(smem[2], group) if kind.zeros else None
        wide = widen(shape, words, zero, group * size, size)
        if kind.group is not None:
            scale = lax.broadcast_in_dim(by_group(smem[1], group), wide.shape, [0])
            wide = (wide.astype(jnp.float32) * scale).astype(jnp.bfloat16)
        out.at[:, pl.ds(group * size, size)][...] = wide
