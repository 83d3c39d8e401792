"""The GPU kernels of this room under Pallas's interpreters, for tests on a CPU: one small function a kernel.

In and out as the kernels. The Mosaic interpreter looks for races (it prints and counts them) and takes a thread a
warpgroup and about a tenth of a second a tile, so large inputs are declined. Threads that wait for each other hold
workers of XLA's CPU pool: it needs more of those than small machines give it (tests/conftest.py asks for them).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import decode_sm90, mosaic_sm90, triton

MOST_QUERIES = 1024  # T * N
MOST_UNITS = 24  # rows * kv heads of a decode step
PROGRAMS = 2


def ragged(q: jax.Array, *arrays: jax.Array, **options: Any) -> Any:
    """mosaic_sm90.paged_attention by two interpreted programs, with race detection."""
    if q.shape[0] * q.shape[1] > MOST_QUERIES:
        raise NotImplementedError(f"{q.shape[0]} x {q.shape[1]} queries would keep the interpreter busy for minutes")
    blocks = dataclasses.replace(mosaic_sm90.default_blocks(q.shape[2]), programs=PROGRAMS)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return mosaic_sm90.paged_attention(q, *arrays, blocks=blocks, interpret=interpret, **options)


def flash(q: jax.Array, *arrays: jax.Array, **options: Any) -> Any:
    """mosaic_sm90.flash_attention, likewise."""
    if q.shape[0] * q.shape[1] > MOST_QUERIES:
        raise NotImplementedError(f"{q.shape[0]} x {q.shape[1]} queries would keep the interpreter busy for minutes")
    blocks = dataclasses.replace(mosaic_sm90.default_blocks(q.shape[2]), programs=PROGRAMS)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return mosaic_sm90.flash_attention(q, *arrays, blocks=blocks, interpret=interpret, **options)


def decode(q: jax.Array, *arrays: jax.Array, **options: Any) -> Any:
    """decode_sm90.paged_attention_decode by one interpreted program, with race detection.

    Several programs would agree through counters, which the interpreter does not have; it runs them one after the
    other, so that results are right (`decode_by`), but calls that a race.
    """
    return jax.tree.map(lambda array: array[:, 0], verify(q[:, None], *arrays, **options))


def verify(*arrays: jax.Array, **options: Any) -> Any:
    """decode_sm90.verify, likewise."""
    q, k_pages = arrays[:2]
    if q.shape[0] * k_pages.shape[1] > MOST_UNITS:
        raise NotImplementedError(f"{q.shape[0]} rows of {k_pages.shape[1]} kv heads take the interpreter minutes")
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return decode_sm90.verify(*arrays, blocks=decode_sm90.Blocks(programs=1), interpret=interpret, **options)


def decode_write(*arrays: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """decode_sm90.decode_write, likewise."""
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return decode_sm90.decode_write(*arrays, blocks=decode_sm90.Blocks(programs=1), interpret=interpret, **options)


def decode_by(programs: int, *arrays: jax.Array, **options: Any) -> Any:
    """decode_sm90.paged_attention_decode by several interpreted programs."""
    blocks, interpret = decode_sm90.Blocks(programs=programs), plgpu.InterpretGPUParams()
    return decode_sm90.paged_attention_decode(*arrays, blocks=blocks, interpret=interpret, **options)


def triton_decode(*arrays: jax.Array, **options: Any) -> Any:
    """triton.paged_attention_decode, interpreted."""
    return triton.paged_attention_decode(*arrays, interpret=True, **options)


def triton_among(*arrays: jax.Array, **options: Any) -> jax.Array:
    """triton.decode_among, interpreted."""
    return triton.decode_among(*arrays, interpret=True, **options)


def triton_decode_heads(*arrays: Any, **options: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """triton.decode_heads, interpreted."""
    return triton.decode_heads(*arrays, interpret=True, **options)
