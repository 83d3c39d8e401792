"""Room of their own for the small arrays that come and go with steps, so that the steps' memory stays where it is.

XLA's allocator on a GPU cuts everything from the front of its largest free piece, and takes a smaller one where that
fits better. Inputs on their way in and tokens on their way out therefore move the temporary memory of the step behind
them, and a step whose addresses have changed has its CUDA graph recorded anew: over two GPUs 2 ms of the host for a
decode step and 3 for a prompt's (benchmarks/results/meshes_h200, ADR 44). Free pieces between small arrays that stay
cannot grow together, so the small ones go there.

In: devices, the largest array that a step makes. Out: what must be kept.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import numpy as np

from jaxllm.graph.kv_cache import Device

GRAIN = 256  # bytes; what the allocator gives at least
SIZES, EACH = tuple(1 << power for power in range(8, 21)), 6  # of pieces, and how many of each: steps overlap
BYTES = EACH * sum(SIZES)


def keep_apart(devices: Iterable[Device], largest: int) -> list[jax.Array]:
    """Arrays between which pieces of memory lie free, on each device, one of them of `largest` bytes."""
    stay: list[jax.Array] = []
    for device in devices:
        go = []
        for size in (*SIZES * EACH, largest):
            go.append(jax.device_put(np.zeros(size, np.uint8), device))
            stay.append(jax.device_put(np.zeros(GRAIN, np.uint8), device))
        jax.block_until_ready((go, stay))
    return stay
