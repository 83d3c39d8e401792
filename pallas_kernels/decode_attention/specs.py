"""Named shapes of decode_attention: those of paged decode, whose pages lack each row's last key and value.

In: a spec's name. Out: numpy inputs, unused memory as hostile as there. This module knows no implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pallas_kernels.paged_attention.specs import PagedAttentionSpec
from pallas_kernels.rope_page_write.heads import Heads
from pallas_kernels.rope_page_write.specs import RopePageWriteSpec

_LENGTHS = (1, 0, 16, 17, 512, 513, 700)


@dataclass(frozen=True)
class DecodeAttentionSpec:
    name: str
    N: int
    K: int
    H: int
    lengths: tuple[int, ...] = _LENGTHS
    page_size: int = 16
    window: int | None = None
    soft_cap: float | None = None
    norms: bool = False
    parts: int = 0
    bias: bool = False
    dtype: str = "bfloat16"

    @property
    def paged(self) -> PagedAttentionSpec:
        rows = tuple((min(length, 1), length) for length in self.lengths)
        named = self.name, self.N, self.K, self.H, rows, self.page_size, self.dtype
        return PagedAttentionSpec(*named, window=self.window, soft_cap=self.soft_cap)

    def inputs(self, seed: int = 0) -> tuple[Heads, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """heads, k_pages, v_pages, page_table, kv_lens."""
        _, *pools, table, lengths, _ = self.paged.inputs(seed)
        for row in np.flatnonzero(lengths):
            position = lengths[row] - 1
            for pool in pools:
                pool[table[row, position // self.page_size], :, position % self.page_size] = np.nan
        turned = RopePageWriteSpec(
            self.name,
            self.N,
            self.K,
            self.H,
            T=len(self.lengths),
            norms=self.norms,
            parts=self.parts,
            bias=self.bias,
            dtype=self.dtype,
        )
        return turned.heads(seed), pools[0], pools[1], table, lengths


DECODE_ATTENTION_SPECS = (
    DecodeAttentionSpec("llama_3_1_8b", N=32, K=8, H=128),
    DecodeAttentionSpec("llama_3_1_8b_parts", N=32, K=8, H=128, lengths=(70,), parts=4, page_size=64),
    DecodeAttentionSpec("qwen3_0_6b", N=16, K=8, H=128, lengths=(33, 0, 64), norms=True),
    DecodeAttentionSpec("qwen3_0_6b_f32", N=16, K=8, H=128, lengths=(33, 0, 64), norms=True, dtype="float32"),
    DecodeAttentionSpec("qwen2_7b_parts_and_bias", N=28, K=4, H=128, lengths=(5, 40), parts=2, bias=True),
    DecodeAttentionSpec("mistral_7b_window", N=32, K=8, H=128, lengths=(600, 1, 0), window=100),
    DecodeAttentionSpec("soft_cap_window_over_splits", N=8, K=4, H=64, soft_cap=1.5, window=600, norms=True),
    DecodeAttentionSpec("head_dim_80_mqa", N=4, K=1, H=80, page_size=12),
    DecodeAttentionSpec("all_rows_empty", N=4, K=2, H=32, lengths=(0, 0)),
)
