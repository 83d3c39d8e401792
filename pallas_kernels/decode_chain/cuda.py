"""The chain as overlapping CUDA launches (decode_chain.cu), called through XLA's FFI and captured in the step's graph.

In: arrays that api.py has checked. Out: the residual stream and the next layer's qkv. Declines what the kernels do not
do. ADR 0047 says why they are no Pallas kernels. How each product is cut up is decided here; it is part of the bits.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bf12
from pallas_kernels.compiled import Handler
from pallas_kernels.decode_chain.api import Dense, Following

HERE = Path(__file__).parent
SOURCE, INCLUDES = (
    HERE / "decode_chain.cu",
    (
        *(
            HERE / name
            for name in (
                "launch.h",
                "chain.h",
                "packed_products.h",
                "products.h",
                "wide_products.h",
                "maps.h",
                "stamps.h",
                "tensor_cores.h",
            )
        ),
        HERE.parent / "decode_layers" / "primitives.h",
        HERE.parent / "decode_layers" / "emulator.h",
    ),
)
TARGET = "jaxllm_decode_chain"
_HANDLER = Handler(SOURCE, INCLUDES, TARGET)
library, load, register = _HANDLER.library, _HANDLER.load, _HANDLER.register
MOST_ROWS, DEPTH, WIDEST = 256, 64, 8192
GROUP, TILE = 64, 128  # rows that a warpgroup multiplies; of one of two tiles
ONE_TILE = 192  # up to so many rows are one tile, of three warpgroups at most
WIDTHS = {False: (64, 96, 128), True: (64, 128, 224)}  # of tiles, by gated: what chain.h knows
SHARED = "weights", "rows"  # what two neighbouring blocks have in common
PACKED = "packed"  # or this: rows, and the weights are in 12 bits
PACKED_WIDTHS = {False: (64, 128, 192), True: (128, 224)}  # of tiles of such weights, by gated
PACKED_ROWS = 32  # that these are multiplied by
MOST_SPLITS, FEWEST_BLOCKS = 8, 4  # into which a depth is cut; blocks of depth that are worth a part


class Cut(NamedTuple):
    """How a product is dealt out: tiles of so many columns of the weight, and parts of its depth."""

    width: int
    splits: int
    shared: str  # of SHARED, or PACKED


@functools.cache
def cut_for(rows: int, columns: int, depth: int, gated: bool, blocks: int) -> Cut:
    """The cut whose multiprocessors have the least to fetch, sums of splits included."""
    tile = -(-rows // GROUP) * GROUP if rows <= ONE_TILE else TILE  # a row's bits do not depend on a few more
    shared, count, rows = "rows" if rows <= ONE_TILE else "weights", depth // DEPTH, -(-rows // tile) * tile

    def bytes_of_one(cut: Cut) -> tuple[float, int]:
        across = -(-columns // (cut.width // 2 if gated else cut.width))
        pairs = (across if shared == "weights" else -(-across // 2)) * cut.splits
        own = cut.width + tile / 2 if shared == "rows" else cut.width / 2 + tile
        fetched = -(-pairs // (blocks // 2)) * -(-count // cut.splits) * own * DEPTH * 2
        return fetched + (0 if gated else cut.splits * 2 * rows * columns * 4 / blocks), cut.splits

    splits = [n for n in range(1, MOST_SPLITS + 1) if n == 1 or (not gated and count >= n * FEWEST_BLOCKS)]
    return min((Cut(width, n, shared) for width in WIDTHS[gated] for n in splits), key=bytes_of_one)


@functools.cache
def packed_cut_for(columns: int, depth: int, gated: bool, blocks: int) -> Cut:
    """The same for weights in 12 bits, of which `columns` come out; rows are at most one tile."""
    count, columns = depth // DEPTH, columns * 2 if gated else columns

    def bytes_of_one(cut: Cut) -> tuple[float, int]:
        pairs = -(-columns // cut.width // 2) * cut.splits
        fetched = (
            -(-pairs // (blocks // 2)) * -(-count // cut.splits) * (cut.width * bf12.BITS / 8 + PACKED_ROWS) * DEPTH
        )
        return fetched + (0 if gated else cut.splits * 2 * PACKED_ROWS * columns * 4 / blocks), cut.splits

    splits = [n for n in range(1, MOST_SPLITS + 1) if n == 1 or (not gated and count >= n * FEWEST_BLOCKS)]
    return min((Cut(width, n, PACKED) for width in PACKED_WIDTHS[gated] for n in splits), key=bytes_of_one)


def decode_chain(
    x: jax.Array,  # [T, D]
    mixed: jax.Array,  # [T, O]
    layer: Dense,
    following: Following | None,
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array | None]:
    """x after the layer, and the next layer's qkv."""
    refuse(x, mixed, layer, following)
    register(library())
    blocks = getattr(jax.devices()[0], "core_count", 132) // 2 * 2
    return call(TARGET, library(), blocks, x, mixed, layer, following, eps=eps)


def refuse(x: jax.Array, mixed: jax.Array, layer: Dense, following: Following | None) -> None:
    """NotImplementedError for what the kernel does not do."""
    wide = x.shape[1] if following is None else following.qkv.shape[0]
    refuse_sizes(x.shape[0], {"D": x.shape[1], "O": mixed.shape[1], "F": layer.down.shape[1], "Q": wide})
    for array in jax.tree.leaves((x, mixed, layer, following)):
        if array.dtype != jnp.bfloat16:
            raise NotImplementedError(f"everything must be bfloat16, got {array.dtype}")


def refuse_sizes(rows: int, sizes: dict[str, int]) -> None:
    """The same for rows and for widths, of which "D" is that of the residual stream."""
    if rows > MOST_ROWS:
        raise NotImplementedError(f"at most {MOST_ROWS} rows, got {rows}")
    if sizes["D"] > WIDEST:
        raise NotImplementedError(f"a residual stream of at most {WIDEST} numbers, got {sizes['D']}")
    for name, size in sizes.items():
        if size % DEPTH:
            raise NotImplementedError(f"{name} = {size} is no multiple of {DEPTH}")


def cuts_for(
    rows: int,
    D: int,
    O: int,  # noqa: E741
    F: int,
    Q: int,
    blocks: int,
    packed: bool = False,
) -> tuple[np.ndarray, int]:
    """Of o, gate and up, down and qkv, as the library takes them; and the most columns of f32 sums that a row wants."""
    products = ((D, O, False), (F, D, True), (D, F, False), (Q, D, False))
    cuts = [packed_cut_for(*each, blocks) if packed else cut_for(rows, *each, blocks) for each in products]
    sums = max(cut.splits * columns for cut, (columns, _, gated) in zip(cuts, products, strict=True) if not gated)
    return np.array(
        [(cut.width, cut.splits, (*SHARED, PACKED).index(cut.shared)) for cut in cuts], np.int64
    ).ravel(), sums


def call(
    target: str,
    loaded: ctypes.CDLL,
    blocks: int,
    x: jax.Array,
    mixed: jax.Array,
    layer: Dense,
    following: Following | None,
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array | None]:
    """The FFI call, with the library's word on how much memory it works in."""
    (M, D), F = x.shape, layer.down.shape[1]
    Q = D if following is None else following.qkv.shape[0]
    cuts, sums = cuts_for(M, D, mixed.shape[1], F, Q, blocks)
    operands = [x, mixed, layer.o, layer.norms, layer.gate_up, layer.down]
    optional = [layer.o_bias]
    if following is not None:
        optional += [following.norms, following.qkv, following.bias]
    operands += [array for array in optional if array is not None]
    bias = following is not None and following.bias is not None
    has = 1 * (layer.o_bias is not None) + 2 * (following is not None) + 4 * bias
    work = jax.ShapeDtypeStruct((loaded.jaxllm_decode_chain_work(*map(ctypes.c_int64, (M, D, F, sums))),), jnp.uint8)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype), work]
    if following is not None:
        results.append(jax.ShapeDtypeStruct((M, following.qkv.shape[0]), x.dtype))
    numbers = {"blocks": np.int64(blocks), "sums": np.int64(sums), "has": np.int64(has)}
    out, _, *qkv = jax.ffi.ffi_call(target, results)(*operands, cuts=cuts, **numbers, eps=np.float32(eps))
    return out, qkv[0] if qkv else None
