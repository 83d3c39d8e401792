"""Decode attention as one CUDA kernel, called through XLA's FFI and captured in the step's graph.

In: arrays that an api.py has checked. Out: attention outputs, the pages in place where new keys are written. The three
calls differ in where queries lie; a row's bits are the same in all. `refuse` alone says what the kernel does not do, so
that every kind of step decides alike. Rows are dealt out on the device, by their lengths; it does not know how.
Calls of one device must not overlap: they count in memory that stays with the library. ADR 0028 says why this is no
Pallas kernel.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compiled import Handler
from pallas_kernels.rope_page_write.heads import Heads

HERE = Path(__file__).parent
SHARED, TENSOR_CORES = HERE.parent / "decode_layers", HERE.parent / "decode_chain"
SOURCE = HERE / "decode_attention.cu"
INCLUDES = (
    *(HERE / name for name in ("call.h", "kernel.h", "dealing.h", "heads.h", "warpgroup.h", "by_warps.h")),
    *(SHARED / name for name in ("primitives.h", "emulator.h")),
    *(TENSOR_CORES / name for name in ("tensor_cores.h", "maps.h", "stamps.h")),
)
TARGET = "jaxllm_decode_attention"
_HANDLER = Handler(SOURCE, INCLUDES, TARGET)
library, load, register = _HANDLER.library, _HANDLER.load, _HANDLER.register
HEAD, TILE, MAX_GROUP, MAX_SEGMENTS = 128, 16, 8, 65536
HEADS, NORMS, BIAS, AMONG = 1, 2, 4, 8  # bits of what a call has
FASTER_FROM = 32  # rows, against Triton: benchmarks/results/decode_attention_h200


class Kernel(NamedTuple):
    """A built library and the name it is registered under."""

    target: str
    library: ctypes.CDLL
    programs: int  # multiprocessors

    def work(self, *sizes: int) -> int:
        """Bytes the kernel works in, for rows, programs, heads, kv heads, page size and width of the table."""
        return self.library.jaxllm_decode_attention_work(*map(ctypes.c_int64, sizes))


def decode_heads(
    heads: Heads,  # of B tokens
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,
    page_table: jax.Array,  # i32[B, W]
    kv_lens: jax.Array,  # i32[B]
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kernel: Kernel | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Norms, rotation, page write and attention of a decode step in one launch -> (out, k_pages, v_pages).

    The warp of a row's last keys writes the row's new key and value, and is the only one that reads them.
    """
    out = jax.ShapeDtypeStruct((heads.cos.shape[0], heads.N, heads.H), heads.dtype)
    refuse(out, k_pages, kv_lens.shape[0], scale, window, soft_cap)
    has = HEADS | NORMS * (heads.norms is not None) | BIAS * (heads.bias is not None)
    operands = *heads.arrays, k_pages, v_pages, page_table, kv_lens
    first, eps = len(heads.arrays), heads.eps
    aliases, more = {first: 2, first + 1: 3}, [_like(k_pages), _like(v_pages)]
    results = call(kernel or ours(), operands, (out, *more), aliases, scale, has=has, addends=heads.parts, eps=eps)
    return results[0], results[2], results[3]


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
    kernel: Kernel | None = None,
    **extras: Any,
) -> jax.Array:
    """One query a row, at position kv_lens - 1. Rows of length 0 come out 0."""
    refuse(q, k_pages, kv_lens.shape[0], scale, window, soft_cap, **extras)
    operands = q, k_pages, v_pages, page_table, kv_lens
    return call(kernel or ours(), operands, (_like(q),), {}, scale)[0]


def decode_among(
    q: jax.Array,  # [T, N, H]
    out: jax.Array,  # [T, N, H]
    tokens: jax.Array,  # i32[R]
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,
    page_table: jax.Array,  # i32[R, W]
    kv_lens: jax.Array,  # i32[R]
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kernel: Kernel | None = None,
    **extras: Any,
) -> jax.Array:
    """`out` with row r's output at tokens[r], where its query lies; rows of length 0 have neither and cost nothing."""
    refuse(q, k_pages, kv_lens.shape[0], scale, window, soft_cap, **extras)
    operands = q, tokens, out, k_pages, v_pages, page_table, kv_lens
    return call(kernel or ours(), operands, (_like(out),), {2: 0}, scale, has=AMONG)[0]


def where_faster[R](call: Callable[..., R]) -> Callable[..., R]:
    """The same call, declined for few rows. The number is one of shapes: an executable always has the same kernel."""

    @functools.wraps(call)
    def run(*arrays: Any, **options: Any) -> R:
        rows = arrays[-1].shape[0]
        if rows < FASTER_FROM:
            raise NotImplementedError(f"{rows} rows; Triton's kernel is faster below {FASTER_FROM}")
        return call(*arrays, **options)

    return run


many_heads, many_decode, many_among = map(where_faster, (decode_heads, paged_attention_decode, decode_among))


def refuse(
    q: jax.Array | jax.ShapeDtypeStruct,
    k_pages: jax.Array,
    rows: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    **extras: Any,
) -> None:
    """NotImplementedError for what the kernel does not do."""
    _, K, page_size, H = k_pages.shape
    if q.dtype != jnp.bfloat16 or k_pages.dtype != jnp.bfloat16:
        raise NotImplementedError(f"queries and pages must be bfloat16, got {jnp.dtype(q.dtype)} and {k_pages.dtype}")
    if window is not None or soft_cap is not None:
        raise NotImplementedError(f"neither windows nor soft caps, got {window} and {soft_cap}")
    asked = [name for name, value in extras.items() if value is not None and value is not False]
    if asked:
        raise NotImplementedError(f"does not take {', '.join(asked)}")
    if scale <= 0:
        raise NotImplementedError(f"the running maximum assumes a positive scale, got {scale}")
    if HEAD != H or page_size < TILE or page_size & (page_size - 1):
        raise NotImplementedError(
            f"heads of {HEAD}, pages of {TILE} tokens or a power of two more; got {H}, {page_size}"
        )
    if q.shape[1] // K > MAX_GROUP:
        raise NotImplementedError(f"{q.shape[1]} heads over {K}: at most {MAX_GROUP} queries a key")
    if rows * K > MAX_SEGMENTS:
        raise NotImplementedError(f"{rows} rows of {K} kv heads: at most {MAX_SEGMENTS} in all")


def call(
    kernel: Kernel,
    operands: tuple[jax.Array, ...],
    results: tuple[jax.ShapeDtypeStruct, ...],
    aliases: dict[int, int],
    scale: float,
    *,
    has: int = 0,
    addends: int = 0,
    eps: float = 0.0,
) -> list[jax.Array]:
    """The FFI call; its second result is memory the kernel works in, as much as the library asks for."""
    *_, k_pages, _, page_table, kv_lens = operands
    (_, K, page_size, _), (out, *pages) = k_pages.shape, results
    sizes = dict(rows=kv_lens.shape[0], programs=kernel.programs, heads=out.shape[1], kv_heads=K)
    sizes |= dict(page_size=page_size, width=page_table.shape[1])
    work = jax.ShapeDtypeStruct((kernel.work(*sizes.values()),), jnp.uint8)
    run = jax.ffi.ffi_call(kernel.target, [out, work, *pages], input_output_aliases=aliases)
    attributes = {name: np.int64(value) for name, value in (*sizes.items(), ("addends", addends), ("has", has))}
    return list(run(*operands, eps=np.float32(eps), scale=np.float32(scale), **attributes))


def _like(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def ours() -> Kernel:
    """The kernel for the present device, built on first use."""
    loaded = library()
    register(loaded)
    return Kernel(TARGET, loaded, getattr(jax.devices()[0], "core_count", 132))
