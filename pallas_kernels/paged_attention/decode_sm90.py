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

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.paged_attention import decode_warps
from pallas_kernels.paged_attention.decode_warps import LOW_PART, REDUCTION_BYTES, TEAMS, Refs, Shape
from pallas_kernels.paged_attention.units import BLOCK, SPLIT, Rows, plan

MOST_LANES = 16
MOST_STAGES = 6  # a team
SMEM_BYTES = 220 * 1024  # of 227 KB; reductions and barriers take the rest
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Blocks:
    """Numbers that change only speed."""

    programs: int = 132  # one a multiprocessor
    stages: int | None = None  # blocks of keys or values in flight; None = as many as shared memory holds
    early: bool = False  # start before the kernel in front has ended, and wait for it once inside


def paged_attention_decode(
    q: jax.Array,  # [B, N, H]
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,
    page_table: jax.Array,  # i32[B, W]
    kv_lens: jax.Array,  # i32[B]
    **options: Any,
) -> Any:
    """One query a row, at position kv_lens - 1. Rows of length 0 come out 0. Options as verify's."""
    found = verify(q[:, None], k_pages, v_pages, page_table, kv_lens, **options)
    return jax.tree.map(lambda array: array[:, 0], found)


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
    sinks: jax.Array | None = None,  # f32[N]
    k_scale: jax.Array | None = None,  # f32[K], with e4m3 pages
    v_scale: jax.Array | None = None,
    return_lse: bool = False,
    new: tuple[jax.Array, jax.Array] | None = None,  # [B, K, H], of the last position
    counters: Any = None,  # i32[programs] of zeros, as a ref: saves making them; zeros afterwards
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> Any:
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
    shape = Shape(
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
        None if sinks is None else _of_tiles(sinks, shape),
        k_pages,
        v_pages,
        page_table,
        kv_lens,
        plan(kv_lens, rows),
        counters,
    )
    out, lse = _call(shape, arrays, return_lse, interpret)
    return (_untiled(out, q.shape, shape), _of_queries(lse, shape)) if return_lse else _untiled(out, q.shape, shape)


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
    if narrow and H == 256:
        raise NotImplementedError("e4m3 pages of head dim 256 need more registers than two compute warpgroups have")
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


def _tiled(q: jax.Array, shape: Shape) -> jax.Array:
    """[B, queries, N, H] -> [B, K / heads_a_tile, lanes, H]: a bitcast if the heads of a tile fill it."""
    rows = shape.rows
    if shape.filled:
        return q.reshape(rows.B, -1, shape.lanes, shape.H)
    apart = q.reshape(rows.B, rows.queries, rows.K, shape.group, shape.H).swapaxes(1, 2)
    apart = apart.reshape(rows.B, rows.K, shape.columns, shape.H)
    return jnp.pad(apart, ((0, 0), (0, 0), (0, shape.lanes - shape.columns), (0, 0)))


def _untiled(out: jax.Array, dims: tuple[int, ...], shape: Shape) -> jax.Array:
    rows = shape.rows
    if shape.filled:
        return out.reshape(dims)
    apart = out[:, :, : shape.columns].reshape(rows.B, rows.K, rows.queries, shape.group, shape.H)
    return apart.swapaxes(1, 2).reshape(dims)


def _parts(tiles: jax.Array, k_scale: jax.Array, shape: Shape) -> tuple[jax.Array, jax.Array]:
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


def _of_tiles(sinks: jax.Array, shape: Shape) -> jax.Array:
    """f32[N] -> [K, lanes]: of the columns of each kv head's tile."""
    if shape.filled:
        return jnp.repeat(sinks.reshape(-1, shape.lanes), shape.heads_a_tile, axis=0)
    own = jnp.tile(sinks.reshape(shape.rows.K, shape.group), (1, shape.rows.queries))
    return jnp.pad(own, ((0, 0), (0, shape.lanes - shape.columns)))


def _of_queries(lse: jax.Array, shape: Shape) -> jax.Array:
    """f32[B, K, lanes], of which a kv head's own columns count -> [B, queries, N]."""
    rows, heads = shape.rows, shape.heads_a_tile
    if shape.filled:
        each = jnp.arange(heads, dtype=jnp.int32)
        own = lse.reshape(rows.B, rows.K // heads, heads, heads, shape.group)[:, :, each, each]
        return own.reshape(rows.B, 1, -1)
    own = lse[:, :, : shape.columns].reshape(rows.B, rows.K, rows.queries, shape.group)
    return own.swapaxes(1, 2).reshape(rows.B, rows.queries, -1)


def _call(shape: Shape, arrays: tuple[Any, ...], return_lse: bool, interpret: Any) -> Any:
    programs, f32 = shape.rows.programs, jnp.float32
    tiles = arrays[0].shape[:2]
    results = [
        jax.ShapeDtypeStruct((*tiles, shape.lanes, shape.H), shape.dtype),
        jax.ShapeDtypeStruct((programs, 2, shape.max_splits, shape.H, shape.lanes), f32),
        jax.ShapeDtypeStruct((programs, 2, shape.max_splits, 2, shape.lanes), f32),
    ]
    if return_lse:
        results.append(jax.ShapeDtypeStruct((shape.rows.B, shape.rows.K, shape.lanes), f32))

    def kernel(*refs: Any) -> None:
        def body(scratch: tuple[Any, ...], barriers: tuple[Any, ...]) -> None:
            everything: tuple[Any, ...] = (*refs, *[None] * (not return_lse), *scratch, *barriers)
            found = Refs(*everything)
            wg = lax.axis_index("wg")
            if shape.early and not shape.interpret:
                plgpu.griddepcontrol_wait()

            def teams_from(team: int) -> None:
                """Reductions across warps use the memory after what is allocated: nesting keeps the teams' apart.

                Allocating waits for all warpgroups, so that every team allocates before any works.
                """

                def inside(_: Any) -> None:
                    if team + 1 < TEAMS:
                        teams_from(team + 1)
                    pl.when(wg == team)(lambda: decode_warps.compute_warpgroup(shape, found, team))

                pl.run_scoped(inside, plgpu.SMEM((REDUCTION_BYTES,), jnp.int8), collective_axes="wg")

            teams_from(0)
            pl.when(wg == TEAMS)(lambda: decode_warps.memory_warpgroup(shape, found))

        pl.run_scoped(body, decode_warps.scratch(shape), decode_warps.barriers(shape), collective_axes="wg")

    found = plgpu.kernel(
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
    )(*arrays)
    return found[0], found[-1]
