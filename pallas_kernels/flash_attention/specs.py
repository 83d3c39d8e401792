"""Named shapes of attention over packed sequences, shared by tests and benchmarks: the paged specs, unpaged.

In: a spec's name. Out: numpy inputs whose memory between and after rows is NaN. This module knows no implementation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.specs import PagedAttentionSpec


@dataclass(frozen=True)
class FlashAttentionSpec:
    """`heads.rows` holds (queries, keys) of each row; `align` is what rows of keys start at multiples of."""

    heads: PagedAttentionSpec
    align: int = 1

    @property
    def name(self) -> str:
        return self.heads.name

    @property
    def options(self) -> dict[str, Any]:
        return self.heads.options

    def inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """q, k, v, query_starts, key_starts. With an alignment, a row ends in keys of nobody."""
        heads, rng = self.heads, np.random.default_rng(seed)
        dtype = jnp.dtype(heads.dtype)
        counts, lengths = (np.array(column) for column in zip(*heads.rows, strict=True))
        ends = np.cumsum(-(-lengths // self.align) * self.align)
        if self.align > 1 and (lengths % self.align)[:-1].any():
            raise ValueError(f"{self.name}: key_starts are also ends: only the last row may have an odd length")
        keys = [np.full((int(ends[-1]) + 5, heads.K, heads.H), np.nan, dtype) for _ in range(2)]
        total = int(lengths.sum())
        for each in keys:
            each[:total] = rng.standard_normal((total, heads.K, heads.H)).astype(dtype)
        q = rng.standard_normal((int(counts.sum()) + heads.padding_tokens, heads.N, heads.H)).astype(dtype)
        starts = [np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32) for sizes in (counts, lengths)]
        return q, *keys, *starts


_SMALL = PagedAttentionSpec("gqa", N=4, K=2, H=64, rows=((30, 130), (0, 0), (3, 3), (0, 9), (20, 141)))

FLASH_ATTENTION_SPECS = (
    FlashAttentionSpec(replace(_SMALL, padding_tokens=3)),
    FlashAttentionSpec(replace(_SMALL, name="aligned_mqa_sinks", K=1, rows=((40, 136), (17, 17)), with_sinks=True), 8),
    FlashAttentionSpec(replace(_SMALL, name="window_cap_96", N=2, H=96, rows=((33, 290),), window=70, soft_cap=2.0)),
    FlashAttentionSpec(replace(_SMALL, name="mha_f32", K=4, dtype="float32", rows=((50, 50), (1, 300)))),
)
