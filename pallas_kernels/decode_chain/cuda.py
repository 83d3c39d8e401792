"""The chain as one CUDA kernel (decode_chain.cu), called through XLA's FFI and captured in the step's CUDA graph.

In: arrays that api.py has checked. Out: the residual stream and the next layer's qkv. Declines what the kernel does not
do. ADR 0031 says why it is no Pallas kernel. How each product is cut up is decided here; it is part of the bits.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compiled import Handler
from pallas_kernels.decode_chain.api import Dense, Following

HERE = Path(__file__).parent
SOURCE, INCLUDES = (
    HERE / "decode_chain.cu",
    (
        HERE / "ends.h",
        HERE / "maps.h",
        HERE / "tensor_cores.h",
        HERE / "launch.h",
        HERE.parent / "decode_layers" / "primitives.h",
        HERE.parent / "decode_layers" / "emulator.h",
    ),
)
TARGET = "jaxllm_decode_chain"
_HANDLER = Handler(SOURCE, INCLUDES, TARGET)
library, load, register = _HANDLER.library, _HANDLER.load, _HANDLER.register
MOST_ROWS, DEPTH, WIDE, WIDEST, MOST_TILES = 128, 64, 128, 8192, 512


def tiles_of(columns: int, gated: bool = False) -> int:
    """Pairs of tiles: what a cluster takes."""
    return -(-columns // (WIDE if gated else 2 * WIDE))


@functools.cache
def splits_for(columns: int, depth: int, gated: bool, blocks: int) -> int:
    """Into how many parts of its depth a product is cut, so that every cluster has some of it."""
    tiles, clusters = tiles_of(columns, gated), blocks // 2
    return next((n for n in (8, 4, 2) if tiles * n <= clusters and depth // DEPTH >= 2 * n), 1)


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
    if x.shape[0] > MOST_ROWS:
        raise NotImplementedError(f"at most {MOST_ROWS} rows, got {x.shape[0]}")
    if x.shape[1] > WIDEST:
        raise NotImplementedError(f"a residual stream of at most {WIDEST} numbers, got {x.shape[1]}")
    for array in jax.tree.leaves((x, mixed, layer, following)):
        if array.dtype != jnp.bfloat16:
            raise NotImplementedError(f"everything must be bfloat16, got {array.dtype}")
    wide = x.shape[1] if following is None else following.qkv.shape[0]
    if (most := 2 * max(tiles_of(layer.down.shape[1], gated=True), tiles_of(wide))) > MOST_TILES:
        raise NotImplementedError(f"{most} tiles of a product, at most {MOST_TILES}")
    for name, size in (("D", x.shape[1]), ("O", mixed.shape[1]), ("F", layer.down.shape[1]), ("Q", wide)):
        if size % DEPTH:
            raise NotImplementedError(f"{name} = {size} is no multiple of {DEPTH}")


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
    products = ((D, mixed.shape[1], False), (F, D, True), (D, F, False), (Q, D, False))
    splits = [splits_for(*product, blocks) for product in products]
    operands = [x, mixed, layer.o, layer.norms, layer.gate_up, layer.down]
    optional = [layer.o_bias]
    if following is not None:
        optional += [following.norms, following.qkv, following.bias]
    operands += [array for array in optional if array is not None]
    bias = following is not None and following.bias is not None
    has = 1 * (layer.o_bias is not None) + 2 * (following is not None) + 4 * bias
    work = jax.ShapeDtypeStruct((loaded.jaxllm_decode_chain_work(*map(ctypes.c_int64, (M, D, F))),), jnp.uint8)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype), work]
    if following is not None:
        results.append(jax.ShapeDtypeStruct((M, following.qkv.shape[0]), x.dtype))
    numbers = {"blocks": np.int64(blocks), "has": np.int64(has)}
    run = jax.ffi.ffi_call(target, results)
    out, _, *qkv = run(*operands, splits=np.asarray(splits, np.int64), **numbers, eps=np.float32(eps))
    return out, qkv[0] if qkv else None
