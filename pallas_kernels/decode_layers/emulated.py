"""The kernels of this room on a CPU: threads are fibers that one of them runs in random turns (emulator.h).

For tests: slow, but the indices, the barriers and the order of stages are the kernel's own. Copies land late, memory
that nobody wrote is NaN, and a wait that nobody will end is an error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.compiled import GXX, Handler, built, once
from pallas_kernels.decode_layers import cuda, launched, wide
from pallas_kernels.decode_layers.api import Head, LayerWeights, Pages

PROGRAMS = 4  # multiprocessors of the machine that is played


def decode_layers(
    x: jax.Array,
    layers: Sequence[LayerWeights],
    pages: Sequence[Pages],
    *rows: jax.Array,
    eps: float,
    scale: float,
    head: Head | None = None,
    groups: tuple[tuple[int, ...], ...] = (),
) -> tuple[jax.Array, list[Pages]]:
    """See api.decode_layers."""
    cuda.refuse(x, layers, pages, head, groups)
    handler = cuda.KINDS[cuda.kind_of(layers[0].qkv)]
    loaded, target = library(handler), f"{handler.target}_emulated"
    handler.register(loaded, target, "cpu")
    return cuda.call(target, loaded, PROGRAMS, x, layers, pages, *rows, eps=eps, scale=scale, head=head)


def wide_layers(
    x: jax.Array, layers: Sequence[LayerWeights], pages: Sequence[Pages], *rows: jax.Array, **options: Any
) -> tuple[jax.Array, list[Pages]]:
    """See api.decode_layers."""
    return wide.decode_layers(x, layers, pages, *rows, **options, kernel=machine(PROGRAMS))


def launched_layers(
    x: jax.Array, layers: Sequence[LayerWeights], pages: Sequence[Pages], *rows: jax.Array, **options: Any
) -> tuple[jax.Array, list[Pages]]:
    """See api.decode_layers."""
    loaded = launched.load(built(launched.SOURCE, launched.INCLUDES, (*GXX, "-DJAXLLM_EMULATED")))
    target = f"{launched.TARGET}_emulated"
    launched.register(loaded, target, "cpu")
    kernel = launched.Kernel(target, loaded, PROGRAMS, lambda device: device)
    return launched.decode_layers(x, layers, pages, *rows, **options, kernel=kernel)


@once
def machine(blocks: int) -> wide.Kernel:
    loaded = wide.load(built(wide.SOURCE, wide.INCLUDES, (*GXX, "-DJAXLLM_EMULATED")))
    wide.register(loaded, f"{wide.TARGET}_emulated", "cpu")
    return wide.Kernel(f"{wide.TARGET}_emulated", loaded, blocks, lambda device: device)


@once
def library(handler: Handler) -> ctypes.CDLL:
    return handler.load(built(handler.source, handler.includes, (*GXX, "-DJAXLLM_EMULATED", *handler.flags)))
