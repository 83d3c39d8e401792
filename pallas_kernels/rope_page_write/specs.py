"""Named shapes of rope_page_write, shared by tests and benchmarks: head layouts of real models, odd numbers of tokens.

In: a spec's name. Out: numpy inputs: heads, pages full of old bits, distinct slots with some dropped. This module knows
no implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from pallas_kernels.rope_page_write.heads import Heads


@dataclass(frozen=True)
class RopePageWriteSpec:
    name: str
    N: int
    K: int
    H: int
    T: int
    P: int = 24
    page_size: int = 16
    dropped: int = 0  # tokens whose slot lies outside the pages
    norms: bool = False
    parts: int = 0
    bias: bool = False
    amplitude: float = 1.0  # of cosines and sines: yarn's temperature
    dtype: str = "bfloat16"

    def heads(self, seed: int = 0) -> Heads:
        rng = np.random.default_rng(seed)
        dtype, rows = jnp.dtype(self.dtype), (self.N + 2 * self.K) * self.H
        angles = rng.uniform(0, 2 * np.pi, (self.T, self.H // 2))
        cos, sin = (np.asarray(self.amplitude * f(angles), np.float32) for f in (np.cos, np.sin))
        lead = (self.parts,) if self.parts else ()
        qkv = rng.standard_normal((*lead, self.T, rows)).astype(np.float32 if self.parts else dtype)
        norms = rng.uniform(0.5, 1.5, (2, self.H)).astype(dtype) if self.norms else None
        bias = rng.standard_normal(rows).astype(dtype) if self.bias else None
        arrays = (None if array is None else jnp.asarray(array) for array in (qkv, cos, sin, norms, bias))
        return Heads(*arrays, K=self.K, dtype=dtype)  # type: ignore[arg-type]

    def inputs(self, seed: int = 0) -> tuple[Heads, np.ndarray, np.ndarray, np.ndarray]:
        """heads, k_pages, v_pages, slots."""
        rng = np.random.default_rng(seed)
        size, shape = self.P * self.page_size, (self.P, self.K, self.page_size, self.H)
        pools = [rng.standard_normal(shape).astype(jnp.dtype(self.dtype)) for _ in range(2)]
        for pool in pools:
            pool[rng.integers(0, self.P, 3)] = np.nan  # unwritten memory
        slots = rng.permutation(size)[: self.T].astype(np.int32)
        outside = rng.choice(np.array([-1, -size, size, size + 7, 2**31 - 1], np.int32), self.dropped)
        slots[rng.permutation(self.T)[: self.dropped]] = outside
        return self.heads(seed), pools[0], pools[1], slots


ROPE_PAGE_WRITE_SPECS = (
    RopePageWriteSpec("llama_3_1_8b_decode", N=32, K=8, H=128, T=7, dropped=2),
    RopePageWriteSpec("llama_3_1_8b_parts", N=32, K=8, H=128, T=1, parts=4),
    RopePageWriteSpec("llama_3_1_8b_prefill", N=32, K=8, H=128, T=100, P=12, dropped=13),
    RopePageWriteSpec("llama_3_1_8b_f32", N=32, K=8, H=128, T=9, dtype="float32"),
    RopePageWriteSpec("qwen3_0_6b", N=16, K=8, H=128, T=33, norms=True),
    RopePageWriteSpec("qwen3_0_6b_parts", N=16, K=8, H=128, T=3, norms=True, parts=8, page_size=64, P=2),
    RopePageWriteSpec("qwen3_0_6b_f32", N=16, K=8, H=128, T=5, norms=True, dtype="float32"),
    RopePageWriteSpec("qwen2_7b_parts_and_bias", N=28, K=4, H=128, T=6, parts=2, bias=True),
    RopePageWriteSpec("yarn_amplitude", N=4, K=2, H=64, T=20, amplitude=1.2, P=4),
    RopePageWriteSpec("head_dim_80_mha", N=4, K=4, H=80, T=18, norms=True, P=4, page_size=12),
    RopePageWriteSpec("all_dropped", N=4, K=1, H=32, T=5, dropped=5),
)
