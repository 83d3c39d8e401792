"""Named shapes of the gated product, shared by tests: real models' and ones small enough for an interpreter.

In: a spec's name. Out: numpy inputs. This module knows no implementation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class GatedSpec:
    """T rows, D model, F ffn."""

    name: str
    T: int
    D: int
    F: int
    dtype: str = "bfloat16"

    def inputs(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """x[T, D], gate_up[2F, D]."""
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((self.T, self.D), np.float32)
        gate_up = rng.standard_normal((2 * self.F, self.D), np.float32) * self.D**-0.5
        return x.astype(jnp.dtype(self.dtype)), gate_up.astype(jnp.dtype(self.dtype))


_SMALL = GatedSpec("small", T=100, D=128, F=256)
_LLAMA = GatedSpec("llama_3_1_8b", T=1, D=4096, F=14336)
_QWEN = GatedSpec("qwen3_0_6b", T=1, D=1024, F=3072)

GATED_SPECS = (
    _SMALL,
    replace(_SMALL, name="small_one_row", T=1),
    replace(_SMALL, name="small_two_tiles", T=130),
    replace(_SMALL, name="small_three_tiles", T=300, F=136),
    replace(_SMALL, name="small_odd_columns", T=257, D=64, F=232),
    replace(_SMALL, name="small_deep", T=33, D=832, F=72),
    replace(_SMALL, name="small_f32", T=9, dtype="float32"),
    replace(_SMALL, name="small_odd_depth", T=9, D=72),
    replace(_SMALL, name="small_odd_ffn", T=9, F=20),
)
REAL_GATED_SPECS = tuple(
    replace(spec, name=f"{spec.name}_{T}", T=T) for spec in (_LLAMA, _QWEN) for T in (65, 128, 225, 256, 1024, 2047)
)
