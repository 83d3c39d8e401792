"""A chain of small-batch matrix products on Hopper as one persistent kernel that never stops reading weights.

In: activations [M, K], weights [out, in], residual and norm weights of the stages, already checked by api.py. Out: the
arrays the stages write. One program a multiprocessor. A stage multiplies x[M, K] by W[N, K] transposed: tiles of 128
rows of W are the left operand of the tensor cores, x the right one. The blocks (tile, depth) of a stage, in this order,
are cut into as many equal runs as there are programs; a run ends and begins inside tiles, whose pieces are added in
order of depth by the program that has the first one. Nothing of this depends on M, so a row's bits do not either.

One warp fetches weights, as far ahead as shared memory allows and across the ends of stages: weights depend on nothing.
Another fetches activations, once the stage that makes them is done everywhere. One warpgroup computes.
An RMS norm is split: the stage that makes x also writes x * weight and the sums of squares of its tiles; the stage that
reads it multiplies its products by the rows' scales.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning

ROWS = 128  # of a weight tile; gated stages: 64 of gate and the 64 of up that belong to them
HALF = 64
CHUNK = 32  # rows of x whose sums are finished at a time
WGMMA = plgpu.Layout.WGMMA


@dataclass(frozen=True)
class Stage:
    """One product: x[M, depth] @ W.T with outs columns; what its inputs are and what is done to its sums."""

    source: int  # 0.. = an external input; -1 - s = the array stage s hands on
    depth: int
    outs: int
    gated: bool = False  # W has 2 * outs rows, gate then up
    scaled_by: int | None = None  # the stage whose sums of squares scale the rows
    residual: int | None = None  # external input (>= 0) or -1 - s: stage s's sum
    normed: int | None = None  # row of its norm weights: also write (sum * norm weight), handed on, and sums of squares
    bias: bool = False
    wide: bool = False  # f32 out

    @property
    def width(self) -> int:
        """Columns a tile gives."""
        return HALF if self.gated else ROWS

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.outs, self.width)


@dataclass(frozen=True)
class Blocks:
    """`depth` and `programs` decide bits, the others only speed."""

    depth: int = 64
    programs: int = 132
    slots: int = 12  # weight blocks in flight
    x_slots: int = 12  # activation blocks in flight: they queue behind the weights, so as many


@dataclass(frozen=True)
class Plan:
    """How a chain is cut up: what every warp of every program works out for itself."""

    M: int
    stages: tuple[Stage, ...]
    blocks: Blocks
    eps: float
    interpret: bool
    pdl: bool

    def steps(self, stage: Stage) -> int:
        """Blocks of a tile."""
        return stage.depth // self.blocks.depth

    def total(self, stage: Stage) -> int:
        return stage.tiles * self.steps(stage)

    def first(self, stage: Stage, program: jax.Array) -> jax.Array:
        return lax.div(program * self.total(stage), jnp.int32(self.blocks.programs))

    def final(self, stage: Stage, tile: Any) -> Any:
        """The program that has a tile's last block."""
        return ((tile + 1) * (self.steps(stage) * self.blocks.programs) - 1) // self.total(stage)

    def pieces(self, stage: Stage) -> int:
        """The most programs that share a tile."""
        P, steps, total = self.blocks.programs, self.steps(stage), self.total(stage)
        begins = [((tile * steps + 1) * P - 1) // total for tile in range(stage.tiles)]
        return max(self.final(stage, tile) - begin + 1 for tile, begin in enumerate(begins))


def padded(M: int) -> int:
    """Rows of x the tensor cores see; the copy engine fills with zeros and drops what is not there."""
    if M > 128:
        raise NotImplementedError(f"at most 128 rows, got {M}")
    return max(8, 1 << (M - 1).bit_length())


def blocks_for(M: int) -> Blocks:
    """As much of shared memory as there is for blocks in flight, or what was measured."""
    rows = padded(M)
    slots = {8: 12, 16: 11, 32: 10, 64: 8, 128: 5}[rows]
    return tuning.choose("streamed_sm90", f"rows {rows}", Blocks(slots=slots, x_slots=slots))


def refuse(M: int, stages: tuple[Stage, ...], blocks: Blocks) -> None:
    """NotImplementedError for what the kernel does not do."""
    padded(M)
    for number, stage in enumerate(stages):
        if stage.source != -number:
            raise NotImplementedError("a stage reads what the stage before it hands on: pieces of tiles share places")
        if stage.depth % blocks.depth:
            raise NotImplementedError(f"depth {stage.depth} is no multiple of {blocks.depth}")
        if stage.outs % stage.width:
            raise NotImplementedError(f"{stage.outs} columns are no multiple of {stage.width}")
        if stage.tiles * (stage.depth // blocks.depth) < blocks.programs:
            raise NotImplementedError(f"stage {number} has fewer blocks than the {blocks.programs} programs")


def _async_proxy_fence() -> None:
    """Orders ordinary accesses of device memory with those of the copy engine."""

    @plgpu.inline_mgpu()
    def fence(_: Any) -> None:
        from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
        from jax._src.lib.mlir.dialects import llvm

        llvm.inline_asm(ir.Type.parse("!llvm.void"), [], "fence.proxy.async.global;", "", has_side_effects=True)

    run: Any = fence  # its one argument is the compiler's
    run()


def chain(
    inputs: Sequence[jax.Array],  # external activations, [M, *]
    weights: Sequence[jax.Array],  # a stage's [out, in]
    norms: Sequence[jax.Array | None],  # a normed stage's weights [n, outs]; whole, for the sake of CUDA graphs
    biases: Sequence[jax.Array | None],
    stages: tuple[Stage, ...],
    *,
    eps: float = 1e-5,
    blocks: Blocks = Blocks(),
    interpret: Any = None,
    pdl: bool = False,
) -> list[tuple[jax.Array, ...]]:
    """For each stage, the arrays it writes: (sum,) or (sum, handed on, sums of squares).

    `pdl` lets this launch's weights come in while the launch before it ends; a stream of such launches is what gains.
    """
    M = inputs[0].shape[0]
    refuse(M, stages, blocks)
    plan = Plan(padded(M), stages, blocks, eps, interpret is not None, pdl and interpret is None)
    outs: list[Any] = []
    places: list[tuple[int, ...]] = []
    for stage in stages:
        mine = [jax.ShapeDtypeStruct((M, stage.outs), jnp.float32 if stage.wide else jnp.bfloat16)]
        if stage.normed is not None:
            mine.append(jax.ShapeDtypeStruct((M, stage.outs), jnp.bfloat16))
            mine.append(jax.ShapeDtypeStruct((pl.cdiv(2 * stage.tiles, HALF) * HALF, plan.M), jnp.float32))
        places.append(tuple(range(len(outs), len(outs) + len(mine))))
        outs += mine
    outs.append(jax.ShapeDtypeStruct((blocks.programs, ROWS, plan.M), jnp.float32))  # pieces of shared tiles
    extras = [each for each in (*norms, *biases) if each is not None]
    n_in, n_w = len(inputs), len(weights)

    def kernel(*refs: Any) -> None:
        ins, ws = refs[:n_in], refs[n_in : n_in + n_w]
        rest = list(refs[n_in + n_w : n_in + n_w + len(extras)])
        norm_refs = [None if each is None else rest.pop(0) for each in norms]
        bias_refs = [None if each is None else rest.pop(0) for each in biases]
        out_refs = refs[n_in + n_w + len(extras) :]
        done = shared = None
        if not plan.interpret:  # get_global: the same for every program; scratch semaphores are each program's own
            done = pl.get_global(plgpu.SemaphoreType.REGULAR((len(stages),)))
            shared = pl.get_global(plgpu.SemaphoreType.REGULAR((sum(stage.tiles for stage in stages),)))

        def body(scratch: tuple[Any, ...], barriers: tuple[Any, ...]) -> None:
            handed = [out_refs[place[1 if len(place) > 1 else 0]] for place in places]
            sums = [out_refs[place[0]] for place in places]
            squares = [out_refs[place[2]] if len(place) > 1 else None for place in places]
            r = _Refs(
                sources=[ins[s.source] if s.source >= 0 else handed[-1 - s.source] for s in stages],
                residuals=[
                    None if s.residual is None else ins[s.residual] if s.residual >= 0 else sums[-1 - s.residual]
                    for s in stages
                ],
                weights=ws,
                norms=norm_refs,
                biases=bias_refs,
                sums=sums,
                handed=handed,
                squares=squares,
                pieces=out_refs[-1],
                done=barriers[5] if plan.interpret else done,
                shared=shared,
                w_smem=scratch[0],
                x_smem=scratch[1],
                y_smem=scratch[2],
                z_smem=scratch[3],
                w_full=barriers[0],
                w_free=barriers[1],
                x_full=barriers[2],
                x_free=barriers[3],
                y_full=barriers[4],
            )
            wg = lax.axis_index("wg")
            pl.when(wg == 1)(lambda: _memory(plan, r))
            pl.when(wg == 0)(lambda: _compute(plan, r))

        pl.run_scoped(body, _scratch(plan), _barriers(plan), collective_axes="wg")

    results = plgpu.kernel(
        kernel,
        out_type=outs,
        grid=(blocks.programs,),
        grid_names=("program",),
        num_threads=2,
        thread_name="wg",
        kernel_name="decode_chain",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*inputs, *weights, *extras)
    return [tuple(results[i] for i in place) for place in places]


@dataclass(frozen=True)
class _Refs:
    sources: Any
    residuals: Any
    weights: Any
    norms: Any
    biases: Any
    sums: Any
    handed: Any
    squares: Any
    pieces: Any
    done: Any
    shared: Any
    w_smem: Any
    x_smem: Any
    y_smem: Any
    z_smem: Any
    w_full: Any
    w_free: Any
    x_full: Any
    x_free: Any
    y_full: Any


def _scratch(plan: Plan) -> tuple[Any, ...]:
    tiling: Any = plgpu.TilingTransform
    swizzle: Any = plgpu.SwizzleTransform
    transforms = (tiling((8, 64)), swizzle(128))

    def smem(*dims: int) -> Any:
        return plgpu.SMEM(dims, jnp.bfloat16, transforms=transforms)

    b = plan.blocks
    return (
        smem(b.slots, ROWS, b.depth),
        smem(b.x_slots, plan.M, b.depth),
        smem(2, plan.M, HALF),
        smem(2, plan.M, HALF),
    )


def _barriers(plan: Plan) -> tuple[Any, ...]:
    def barrier(count: int, arrivals: int = 1) -> Any:
        return plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)

    b = plan.blocks
    # The interpreter has no semaphores: it runs one program, whose threads these keep apart.
    done = [barrier(1, stage.tiles) for stage in plan.stages] if plan.interpret else None
    return barrier(b.slots, 2), barrier(b.slots), barrier(b.x_slots), barrier(b.x_slots), barrier(1, 2), done


# The memory warpgroup.


def _memory(plan: Plan, r: _Refs) -> None:
    @plgpu.warp_map
    def _(warp: jax.Array) -> None:
        pl.when(warp == 0)(lambda: _fetch_weights(plan, r))
        pl.when(warp == 1)(lambda: _fetch_activations(plan, r))


def _fetch_weights(plan: Plan, r: _Refs) -> None:
    program = lax.axis_index("program")
    slots, depth = plan.blocks.slots, plan.blocks.depth
    before: Any = jnp.int32(0)
    for stage, w in zip(plan.stages, r.weights, strict=True):
        first, last = plan.first(stage, program), plan.first(stage, program + 1)
        steps = jnp.int32(plan.steps(stage))

        def block(
            i: jax.Array, stage: Stage = stage, w: Any = w, offset: Any = before - first, steps: Any = steps
        ) -> None:
            done = offset + i
            slot = lax.rem(done, jnp.int32(slots))
            pl.when(done >= slots)(lambda: plgpu.barrier_wait(r.w_free.at[slot]))
            tile, columns = lax.div(i, steps), pl.ds(lax.rem(i, steps) * depth, depth)
            for half in range(2):
                row = tile * HALF + half * stage.outs if stage.gated else tile * ROWS + half * HALF
                target = r.w_smem.at[slot, pl.ds(half * HALF, HALF)]
                plgpu.copy_gmem_to_smem(w.at[pl.ds(row, HALF), columns], target, r.w_full.at[slot])

        pl.loop(first, last)(block)
        before = before + (last - first)
    if plan.pdl:
        plgpu.griddepcontrol_launch_dependents()
    _drain(before, r.w_free, slots)


def _fetch_activations(plan: Plan, r: _Refs) -> None:
    program = lax.axis_index("program")
    slots, depth = plan.blocks.x_slots, plan.blocks.depth
    if plan.pdl:
        plgpu.griddepcontrol_wait()
    before: Any = jnp.int32(0)
    for stage, x in zip(plan.stages, r.sources, strict=True):
        first, last = plan.first(stage, program), plan.first(stage, program + 1)
        steps = jnp.int32(plan.steps(stage))
        if stage.source < 0:
            maker = -1 - stage.source
            if plan.interpret:
                plgpu.barrier_wait(r.done[maker])
            else:
                _await(plan, r, maker)
            if not plan.interpret:
                _async_proxy_fence()

        def block(i: jax.Array, x: Any = x, offset: Any = before - first, steps: Any = steps) -> None:
            done = offset + i
            slot = lax.rem(done, jnp.int32(slots))
            pl.when(done >= slots)(lambda: plgpu.barrier_wait(r.x_free.at[slot]))
            columns = pl.ds(lax.rem(i, steps) * depth, depth)
            plgpu.copy_gmem_to_smem(x.at[pl.ds(0, plan.M), columns], r.x_smem.at[slot], r.x_full.at[slot])

        pl.loop(first, last)(block)
        before = before + (last - first)
    _drain(before, r.x_free, slots)


def _drain(count: jax.Array, free: Any, slots: int) -> None:
    """Every arrival is waited for, if only for the interpreter's sake."""

    @pl.loop(jnp.maximum(count - slots, 0), count)
    def _(done: jax.Array) -> None:
        plgpu.barrier_wait(free.at[lax.rem(done, jnp.int32(slots))])


# The computing warpgroup.


@dataclass(frozen=True)
class _Run:
    """One program's share of a stage."""

    number: int
    stage: Stage
    first: jax.Array
    last: jax.Array
    before: jax.Array  # blocks of earlier stages, less `first`
    tiles_before: int
    scale: jax.Array | None  # f32[M]


def _compute(plan: Plan, r: _Refs) -> None:
    if plan.pdl:
        plgpu.griddepcontrol_wait()
    program = lax.axis_index("program")
    before: Any = jnp.int32(0)
    tiles_before = 0
    for number, stage in enumerate(plan.stages):
        first, last = plan.first(stage, program), plan.first(stage, program + 1)
        steps = jnp.int32(plan.steps(stage))
        scale = None if stage.scaled_by is None else _scale(plan, r, stage)
        run = _Run(number, stage, first, last, before - first, tiles_before, scale)
        pl.loop(lax.div(first, steps), lax.div(last - 1, steps) + 1)(functools.partial(_segment, plan, r, run, program))
        before = before + (last - first)
        tiles_before += stage.tiles


def _segment(plan: Plan, r: _Refs, run: _Run, program: jax.Array, tile: jax.Array) -> None:
    """This program's part of a tile: the whole, the first piece (which it completes) or a later one (handed over)."""
    steps = plan.steps(run.stage)
    begin = jnp.maximum(tile * steps, run.first)
    end = jnp.minimum((tile + 1) * steps, run.last)
    flag = None if plan.interpret else r.shared.at[run.tiles_before + tile]
    mine = begin == tile * steps
    if run.stage.residual is not None:
        pl.when(mine)(lambda: _fetch_residual(plan, r, run, tile))
    acc = _accumulate(plan, r, run.before + begin, end - begin)
    if not plan.interpret:

        @pl.when(jnp.logical_not(mine))
        def _() -> None:
            r.pieces[program] = acc
            plgpu.semaphore_signal(flag, memory_scope="gpu")

    pl.when(mine)(lambda: _finish(plan, r, run, tile, program, acc, flag))


def _fetch_residual(plan: Plan, r: _Refs, run: _Run, tile: jax.Array) -> None:
    source = r.residuals[run.number]
    assert run.stage.residual is not None
    if run.stage.residual < 0:
        _await(plan, r, -1 - run.stage.residual)
        if not plan.interpret:
            _async_proxy_fence()
    for half in range(2):
        part = pl.ds(tile * ROWS + half * HALF, HALF)
        plgpu.copy_gmem_to_smem(source.at[pl.ds(0, plan.M), part], r.y_smem.at[half], r.y_full.at[0])


def _accumulate(plan: Plan, r: _Refs, done: jax.Array, count: jax.Array) -> jax.Array:
    """The product of `count` blocks that come `done` blocks after this program's first one: f32[128, M]."""
    b = plan.blocks

    def body(acc: Any) -> jax.Array:
        def step(i: jax.Array) -> None:
            n = done + i
            w, x = lax.rem(n, jnp.int32(b.slots)), lax.rem(n, jnp.int32(b.x_slots))
            plgpu.barrier_wait(r.w_full.at[w])
            plgpu.barrier_wait(r.x_full.at[x])
            plgpu.wgmma(acc, r.w_smem.at[w], r.x_smem.at[x].transpose((1, 0)))
            plgpu.wgmma_wait(1)
            pl.when(i > 0)(lambda: free(n - 1))

        def free(n: jax.Array) -> None:
            plgpu.barrier_arrive(r.w_free.at[lax.rem(n, jnp.int32(b.slots))])
            plgpu.barrier_arrive(r.x_free.at[lax.rem(n, jnp.int32(b.x_slots))])

        pl.loop(0, count)(step)
        result = acc[...]
        free(done + count - 1)
        return result

    return pl.run_scoped(body, plgpu.WGMMAAccumulatorRef((ROWS, plan.M), jnp.float32))


def _finish(plan: Plan, r: _Refs, run: _Run, tile: jax.Array, program: jax.Array, acc: jax.Array, flag: Any) -> None:
    """Add the other pieces of a tile, do what follows, hand the result on."""
    stage = run.stage
    others = (
        lax.div((tile + 1) * (plan.steps(stage) * plan.blocks.programs) - 1, jnp.int32(plan.total(stage))) - program
    )
    if plan.pieces(stage) > 1:
        plgpu.semaphore_wait(flag, others, decrement=False, memory_scope="gpu")
    if stage.residual is not None:
        plgpu.barrier_wait(r.y_full.at[0])
    size = min(plan.M, CHUNK)
    for row in range(0, plan.M, size):
        _finish_rows(plan, r, run, tile, program, others, acc[:, row : row + size], pl.ds(row, size))
    plgpu.commit_smem()
    for half in range(1 if stage.gated else 2):
        here = pl.ds(tile * stage.width + half * HALF, HALF)
        plgpu.copy_smem_to_gmem(r.y_smem.at[half], r.sums[run.number].at[pl.ds(0, plan.M), here])
        if stage.normed is not None:
            plgpu.copy_smem_to_gmem(r.z_smem.at[half], r.handed[run.number].at[pl.ds(0, plan.M), here])
    plgpu.wait_smem_to_gmem(0)
    if not plan.interpret:
        _async_proxy_fence()
    if plan.interpret:
        plgpu.barrier_arrive(r.done[run.number])
    else:
        plgpu.semaphore_signal(r.done.at[run.number], memory_scope="gpu")


def _finish_rows(
    plan: Plan,
    r: _Refs,
    run: _Run,
    tile: jax.Array,
    program: jax.Array,
    others: jax.Array,
    acc: jax.Array,  # f32[128, rows]
    rows: Any,
) -> None:
    """What _finish does, up to shared memory, for some of the rows of x."""
    stage = run.stage
    for other in range(1, plan.pieces(stage)):
        place = jnp.minimum(program + other, plan.blocks.programs - 1)
        piece = plgpu.load(r.pieces.at[place, :, rows], layout=WGMMA, optimized=False)
        acc = acc + lax.select(lax.broadcast(other <= others, piece.shape), piece, jnp.zeros_like(piece))
    if run.scale is not None:
        scale = run.scale[rows.start : rows.start + rows.size]
        acc = acc * lax.broadcast_in_dim(scale, acc.shape, [1])
    for half in range(1 if stage.gated else 2):
        part = acc[half * HALF : (half + 1) * HALF]
        here = pl.ds(tile * stage.width + half * HALF, HALF)
        if stage.gated:
            part = part / (1.0 + jnp.exp(-part)) * acc[HALF:]
        if stage.bias:
            part = part + _column(r.biases[run.number].at[here], part.shape)
        turned = r.y_smem.at[half, rows].transpose((1, 0))
        if stage.residual is not None:
            part = part + plgpu.load(turned, layout=WGMMA, optimized=False).astype(jnp.float32)
        narrow = part.astype(jnp.bfloat16)
        turned[...] = narrow
        if stage.normed is not None:
            wide = narrow.astype(jnp.float32)
            weighted = (wide * _column(r.norms[run.number].at[stage.normed, here], wide.shape)).astype(jnp.bfloat16)
            r.z_smem.at[half, rows].transpose((1, 0))[...] = weighted
            r.squares[run.number][tile * 2 + half, rows] = (wide * wide).sum(axis=0)


def _column(ref: Any, shape: tuple[int, ...]) -> jax.Array:
    """A vector along the rows of W, for every row of x."""
    values = plgpu.load(ref, layout=WGMMA.reduce(1), optimized=False).astype(jnp.float32)
    return lax.broadcast_in_dim(values, shape, [0])


def _await(plan: Plan, r: _Refs, number: int) -> None:
    if plan.interpret:  # the same thread made it
        return
    plgpu.semaphore_wait(r.done.at[number], plan.stages[number].tiles, decrement=False, memory_scope="gpu")


def _scale(plan: Plan, r: _Refs, stage: Stage) -> jax.Array:
    """1 / rms of each row, from the sums of squares of the tiles of the stage that made it."""
    assert stage.scaled_by is not None
    _await(plan, r, stage.scaled_by)
    maker, total = plan.stages[stage.scaled_by], None
    squares = r.squares[stage.scaled_by]
    for first in range(0, 2 * maker.tiles, HALF):
        part = plgpu.load(squares.at[pl.ds(first, HALF)], layout=WGMMA, optimized=False)
        if 2 * maker.tiles - first < HALF:  # the rest is never written
            row = plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=WGMMA)
            part = jnp.where(row < 2 * maker.tiles - first, part, jnp.zeros_like(part))
        part = part.sum(axis=0)
        total = part if total is None else total + part
    assert total is not None
    return lax.rsqrt(total * (1.0 / maker.outs) + plan.eps)
