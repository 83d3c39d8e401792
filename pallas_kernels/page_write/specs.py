"""Named shapes of page_write, shared by tests and benchmarks.

In: a spec's name. Out: numpy inputs: pages full of old bits, tokens, distinct slots with some dropped. This module
knows no implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class PageWriteSpec:
    name: str
    K: int
    H: int
    T: int
    P: int = 24
    page_size: int = 16
    dropped: int = 0  # tokens whose slot lies outside the pages
    dtype: str = "bfloat16"
    token_dtype: str | None = None  # the pages' unless given

    def inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """k_pages, v_pages, k, v, slots."""
        rng = np.random.default_rng(seed)
        size = self.P * self.page_size
        shape, dtype = (self.P, self.K, self.page_size, self.H), jnp.dtype(self.dtype)
        pools = [rng.standard_normal(shape).astype(dtype) for _ in range(2)]
        for pool in pools:
            pool[rng.integers(0, self.P, 3)] = np.nan  # unwritten memory
        tokens = [
            rng.standard_normal((self.T, self.K, self.H)).astype(jnp.dtype(self.token_dtype or self.dtype))
            for _ in range(2)
        ]
        slots = rng.permutation(size)[: self.T].astype(np.int32)
        outside = rng.choice(np.array([-1, -size, size, size + 7, 2**31 - 1], np.int32), self.dropped)
        slots[rng.permutation(self.T)[: self.dropped]] = outside
        return *pools, *tokens, slots


PAGE_WRITE_SPECS = (
    PageWriteSpec("llama_3_1_8b_decode", K=8, H=128, T=7, dropped=2),
    PageWriteSpec("llama_3_1_8b_prefill", K=8, H=128, T=200, dropped=13),
    PageWriteSpec("llama_3_1_8b_page_64", K=8, H=128, T=100, P=6, page_size=64),
    PageWriteSpec("qwen3_0_6b_f32", K=8, H=128, T=33, dtype="float32"),
    PageWriteSpec("mqa", K=1, H=64, T=50, dropped=1),
    PageWriteSpec("f32_tokens_into_bf16_pages", K=2, H=32, T=20, token_dtype="float32"),
    PageWriteSpec("one_token", K=2, H=32, T=1, dtype="float32"),
    PageWriteSpec("all_dropped", K=2, H=32, T=5, dropped=5),
    PageWriteSpec("every_slot", K=2, H=32, T=48, P=4, page_size=12, dtype="float32"),
)
