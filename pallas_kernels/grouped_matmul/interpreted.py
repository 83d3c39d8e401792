"""The GPU kernels of this room under Pallas's interpreter with race detection, for tests on a CPU.

In and out as the kernels. The interpreter takes a thread a warpgroup and milliseconds a step, so large inputs are
declined.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul import mosaic_sm90, planner, routed, router
from pallas_kernels.grouped_matmul.plan import Plan

MOST_PRODUCTS = 1 << 26  # tokens * choices * expert weights
PROGRAMS = 2


def route(logits: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    """router.route, interpreted."""
    return router.route(logits, interpret=True, **options)


def tiles(expert_ids: jax.Array, E: int, N: int, *, shared: bool) -> Plan:
    """planner.tiles, interpreted."""
    return planner.tiles(expert_ids, E, N, shared=shared, interpret=True)


def routed_mlp(
    x: jax.Array, gate_up: jax.Array, down: jax.Array, ids: jax.Array, weights: jax.Array, **options: Any
) -> jax.Array:
    """routed.routed_mlp by two interpreted programs."""
    products = ids.size * (gate_up[0].size + down[0].size)
    if products > MOST_PRODUCTS:
        raise NotImplementedError(f"{products} products would keep the interpreter busy for minutes")
    blocks = dataclasses.replace(mosaic_sm90.default_blocks(8, *gate_up.shape[:0:-1]), programs=PROGRAMS, block_k=64)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return routed.routed_mlp(x, gate_up, down, ids, weights, blocks=blocks, interpret=interpret, **options)
