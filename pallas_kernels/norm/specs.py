"""Named shapes of the norm op, shared by tests and benchmarks: widths of real models, whole products and parts.

In: a spec's name. Out: numpy inputs. This module knows no implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class AddNormSpec:
    name: str
    T: int
    D: int
    parts: int = 0
    which: int = 1
    dtype: str = "bfloat16"
    eps: float = 1e-5

    def inputs(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, delta, weights."""
        rng, dtype = np.random.default_rng(seed), jnp.dtype(self.dtype)
        x = rng.standard_normal((self.T, self.D)).astype(dtype)
        lead = (self.parts,) if self.parts else ()
        delta = rng.standard_normal((*lead, self.T, self.D)).astype(np.float32 if self.parts else dtype)
        return x, delta, rng.uniform(0.5, 1.5, (2, self.D)).astype(dtype)


ADD_NORM_SPECS = (
    AddNormSpec("llama_3_1_8b_one_row", T=1, D=4096),
    AddNormSpec("llama_3_1_8b_parts", T=9, D=4096, parts=8),
    AddNormSpec("qwen3_0_6b_parts", T=3, D=1024, parts=2, which=0),
    AddNormSpec("several_rows_whole", T=5, D=1024),
    AddNormSpec("odd_width", T=2, D=896, parts=3),
    AddNormSpec("f32", T=2, D=384, dtype="float32"),
)
