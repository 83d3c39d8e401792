"""silu(gate) * up of many rows as one CUDA kernel, called through XLA's FFI and captured in the step's CUDA graph.

In: arrays that api.py has checked. Out: see there; gate and up are not rounded before they are multiplied. Declines
what the kernel does not do, and rows for which XLA is as fast. How the product is cut into tiles is decided here; a
row's bits do not depend on it. ADR 0045 says why it is no Pallas kernel.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compiled import Handler
from pallas_kernels.gated_matmul import reference

HERE = Path(__file__).parent
CHAIN, LAYERS = HERE.parent / "decode_chain", HERE.parent / "decode_layers"
SOURCE, INCLUDES = (
    HERE / "gated_matmul.cu",
    (
        HERE / "launch.h",
        *(CHAIN / name for name in ("products.h", "wide_products.h", "maps.h", "stamps.h", "tensor_cores.h")),
        *(LAYERS / name for name in ("primitives.h", "emulator.h")),
    ),
)
TARGET = "jaxllm_gated_matmul"
_HANDLER = Handler(SOURCE, INCLUDES, TARGET)
library, load, register = _HANDLER.library, _HANDLER.load, _HANDLER.register
ROWS, DEPTH = 128, 64  # of a tile; of a block of D
FEWEST_ROWS, MOST_PADDING = 65, 1.2  # where XLA's product is faster: benchmarks/results/gated_matmul_h200
END_OF_TILE = 16  # columns that could be multiplied while a tile ends
SHARED = ("weights", "rows")


@dataclass(frozen=True)
class Cut:
    """Tiles of 128 rows by `width` of gate and up together, whose neighbours share `shared`: what launch.h knows."""

    width: int
    shared: str  # of SHARED
    run: int = 8  # pairs of row tiles whose x stays in the second-level cache while all weights pass


CUTS = (*(Cut(width, "weights") for width in (256, 224, 192, 128)), *(Cut(width, "rows") for width in (224, 128)))


@functools.cache
def cut_for(rows: int, columns: int, blocks: int) -> Cut:
    """The cut whose multiprocessors have the least to multiply; of several the widest, which reads the least."""
    down = -(-rows // ROWS)

    def work(cut: Cut) -> tuple[int, int]:
        across = -(-columns // (cut.width // 2))
        pairs = down * -(-across // 2) if cut.shared == "rows" else -(-down // 2) * across
        return -(-pairs // (blocks // 2)) * (cut.width + END_OF_TILE), -cut.width

    return min((cut for cut in CUTS if cut.shared == ("rows" if down == 1 else "weights")), key=work)


def gated_matmul(x: jax.Array, gate_up: jax.Array) -> jax.Array:
    """See api.gated_matmul."""
    refuse(x, gate_up)
    rows = x.shape[0]
    multiplied = ROWS if rows <= ROWS else -(-rows // (2 * ROWS)) * 2 * ROWS
    if rows < FEWEST_ROWS or (rows > ROWS and multiplied > MOST_PADDING * rows):
        raise NotImplementedError(f"XLA's product of {rows} rows is as fast as one of {multiplied}")
    return _run(x, gate_up)


def refuse(x: jax.Array, gate_up: jax.Array) -> None:
    """NotImplementedError for what the kernel does not do."""
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"operands must be bfloat16, got {x.dtype}")
    if x.shape[1] % DEPTH or gate_up.shape[0] % 16:
        raise NotImplementedError(
            f"D must be a multiple of {DEPTH} and F of 8, got {x.shape[1]}, {gate_up.shape[0] // 2}"
        )


@jax.custom_vjp
def _run(x: jax.Array, gate_up: jax.Array) -> jax.Array:
    register(library())
    blocks = getattr(jax.devices()[0], "core_count", 132)
    return call(TARGET, blocks, x, gate_up, cut_for(x.shape[0], gate_up.shape[0] // 2, blocks))


def _forward(x: jax.Array, gate_up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _run(x, gate_up), (x, gate_up)


def _backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(reference.gated_matmul, *saved)[1](gradient)


_run.defvjp(_forward, _backward)


def call(target: str, blocks: int, x: jax.Array, gate_up: jax.Array, cut: Cut) -> jax.Array:
    """The FFI call."""
    out = jax.ShapeDtypeStruct((x.shape[0], gate_up.shape[0] // 2), x.dtype)
    numbers = {"width": cut.width, "shared": SHARED.index(cut.shared), "run": cut.run, "blocks": blocks}
    return jax.ffi.ffi_call(target, out)(x, gate_up, **{name: np.int64(number) for name, number in numbers.items()})
