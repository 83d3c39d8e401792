"""Ragged paged attention on Hopper in Pallas Mosaic GPU: TMA, WGMMA, two compute warpgroups and one for memory.

In: flat ragged queries, one layer's pages, page tables, lengths, already checked by api.py; or keys and values packed
like the queries (flash_attention). Out: attention outputs.
Queries are cut on the device into tiles of 128 of one row and one head; the tile list, longest first, is a small XLA
computation shared by the layers of a step. A fixed number of programs walks (tile, head) pairs in snake order; each
keeps its memory warpgroup running ahead across tiles, following the page table with one TMA copy a page.
Compute warpgroups hold 64 queries each and visit key blocks from the last to the first. Inside one, the softmax of a
visit runs beside the value product of the visit before; between the two, `turn` barriers let one use the tensor cores
while the other does its softmax.
The copy engine moves tiles whose first token is a multiple of 8 (Mosaic's tiling asks for that) and that end inside
the array, of whose length the kernel knows nothing. Other tiles' queries come through registers, and packed keys are
moved to such places first, unless they lie there. Tiles that start elsewhere or end early store query by query: what
follows is somebody else's.
e4m3 pages pass through a fourth warpgroup, which makes them as wide as the queries in shared memory.
Rows of one query go to the decode kernel, so that their bits are those of a decode step; unless `uniform` asks that a
query's bits are those it has among others of its row.
A row's bits do not depend on the batch: blocks lie at fixed key positions, and those a query cannot see change
nothing. It does not know how pages are written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.dispatch import dispatch
from pallas_kernels.lowered_once import call_shorter
from pallas_kernels.paged_attention import ragged_warps, triton
from pallas_kernels.paged_attention.ragged_warps import COMPUTE, LOWEST, MEMORY, ROWS, WIDEN, Blocks, Refs, Shape
from pallas_kernels.paged_attention.tiles import ALIGN, TILE, Tile, most_tiles, tile_list

LONGEST = 65536  # tokens the kernel is lowered for: what it is told of its arrays is where each tile's room ends


class Extras(NamedTuple):
    """Arrays that not every call has."""

    visible: jax.Array | None = None  # i32[T]: how many leading keys each query sees, in place of its position
    sinks: jax.Array | None = None  # f32[N]
    k_scale: jax.Array | None = None  # f32[K], with e4m3 pages
    v_scale: jax.Array | None = None


NO_EXTRAS = Extras()


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
    sinks: jax.Array | None = None,  # f32[N]
    k_scale: jax.Array | None = None,  # f32[K], with e4m3 pages
    v_scale: jax.Array | None = None,
    return_lse: bool = False,
    uniform: bool = False,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> Any:
    """Row r owns q[query_starts[r] : query_starts[r + 1]], the last queries of its kv_lens[r] keys."""
    blocks = blocks or chosen_blocks(q.shape[2], k_pages.shape[2])
    refuse(q, k_pages, scale, blocks, k_scale, v_scale)
    pages, options = (k_pages, v_pages, page_table), {"scale": scale, "window": window, "soft_cap": soft_cap}
    extras = Extras(None, sinks, k_scale, v_scale)
    found = ragged_attention(
        q,
        *pages,
        kv_lens,
        query_starts,
        **options,
        extras=extras,
        return_lse=return_lse,
        blocks=blocks,
        interpret=interpret,
        fewest=1 if uniform else 2,
    )
    if uniform:
        return found
    if interpret is not None:  # the interpreter's threads and other work of the CPU's small pool can starve each other
        found, q = lax.optimization_barrier((found, q))
    single = query_starts[1:] - query_starts[:-1] == 1
    lens = jnp.where(single, kv_lens, 0)
    first = jnp.where(single, query_starts[:-1], 0)  # no slice: XLA draws those around a call, out of the step's graph
    options |= {"sinks": sinks, "k_scale": k_scale, "v_scale": v_scale}
    if not return_lse:
        among = dispatch("paged_attention.among", platform="gpu" if interpret is None else "interpret")
        return among(q, found, first, *pages, lens, **options)
    options |= {"interpret": interpret is not None, "return_lse": True}
    decoded = triton.paged_attention_decode(q.at[first].get(mode="clip"), *pages, lens, **options)
    place = jnp.where(single, first, q.shape[0])
    return jax.tree.map(lambda all_, own: all_.at[place].set(own, mode="drop"), found, decoded)


def flash_attention(
    q: jax.Array,  # [T, N, H]
    k: jax.Array,  # [S, K, H]
    v: jax.Array,
    query_starts: jax.Array,  # i32[R + 1]
    key_starts: jax.Array,  # i32[R + 1]
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,  # f32[N]
    return_lse: bool = False,
    aligned: bool = False,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> Any:
    """The same over keys that lie packed, row after row; see flash_attention/api.py."""
    blocks = blocks or default_blocks(q.shape[2])
    refuse(q, k, scale, blocks)
    begin, lens = key_starts[:-1], key_starts[1:] - key_starts[:-1]
    if aligned:
        rest = ((0, -k.shape[0] % ALIGN), (0, 0), (0, 0))  # copies are of whole tiles
        k, v = (jnp.pad(each, rest) for each in (k, v))
    else:
        begin, place = _aligned(begin, lens, k.shape[0])
        k, v = (each.at[place].get(mode="clip") for each in (k, v))
    options = {"scale": scale, "window": window, "soft_cap": soft_cap, "extras": Extras(sinks=sinks)}
    options |= {"return_lse": return_lse, "blocks": blocks, "interpret": interpret}
    return ragged_attention(q, k, v, begin, lens, query_starts, **options)


def _aligned(begin: jax.Array, lens: jax.Array, S: int) -> tuple[jax.Array, jax.Array]:
    """Where rows begin when each starts at a multiple of ALIGN, and which key then lies at each place."""
    ends = jnp.cumsum((lens + ALIGN - 1) // ALIGN * ALIGN, dtype=jnp.int32)
    moved = ends - (lens + ALIGN - 1) // ALIGN * ALIGN
    places = jnp.arange(pl.cdiv(S, ALIGN) * ALIGN + ALIGN * lens.shape[0], dtype=jnp.int32)
    row = jnp.searchsorted(ends, places, side="right", method="compare_all")  # else a loop, out of the step's graph
    row = jnp.minimum(row, lens.shape[0] - 1)
    return moved, begin[row] + places - moved[row]


def chosen_blocks(H: int, page_size: int) -> Blocks:
    return tuning.choose("paged_attention/mosaic_sm90", tuning_key(H, page_size), default_blocks(H))


def tuning_key(H: int, page_size: int) -> str:
    return f"H{H} page {page_size}"


def default_blocks(H: int) -> Blocks:
    return Blocks() if H <= 128 else Blocks(block_keys=64)


def refuse(
    q: jax.Array,
    k_pages: jax.Array,
    scale: float,
    blocks: Blocks,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> None:
    """NotImplementedError for what this implementation does not do."""
    H = q.shape[2]
    narrow = k_pages.dtype == jnp.float8_e4m3fn
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"WGMMA takes bfloat16 or float16 queries here, got {q.dtype}")
    if k_pages.dtype != q.dtype and not narrow:
        raise NotImplementedError(f"pages must be {q.dtype} like the queries or float8_e4m3fn, got {k_pages.dtype}")
    if narrow != (k_scale is not None) or narrow != (v_scale is not None):
        raise NotImplementedError("k_scale and v_scale go together, with float8_e4m3fn pages")
    if H not in (64, 80, 96, 128, 256):
        raise NotImplementedError(f"head dim must be 64, 80, 96, 128 or 256, got {H}")
    if narrow and H in (80, 256):
        why = "is no whole number of swizzles of e4m3" if H == 80 else "needs more shared memory than there is"
        raise NotImplementedError(f"head dim {H} with e4m3 pages {why}")
    page_size = k_pages.shape[2] if k_pages.ndim == 4 else blocks.block_keys
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
    extras: Extras = NO_EXTRAS,
    return_lse: bool = False,
    interpret: Any = None,
    fewest: int = 1,
) -> Any:
    """As paged_attention, all in one kernel; rows of fewer than `fewest` queries are left unwritten.

    Without pages, k_pages and v_pages are [S, K, H] and page_table i32[R], where rows' keys begin, all multiples of 8.
    """
    packed = k_pages.ndim == 3
    # A copy engine's operand must start at 256 bytes, and XLA hands a slice of a larger array over in place: this makes
    # the table an array of its own, as any arithmetic does.
    page_table = jnp.clip(page_table, 0, k_pages.shape[0] - 1)
    given, N, H = q.shape
    T = max(ROWS, pl.cdiv(given, ALIGN) * ALIGN)  # tiles of ALIGN tokens; a tile's loads stay inside the array
    if given < T:
        q = jnp.pad(q, ((0, T - given), (0, 0), (0, 0)))
    visible = extras.visible
    if visible is not None:
        visible = jnp.maximum(jnp.pad(visible, (0, T - given + TILE)), 0)  # a tile of one query loads all the same
    shape = Shape(
        N=N,
        K=k_pages.shape[1],
        H=H,
        page_size=blocks.block_keys if packed else k_pages.shape[2],
        dtype=q.dtype,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        blocks=blocks,
        interpret=interpret is not None,
        narrow=extras.k_scale is not None,
        limited=visible is not None,
        packed=packed,
    )
    tiles, count = tile_list(T, kv_lens, query_starts, fewest, visible)
    arrays = q, k_pages, v_pages, page_table, tiles, count, *extras._replace(visible=visible)
    found = _call(shape, T, arrays, return_lse, interpret)
    if not return_lse:
        return found[0][:given]
    return found[0][:given], _of_tokens(found[1].reshape(-1, N, COMPUTE, ROWS), tiles, count, T)[:given]


def _call(shape: Shape, T: int, arrays: tuple[Any, ...], return_lse: bool, interpret: Any) -> Any:
    call = functools.partial(_kernel, shape, return_lse, interpret)
    if interpret is not None:
        return call(T)(*arrays)
    longest = max(LONGEST, 1 << (T - 1).bit_length())
    lengths = {0: longest, 4: most_tiles(arrays[3].shape[0], longest), 6: longest + TILE}  # by place among the arrays
    return call_shorter(call(longest), arrays, lengths, _results(shape, T, arrays[4].shape[0], return_lse))


def _results(shape: Shape, T: int, tiles: int, return_lse: bool) -> list[jax.ShapeDtypeStruct]:
    results = [jax.ShapeDtypeStruct((T, shape.N, shape.H), shape.dtype)]
    lse = jax.ShapeDtypeStruct((tiles * shape.N * COMPUTE, ROWS), jnp.float32)
    return [*results, lse] if return_lse else results


@functools.cache
def _kernel(shape: Shape, return_lse: bool, interpret: Any, T: int) -> Callable[..., Any]:
    def run(*arrays: Any) -> Any:
        def kernel(*refs: Any) -> None:
            def body(scratch: tuple[Any, ...], barriers: tuple[Any, ...]) -> None:
                q_smem, k_smem, v_smem, out_smem, *more = scratch
                outputs = refs[len(arrays) :] if return_lse else (*refs[len(arrays) :], None)
                out_smem = q_smem if out_smem is None else out_smem
                shared = q_smem, k_smem, v_smem, out_smem, *more
                everything: tuple[Any, ...] = (*refs[: len(arrays)], *outputs, *shared, *barriers)
                found = Refs(*everything)
                wg = lax.axis_index("wg")
                pl.when(wg == MEMORY)(lambda: ragged_warps.memory_warpgroup(shape, found))
                pl.when(wg < COMPUTE)(lambda: ragged_warps.compute_warpgroup(shape, found, wg))
                if shape.narrow:
                    pl.when(wg == WIDEN)(lambda: ragged_warps.widening_warpgroup(shape, found))

            pl.run_scoped(body, ragged_warps.scratch(shape), ragged_warps.barriers(shape), collective_axes="wg")

        return plgpu.kernel(
            kernel,
            out_type=_results(shape, T, arrays[4].shape[0], return_lse),
            grid=(shape.blocks.programs,),
            grid_names=("program",),
            num_threads=shape.warpgroups,
            thread_name="wg",
            kernel_name="paged_attention_ragged",
            interpret=interpret,
            compiler_params=plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
            ),
        )(*arrays)

    return run


def _of_tokens(lse: jax.Array, tiles: jax.Array, count: jax.Array, T: int) -> jax.Array:
    """f32[tiles, N, COMPUTE, 64] -> [T, N]: the queries a warpgroup held start where its loads did."""
    tile = Tile(*(tiles[:, field, None] for field in range(5)), head=count, item=count)  # of all, without their heads
    token, live = tile.token, tile.live
    begin = token + jnp.arange(COMPUTE, dtype=jnp.int32) * ROWS  # [tiles, COMPUTE]
    held = jnp.where(tile.aligned, begin, jnp.minimum(begin, T - ROWS))
    at = held[..., None] + jnp.arange(ROWS, dtype=jnp.int32)
    real = (jnp.arange(tiles.shape[0], dtype=jnp.int32) < count)[:, None, None]
    own = real & (at >= begin[..., None]) & (at < (token + live)[..., None])
    found = lse.transpose(0, 2, 3, 1)
    nothing = jnp.full((T, lse.shape[1]), LOWEST, jnp.float32)
    return nothing.at[jnp.where(own, at, T)].set(found, mode="drop")
