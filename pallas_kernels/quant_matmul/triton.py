"""Candidate: the same products in Pallas-Triton, for up to 64 rows of x. Measured beside Mosaic, not registered."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

GROUP = 128


@dataclass(frozen=True)
class Blocks:
    outputs: int = 64
    inputs: int = 128
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 5


def _widen_int4(words: jax.Array, shift: int) -> jax.Array:
    """u8[n, k] -> bf16[n, k]: four bytes at a time hold registers 0 to 3 at bits 4 j and 16 + 4 j; two of them."""
    text = f"""{{
        .reg .b32 t<2>;
        .reg .b32 bias;
        mov.b32 bias, 0x43084308;
        shr.u32 t0, $2, {shift}; shr.u32 t1, $2, {shift + 4};
        lop3.b32 t0, t0, 0x000F000F, 0x43084308, 0x6a;
        lop3.b32 t1, t1, 0x000F000F, 0x43084308, 0x6a;
        sub.bf16x2 $0, t0, bias; sub.bf16x2 $1, t1, bias;
    }}"""
    like = jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)
    (made,) = plt.elementwise_inline_asm(text, args=[words], constraints="=r,=r,r", pack=4, result_shape_dtypes=[like])
    return made


def _kernel(x: Any, w: Any, scale: Any, out: Any, *, blocks: Blocks, bits: int, M: int, K: int, rows: int) -> None:
    n = pl.program_id(0) * blocks.outputs + jnp.arange(blocks.outputs)
    m = jnp.arange(rows)
    count = K // blocks.inputs // blocks.splits
    first = pl.program_id(1) * count
    inside = (m < M)[:, None]

    def body(step: jax.Array, acc: jax.Array) -> jax.Array:
        k0 = (first + step) * blocks.inputs
        if bits == 8:
            k = k0 + jnp.arange(blocks.inputs)
            wide = plt.load(w.at[n[:, None], k[None, :]]).astype(jnp.bfloat16)
            xs = plt.load(x.at[m[:, None], k[None, :]], mask=inside, other=0.0)
            return acc + plt.dot(wide, xs, trans_b=True)
        half = blocks.inputs // 2
        byte = k0 // 2 + jnp.arange(half)
        words = plt.load(w.at[n[:, None], byte[None, :]])
        low, high = _widen_int4(words, 0), _widen_int4(words, 8)
        k = k0 + jnp.arange(half)
        part = plt.dot(low, plt.load(x.at[m[:, None], k[None, :]], mask=inside, other=0.0), trans_b=True)
        k = k0 + half + jnp.arange(half)
        part += plt.dot(high, plt.load(x.at[m[:, None], k[None, :]], mask=inside, other=0.0), trans_b=True)
        return acc + part * plt.load(scale.at[k0 // GROUP, n]).astype(jnp.float32)[:, None]

    acc = lax.fori_loop(0, count, body, jnp.zeros((blocks.outputs, rows), jnp.float32))
    if bits == 8:
        acc *= plt.load(scale.at[n])[:, None]
    place = out.at[pl.program_id(1), m[None, :], n[:, None]]
    plt.store(place, acc.astype(out.dtype), mask=(m < M)[None, :])


def matmul(x: jax.Array, w: jax.Array, scale: jax.Array, *, bits: int, blocks: Blocks, out_dtype: Any) -> jax.Array:
    (M, K), N = x.shape, w.shape[0]
    dtype = out_dtype if blocks.splits == 1 else jnp.float32
    rows = max(16, pl.next_power_of_2(M))
    parts = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, bits=bits, M=M, K=K, rows=rows),
        name="quant_matmul_triton",
        grid=(N // blocks.outputs, blocks.splits),
        in_specs=[pl.no_block_spec] * 3,
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct((blocks.splits, M, N), dtype),
        compiler_params=plt.CompilerParams(num_warps=blocks.num_warps, num_stages=blocks.num_stages),
    )(x, w, scale)
    total = functools.reduce(jnp.add, [parts[split] for split in range(blocks.splits)])
    return total.astype(out_dtype)


def pack_int4(q: jax.Array) -> jax.Array:
    """i8[N, K] -> u8[N, K / 2]: in each 128 inputs, bytes 4 i .. 4 i + 3 hold inputs 4 i .. and 64 + 4 i .. ."""
    N, K = q.shape
    low, high = (part[:, :, 0] for part in jnp.split(q.reshape(N, K // 128, 2, 64), 2, axis=2))
    raw = [jax.lax.bitcast_convert_type(part, jnp.uint8).astype(jnp.uint32) & 15 for part in (low, high)]
    a, b = (part.reshape(N, K // 128, 16, 4) for part in raw)
    registers = [(a[..., 0], a[..., 1]), (a[..., 2], a[..., 3]), (b[..., 0], b[..., 1]), (b[..., 2], b[..., 3])]
    word = sum(((r[0] << (4 * j)) | (r[1] << (4 * j + 16)) for j, r in enumerate(registers)), jnp.uint32(0))
    return jax.lax.bitcast_convert_type(word, jnp.uint8).reshape(N, K // 2)
