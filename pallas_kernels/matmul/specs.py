"""Named shapes of small products, shared by tests and benchmarks. This module knows no implementation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class MatmulSpec:
    """T rows, `ins` deep, `outs` columns."""

    name: str
    T: int
    ins: int
    outs: int
    bias: bool = False
    dtype: str = "bfloat16"

    def inputs(self, seed: int = 0) -> tuple[np.ndarray | None, ...]:
        """x, weight, bias or None."""
        rng, dtype = np.random.default_rng(seed), jnp.dtype(self.dtype)
        x = rng.standard_normal((self.T, self.ins), np.float32).astype(dtype)
        weight = (rng.standard_normal((self.outs, self.ins), np.float32) * self.ins**-0.5).astype(dtype)
        return x, weight, rng.standard_normal(self.outs, np.float32).astype(dtype) if self.bias else None


_SMALL = MatmulSpec("small", T=8, ins=192, outs=256)
MATMUL_SPECS = (
    replace(_SMALL, bias=True),
    replace(_SMALL, name="small_odd_rows", T=19),
    replace(_SMALL, name="small_f32", dtype="float32"),
)
REAL_MATMUL_SPECS = tuple(
    MatmulSpec(f"{ins}_to_{outs}_of_{T}", T=T, ins=ins, outs=outs)
    for ins, outs in ((4096, 4096), (4096, 6144), (14336, 4096), (1024, 4096), (3072, 1024))
    for T in (1, 32, 128)
)
