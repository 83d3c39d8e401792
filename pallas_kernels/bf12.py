"""bf16 weights in 12 bits each, without loss: how they lie, packing and unpacking in jnp.

In: a weight [N, K] in bf16, both multiples of 64. Out: words i32[N / 64, K / 64, 4, 388], a tile of 64 x 64 in four
slabs of 16 outputs. A bf16 is sign, eight bits of exponent and seven of mantissa; of a slab's 1,024 weights nearly all
have one of 15 exponents in a row, so 4 bits say which: `base + code`. Code 0 is an escape: a zero, or one of up to
seven numbers kept at the slab's end. The idea, with codes of variable length, is DFloat11 (arXiv:2504.11651); of fixed
length, in the order in which tensor cores want their operand, ZipServ's.

A slab's words: of each of the 32 lanes of a warp four words of signs and mantissas for the first 32 inputs, then four
for the others, then four of codes, one for each 16 inputs, then four words of end: as halves base << 7 with a flag in
bit i where the i-th 16 inputs have an escape, and seven numbers. A lane's eight weights of 16 inputs are the left
operand of `mma.m16n8k16`, and a warp's of `wgmma.m64nNk16`, in its order: pairs {row g, columns 2t and 2t + 1}, {row
g + 8, the same}, {row g, columns 2t + 8 and 2t + 9}, {row g + 8, the same} where the lane is 4g + t (PTX ISA). Signs
and mantissas of the first pair lie in bits 31, 22..16, 15, 6..0 of the first word, those of the second there after
turning right by 8; codes of pair j in bits 26..23 and 10..7 after turning right by 4j.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

TILE, SLAB, LANES = 64, 16, 32
WORDS, END = 388, 4  # of a slab, and those of them that are its end
BITS = WORDS * 32 / (SLAB * TILE)  # a weight: 12.125
ESCAPES, CODES = 7, 15  # numbers that a slab's end holds; exponents that have a code
_SIGN_MANTISSA, _PAIR_CODES = 0x807F, 0x07800780


def pack(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """bf16[N, K] -> (words, how many slabs have more escapes than they can hold: of those the words are wrong)."""
    N, K = weight.shape
    if weight.dtype != jnp.bfloat16 or N % TILE or K % TILE:
        raise ValueError(f"need bf16[N, K] of multiples of {TILE}, got {weight.dtype}{weight.shape}")
    bits = jax.lax.bitcast_convert_type(weight, jnp.uint16).astype(jnp.uint32)
    # [N / 64, K / 64, slab, half, g, step, eights, t, of a pair]
    bits = bits.reshape(N // TILE, 4, 2, 8, K // TILE, 4, 2, 4, 2).transpose(0, 4, 1, 2, 3, 5, 6, 7, 8)
    slab = bits.reshape(*bits.shape[:3], -1)
    exponent, magnitude = slab >> 7 & 0xFF, slab & 0x7FFF
    base = _base(exponent, magnitude)
    code = exponent.astype(jnp.int32) - base[..., None]
    escapes = (code < 1) | (code > CODES)
    kept = escapes & (magnitude > 0)
    # One after the other: the place of the first that is left.
    places, index, numbers = jnp.arange(slab.shape[-1]), jnp.zeros_like(slab), []
    left = kept
    for number in range(1, ESCAPES + 1):
        first = left & (places == jnp.argmax(left, axis=-1)[..., None])
        numbers.append(jnp.where(first, slab, 0).sum(axis=-1))
        index, left = jnp.where(first, number, index), left & ~first
    code = jnp.where(escapes, 0, code).astype(jnp.uint32)
    payload = jnp.where(kept, index, jnp.where(escapes, slab & 0x8000, slab & _SIGN_MANTISSA))
    code, payload, flags = (each.reshape(bits.shape) for each in (code, payload, escapes))
    pairs, codes = (
        each[..., 0] | each[..., 1] << 16 for each in (payload, code << 7)
    )  # [.., half, g, step, eights, t]
    halves = pairs[:, :, :, 0] | _left(pairs[:, :, :, 1], 8)  # [.., g, step, eights, t]
    planes = halves.reshape(*halves.shape[:4], 2, 2, 2, 4).transpose(
        0, 1, 2, 4, 3, 7, 5, 6
    )  # plane, g, t, step, eights
    turned = [_left(codes[:, :, :, j % 2, :, :, j // 2], 4 * j) for j in range(4)]  # [.., g, step, t]
    words_of_codes = (turned[0] | turned[1] | turned[2] | turned[3]).transpose(0, 1, 2, 3, 5, 4)
    flag = (flags.any(axis=(3, 4, 6, 7, 8)).astype(jnp.uint32) << jnp.arange(4, dtype=jnp.uint32)).sum(axis=-1)
    halves_of_end = [base.astype(jnp.uint32) << 7 | flag, *numbers]
    end = jnp.stack([low | high << 16 for low, high in zip(halves_of_end[::2], halves_of_end[1::2], strict=True)], -1)
    parts = [planes, words_of_codes, end]
    words = jnp.concatenate([part.reshape(*slab.shape[:3], -1) for part in parts], -1)
    return jax.lax.bitcast_convert_type(words, jnp.int32), left.any(axis=-1).sum(dtype=jnp.int32)


def unpack(words: jax.Array) -> jax.Array:
    """-> bf16[N, K], every bit as it was."""
    if words.dtype != jnp.int32 or words.ndim != 4 or words.shape[2:] != (4, WORDS):
        raise ValueError(f"need i32[N / {TILE}, K / {TILE}, 4, {WORDS}], got {words.dtype}{words.shape}")
    down, across = words.shape[:2]
    words = jax.lax.bitcast_convert_type(words, jnp.uint32)
    planes = words[..., : 2 * 4 * LANES].reshape(down, across, 4, 2, 8, 4, 2, 2).transpose(0, 1, 2, 4, 3, 6, 7, 5)
    first = planes.reshape(down, across, 4, 8, 4, 2, 4)  # [.., g, step, eights, t]
    pairs = jnp.stack([first, _left(first, 24)], axis=3)  # [.., half, g, step, eights, t]
    codes = words[..., 8 * LANES : WORDS - END].reshape(down, across, 4, 8, 4, 4).transpose(0, 1, 2, 3, 5, 4)
    turned = [_left(codes, (32 - 4 * j) % 32) & _PAIR_CODES for j in range(4)]  # [.., g, step, t]
    codes = jnp.stack([jnp.stack(turned[half::2], axis=5) for half in range(2)], axis=3)
    bits, codes = (jnp.stack([each & 0xFFFF, each >> 16], -1) for each in (pairs, codes))
    bits, codes = bits & _SIGN_MANTISSA, codes >> 7
    end = words[..., WORDS - END :]
    numbers = jnp.stack([end & 0xFFFF, end >> 16], -1).reshape(down, across, 4, 8)
    base = (numbers[..., 0] & 0x7F80).reshape(down, across, 4, *[1] * 6)
    index = bits & 0x7F
    kept = jnp.take_along_axis(numbers, index.reshape(down, across, 4, -1) % 8, axis=-1).reshape(index.shape)
    bits = jnp.where(codes > 0, bits + (codes << 7) + base, jnp.where(index > 0, kept, bits))
    bits = bits.transpose(0, 2, 3, 4, 1, 5, 6, 7, 8).reshape(down * TILE, across * TILE).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def in_turns(weight: jax.Array) -> jax.Array:
    """[2F, K], gates and then ups, as kernels want it packed: eight gates, then the eight ups that go with them."""
    return weight.reshape(2, -1, 8, weight.shape[1]).swapaxes(0, 1).reshape(weight.shape)


def in_order(weight: jax.Array) -> jax.Array:
    """What `in_turns` was given."""
    return weight.reshape(-1, 2, 8, weight.shape[1]).swapaxes(0, 1).reshape(weight.shape)


def _left(words: jax.Array, by: int) -> jax.Array:
    return words << by | words >> (32 - by) if by else words


def _base(exponent: jax.Array, magnitude: jax.Array) -> jax.Array:
    """Of each slab: one less than the exponent whose code is 1. From the largest number down, or where outliers are
    larger than the others, from 4 above the mean: whichever leaves fewer escapes."""
    there = magnitude > 0
    top = jnp.max(jnp.where(there, exponent, 0), axis=-1).astype(jnp.int32)
    mean = jnp.where(there, exponent, 0).sum(axis=-1) // jnp.maximum(there.sum(axis=-1, dtype=jnp.uint32), 1)
    tried = [jnp.clip(highest - CODES, 0, 255 - CODES) for highest in (top, mean.astype(jnp.int32) + 4)]

    def escapes(base: jax.Array) -> jax.Array:
        code = exponent.astype(jnp.int32) - base[..., None]
        return (there & ((code < 1) | (code > CODES))).sum(axis=-1)

    return jnp.where(escapes(tried[0]) <= escapes(tried[1]), *tried)
