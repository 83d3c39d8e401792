"""Named shapes of quantised products, shared by tests and benchmarks: odd numbers of rows, every scheme of scales.

In: a spec's name. Out: numpy inputs as the ops take them, and the weight they stand for in float64. This module knows
no implementation. N and K are small enough for a CPU; the layers of real models are in `LAYERS`, for benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.quant_matmul import packing

# K, N of Llama-3.1-8B: gate_up, down, qkv, head.
LAYERS = {"gate_up": (4096, 28672), "down": (14336, 4096), "qkv": (4096, 6144), "head": (4096, 128256)}


@dataclass(frozen=True)
class QuantMatmulSpec:
    """One product. `group` is of int4 (inputs a scale) or fp8 (128: blocks); None is one scale an output."""

    name: str
    kind: str  # int8, int4, fp8
    M: int
    N: int
    K: int
    group: int | None = None
    zeros: bool = False
    x_scale: bool = False  # fp8: a fixed scale of the activations
    dtype: str = "bfloat16"
    scale_dtype: str = "float32"

    def inputs(self, seed: int = 0) -> tuple[Any, ...]:
        """The op's positional arguments."""
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((self.M, self.K)).astype(jnp.dtype(self.dtype))
        if self.kind == "fp8":
            weight = (rng.standard_normal((self.N, self.K)) * 100).clip(-448, 448).astype(jnp.float8_e4m3fn)
            shape = (self.N,) if self.group is None else (self.K // 128, self.N)
            fixed = np.float32(4.5 / 448) if self.x_scale else None
            return x, weight, _scales(rng, shape, 0.01).astype(np.float32), fixed
        bits = 4 if self.kind == "int4" else 8
        low = 0 if self.zeros else -(2 ** (bits - 1))
        q = rng.integers(low, low + 2**bits, (self.N, self.K)).astype(np.int8)
        words = np.asarray(packing.pack(jnp.asarray(q), bits))
        if self.group is None:
            return x, words, _scales(rng, (self.N,), 0.01).astype(np.float32)
        shape = (self.K // self.group, self.N)
        scale = _scales(rng, shape, 0.1).astype(jnp.dtype(self.scale_dtype))
        zero = rng.integers(0, 16, shape).astype(scale.dtype) if self.zeros else None
        return x, words, scale, zero

    def weight(self, arrays: tuple[Any, ...]) -> np.ndarray:
        """f64[N, K] that the inputs stand for."""
        if self.kind == "fp8":
            wide, scale = arrays[1].astype(np.float64), arrays[2].astype(np.float64)
            return wide * (scale[:, None] if self.group is None else np.repeat(scale, 128, axis=0).T)
        bits = 4 if self.kind == "int4" else 8
        wide = np.asarray(packing.unpack(jnp.asarray(arrays[1]), bits, signed=not self.zeros), np.float64)
        if self.group is None:
            return wide * arrays[2].astype(np.float64)[:, None]
        if self.zeros:
            wide -= np.repeat(arrays[3].astype(np.float64), self.group, axis=0).T
        return wide * np.repeat(arrays[2].astype(np.float64), self.group, axis=0).T


def _scales(rng: np.random.Generator, shape: tuple[int, ...], size: float) -> np.ndarray:
    return size * (0.5 + rng.random(shape))


QUANT_MATMUL_SPECS = (
    QuantMatmulSpec("int8_one_row", "int8", M=1, N=256, K=512),
    QuantMatmulSpec("int8_odd_rows", "int8", M=13, N=192, K=384),
    QuantMatmulSpec("int8_f32", "int8", M=3, N=64, K=128, dtype="float32"),
    QuantMatmulSpec("int8_many_rows", "int8", M=200, N=128, K=256),
    QuantMatmulSpec("int4_g128", "int4", M=8, N=256, K=512, group=128, scale_dtype="bfloat16"),
    QuantMatmulSpec("int4_g64", "int4", M=5, N=128, K=384, group=64, scale_dtype="bfloat16"),
    QuantMatmulSpec("int4_g32_zeros", "int4", M=17, N=128, K=256, group=32, zeros=True, scale_dtype="float16"),
    QuantMatmulSpec("int4_g128_zeros", "int4", M=33, N=256, K=256, group=128, zeros=True, scale_dtype="float16"),
    QuantMatmulSpec("int4_f32", "int4", M=2, N=64, K=128, group=64, zeros=True, dtype="float32"),
    QuantMatmulSpec("int4_many_rows", "int4", M=130, N=128, K=256, group=128, scale_dtype="bfloat16"),
    QuantMatmulSpec("fp8_by_output", "fp8", M=7, N=256, K=512),
    QuantMatmulSpec("fp8_fixed_scale", "fp8", M=16, N=128, K=256, x_scale=True),
    QuantMatmulSpec("fp8_blocks", "fp8", M=9, N=128, K=512, group=128),
    QuantMatmulSpec("fp8_many_rows", "fp8", M=160, N=128, K=256, group=128),
)
