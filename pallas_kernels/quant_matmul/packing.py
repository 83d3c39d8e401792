"""How quantised weights lie in memory: in the order in which a warpgroup's threads feed them to the tensor cores.

In: integers of a weight [N, K]. Out: words i32[N / 64, K / 64, rows, 128] for kernels that hold the weight in
registers, and the way back. A tile is 64 outputs x 64 inputs. Of its 128 threads, thread t holds words 4 t .. 4 t + 3
of every 512; a word holds what the thread gives to one step of 16 inputs (int4: all eight values) or half of it (int8:
four). So a thread reads 16 bytes at a time and passes nothing to its neighbours. Packing is done once, at load. This
module knows no scales.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

TILE = 64  # outputs and inputs of a packed tile
LANES = 128
STEP = 16  # inputs of one tensor-core step


def rows_of(bits: int) -> int:
    """Rows of 128 words that a tile takes."""
    return TILE * TILE * bits // 32 // LANES


def pack(values: jax.Array, bits: int) -> jax.Array:
    """i8[N, K] within `bits` bits -> i32 words. N and K are multiples of 64."""
    N, K = values.shape
    if bits not in (4, 8) or N % TILE or K % TILE:
        raise ValueError(f"need 4 or 8 bits and multiples of {TILE}, got {bits} bits and [N, K] = {values.shape}")
    # Per tile: warp, half, row, step, part (inputs 0-7 or 8-15), lane's column, element.
    parts = values.reshape(N // TILE, 4, 2, 8, K // TILE, 4, 2, 4, 2)
    # -> tile n, tile k, step, warp, row, column (these three: the thread), part, half, element
    order = parts.transpose(0, 4, 5, 1, 3, 7, 6, 2, 8)
    words = order.reshape(N // TILE, K // TILE, 4, LANES, 4, 2)  # step, thread, register, element
    raw = jax.lax.bitcast_convert_type(words, jnp.uint8).astype(jnp.uint32)
    if bits == 4:
        # Register j lies at bits 4 j (its first element) and 16 + 4 j (its second).
        shifts = jnp.arange(4, dtype=jnp.uint32)[:, None] * 4 + jnp.arange(2, dtype=jnp.uint32)[None, :] * 16
        made = ((raw & 15) << shifts).sum(axis=(-2, -1), dtype=jnp.uint32)  # step, thread
        grouped = made.reshape(N // TILE, K // TILE, 1, 4, LANES).swapaxes(-1, -2)
    else:
        # A word is two registers: four bytes in order.
        shifts = jnp.arange(4, dtype=jnp.uint32) * 8
        made = (raw.reshape(N // TILE, K // TILE, 4, LANES, 2, 4) << shifts).sum(axis=-1, dtype=jnp.uint32)
        grouped = made.reshape(N // TILE, K // TILE, 2, 2, LANES, 2).transpose(0, 1, 2, 4, 3, 5)
    flat = grouped.reshape(N // TILE, K // TILE, rows_of(bits), LANES)
    return jax.lax.bitcast_convert_type(flat, jnp.int32)


def unpack(words: jax.Array, bits: int, *, signed: bool = True) -> jax.Array:
    """i32 words -> i8[N, K]; the inverse of `pack`. Unsigned values of 4 bits come out as 0..15."""
    tiles_n, tiles_k = words.shape[:2]
    raw = jax.lax.bitcast_convert_type(words, jnp.uint32)
    if bits == 4:
        by_step = raw.reshape(tiles_n, tiles_k, LANES, 4).swapaxes(-1, -2)
        shifts = jnp.arange(4, dtype=jnp.uint32)[:, None] * 4 + jnp.arange(2, dtype=jnp.uint32)[None, :] * 16
        values = (by_step[..., None, None] >> shifts) & 15
        # Sign: a nibble of 8 or more stands for itself less 16.
        small = values.astype(jnp.int8)
        small = jnp.where(small >= 8, small - jnp.int8(16), small) if signed else small
    else:
        by_step = raw.reshape(tiles_n, tiles_k, 2, LANES, 2, 2).transpose(0, 1, 2, 4, 3, 5)
        values = (by_step[..., None] >> (jnp.arange(4, dtype=jnp.uint32) * 8)) & 255
        small = jax.lax.bitcast_convert_type(values.astype(jnp.uint8), jnp.int8)
    parts = small.reshape(tiles_n, tiles_k, 4, 4, 8, 4, 2, 2, 2)  # step, warp, row, column, part, half, element
    order = parts.transpose(0, 3, 7, 4, 1, 2, 6, 5, 8)
    return order.reshape(tiles_n * TILE, tiles_k * TILE)
