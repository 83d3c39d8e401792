"""int4 weights in plain Triton through jax-triton: one backend of one op, so that Triton and Pallas stand side by side.

In: bf16 activations of few rows, packed words, scales of groups of 64 or 128; already checked by api.py. Out: [M, N].
Every element looks up its own word (eight elements share one, through the L1 cache) and takes its four bits out of it.
It is here to be compared, and never chosen before the Mosaic kernel. Its custom call is not captured in a CUDA graph.

jax-triton is no dependency: this module is imported only when the backend is asked for, and needs jax-triton >= 0.3.1
(which needs Triton >= 3.6) beside JAX; without them the import error is the reason it declines with.
"""

# A Triton kernel is Python in name only: its parameters have no Python types.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]

OLDEST_TRITON = (3, 6)
MOST_ROWS = 64
TILE = 64


@triton.jit
def _int4_tile(  # noqa: ANN202
    x_ptr,  # noqa: ANN001  bf16[M, K]
    words_ptr,  # noqa: ANN001  i32[N / 64, K / 64, 4, 128]
    scale_ptr,  # noqa: ANN001  [K / group, N]
    out_ptr,  # noqa: ANN001  [M, N]
    M: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    tile = tl.program_id(0)
    n, k, m = tl.arange(0, 64), tl.arange(0, 64), tl.arange(0, ROWS)
    thread = ((n // 16) * 32 + (n % 8) * 4)[:, None] + ((k % 8) // 2)[None, :]
    place = thread * 4 + (k // 16)[None, :]
    shift = (((k % 16) // 8) * 8 + (k % 2) * 16)[None, :] + (((n % 16) // 8) * 4)[:, None]
    acc = tl.zeros((64, ROWS), tl.float32)
    for block in range(K // 64):
        words = tl.load(words_ptr + (tile * (K // 64) + block) * 512 + place)
        q = ((words >> shift) & 15 ^ 8) - 8
        x = tl.load(x_ptr + m[None, :] * K + (block * 64 + k)[:, None], mask=m[None, :] < M, other=0.0)
        scale = tl.load(scale_ptr + block * 64 // GROUP * N + tile * 64 + n).to(tl.float32)
        acc += tl.dot(q.to(tl.bfloat16), x) * scale[:, None]
    place = out_ptr + m[None, :] * N + (tile * 64 + n)[:, None]
    tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=m[None, :] < M)


def int4_matmul(
    x: jax.Array,  # bf16[M, K]
    words: jax.Array,  # i32[N / 64, K / 64, 4, 128]
    scale: jax.Array,  # [K / group, N]
    zero: jax.Array | None = None,
    *,
    out_dtype: Any = jnp.float32,
    compute_capability: int | None = None,  # of another device than this one, to compile for it
) -> jax.Array:
    (M, K), N = x.shape, words.shape[0] * TILE
    refuse(x, K // scale.shape[0], zero)
    return jax_triton.triton_call(
        x,
        words,
        scale,
        kernel=_int4_tile,
        out_shape=jax.ShapeDtypeStruct((M, N), out_dtype),
        grid=(N // TILE,),
        num_warps=4,
        num_stages=4,
        compute_capability=compute_capability,
        M=M,
        K=K,
        N=N,
        GROUP=K // scale.shape[0],
        ROWS=max(16, triton.next_power_of_2(M)),
    )


def refuse(x: jax.Array, group: int, zero: jax.Array | None) -> None:
    """NotImplementedError for what this implementation does not do."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        raise NotImplementedError(f"jax-triton needs Triton >= 3.6, this is {triton.__version__}")
    if x.dtype != jnp.bfloat16 or x.shape[0] > MOST_ROWS:
        raise NotImplementedError(f"takes up to {MOST_ROWS} rows of bfloat16, got {x.dtype}{list(x.shape)}")
    if zero is not None or group < TILE:
        raise NotImplementedError(f"takes signed weights in groups of {TILE} or more inputs, got groups of {group}")
