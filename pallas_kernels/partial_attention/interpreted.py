"""The GPU kernels of this room under Pallas's interpreters, for tests on a CPU, with race detection."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.interpreted import MOST_QUERIES, PROGRAMS
from pallas_kernels.paged_attention.mosaic_sm90 import default_blocks
from pallas_kernels.partial_attention import mosaic_sm90


def partial_attention(q: jax.Array, *arrays: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    """mosaic_sm90.partial_attention by two interpreted programs."""
    if q.shape[0] * q.shape[1] > MOST_QUERIES:
        raise NotImplementedError(f"{q.shape[0]} x {q.shape[1]} queries would keep the interpreter busy for minutes")
    blocks = dataclasses.replace(default_blocks(q.shape[2]), programs=PROGRAMS)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return mosaic_sm90.partial_attention(q, *arrays, blocks=blocks, interpret=interpret, **options)
