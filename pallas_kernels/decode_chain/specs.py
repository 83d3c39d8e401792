"""Named shapes of the chain, shared by tests and benchmarks: real models' and ones small enough for an interpreter.

In: a spec's name. Out: numpy inputs. This module knows no implementation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

EPS = 1e-5


@dataclass(frozen=True)
class ChainSpec:
    """T rows, D model, O attention's output, F ffn, Q the next qkv (0 = the last layer)."""

    name: str
    T: int
    D: int
    O: int  # noqa: E741
    F: int
    Q: int
    biases: bool = False
    dtype: str = "bfloat16"

    def inputs(self, seed: int = 0) -> dict[str, np.ndarray | None]:
        """x, mixed, then the weights by name; None for what this spec has not."""
        rng = np.random.default_rng(seed)

        def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
            return (rng.standard_normal(shape, np.float32) * scale + shift).astype(jnp.dtype(self.dtype))

        D, O, F, Q = self.D, self.O, self.F, self.Q  # noqa: E741
        return {
            "x": normal(self.T, D),
            "mixed": normal(self.T, O),
            "o": normal(D, O, scale=O**-0.5),
            "norms": normal(2, D, scale=0.1, shift=1.0),
            "gate_up": normal(2 * F, D, scale=D**-0.5),
            "down": normal(D, F, scale=F**-0.5),
            "o_bias": normal(D) if self.biases else None,
            "next_norms": normal(2, D, scale=0.1, shift=1.0) if Q else None,
            "next_qkv": normal(Q, D, scale=D**-0.5) if Q else None,
            "next_bias": normal(Q) if self.biases and Q else None,
        }


_SMALL = ChainSpec("small", T=8, D=256, O=128, F=192, Q=384)
_LLAMA = ChainSpec("llama_3_1_8b", T=1, D=4096, O=4096, F=14336, Q=6144)
_QWEN = ChainSpec("qwen3_0_6b", T=1, D=1024, O=2048, F=3072, Q=4096)

CHAIN_SPECS = (
    _SMALL,
    replace(_SMALL, name="small_one_row", T=1),
    replace(_SMALL, name="small_biases_odd_rows", T=11, biases=True),
    replace(_SMALL, name="small_last_layer", Q=0),
    replace(_SMALL, name="small_f32", T=3, dtype="float32"),
    replace(_SMALL, name="small_50_rows", T=50),
    replace(_SMALL, name="small_96_rows", T=96),
    replace(_SMALL, name="small_127_rows", T=127),
    replace(_SMALL, name="small_wide", T=5, D=128, F=704),
    replace(_SMALL, name="small_deep", T=19, D=256, O=256, F=320, Q=128),
    replace(_SMALL, name="small_192_rows", T=192, D=128, F=128, biases=True),
    replace(_SMALL, name="small_256_rows", T=256, D=128, F=128, Q=192),
    replace(_SMALL, name="small_wide_qkv", T=3, D=128, F=64, Q=4224),
    replace(_SMALL, name="small_too_many_rows", T=257),
)
REAL_CHAIN_SPECS = tuple(
    replace(spec, name=f"{spec.name}_{T}", T=T) for spec in (_LLAMA, _QWEN) for T in (1, 32, 64, 96, 128, 192, 256)
)
