"""Named shapes of paged attention, shared by tests and benchmarks: head layouts of real models, awkward lengths.

In: a spec's name. Out: numpy inputs whose unused memory is as hostile as production's: NaN in every slot no row has
written, garbage in every page-table entry no row owns. This module knows no implementation. The numbers of rows and
pages are small enough for a CPU suite; heads, page sizes and lengths around block edges are real.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

POISON = (-1, -(2**31), 2**31 - 1, 10**6)


@dataclass(frozen=True)
class PagedAttentionSpec:
    """`rows` holds (queries, keys) of each row; for decode every row has one query, or none when it has no keys."""

    name: str
    N: int
    K: int
    H: int
    rows: tuple[tuple[int, int], ...]
    page_size: int = 16
    dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None  # tight ones: scores of random inputs are near 1
    with_sinks: bool = False
    padding_tokens: int = 0  # q rows after the last row's
    spare_width: int = 3  # page-table columns nobody needs

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.H)

    @property
    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"scale": self.scale, "window": self.window, "soft_cap": self.soft_cap}
        if self.with_sinks:
            options["sinks"] = np.linspace(-2, 4, self.N, dtype=np.float32)
        return options

    def inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """q, k_pages, v_pages, page_table, kv_lens, query_starts (decode takes all but the last)."""
        dtype = jnp.dtype(self.dtype)
        rng = np.random.default_rng(seed)
        counts, lengths = (np.array(column, np.int32) for column in zip(*self.rows, strict=True))
        needed = -(-lengths // self.page_size)
        P, W = int(needed.sum()) + 2, int(needed.max(initial=1)) + self.spare_width
        q = rng.standard_normal((int(counts.sum()) + self.padding_tokens, self.N, self.H)).astype(dtype)
        pools = [np.full((P, self.K, self.page_size, self.H), np.nan, dtype) for _ in range(2)]
        table = rng.choice(np.array(POISON, np.int32), (len(self.rows), W))
        owned = np.split(rng.permutation(P - 1)[: needed.sum()] + 1, np.cumsum(needed)[:-1])  # page 0 stays NaN
        for r, (length, pages) in enumerate(zip(lengths, owned, strict=True)):
            table[r, : len(pages)] = pages
            for j in range(length):
                for pool in pools:
                    written = rng.standard_normal((self.K, self.H))
                    pool[pages[j // self.page_size], :, j % self.page_size] = written.astype(dtype)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return q, *pools, table, lengths, starts


_LENGTHS = (1, 0, 255, 256, 257, 16, 17, 700)
_DECODE = tuple((min(length, 1), length) for length in _LENGTHS)
_RAGGED = ((1, 300), (0, 0), (40, 40), (0, 25), (16, 16), (33, 290), (1, 1), (17, 257))

_LLAMA = PagedAttentionSpec("llama_3_1_8b", N=32, K=8, H=128, rows=_RAGGED)
_QWEN = PagedAttentionSpec("qwen3_0_6b", N=16, K=8, H=128, rows=_RAGGED)
_MQA = PagedAttentionSpec("mqa", N=8, K=1, H=64, rows=_RAGGED)
_PHI_2 = PagedAttentionSpec("phi_2_head_dim_80", N=2, K=2, H=80, rows=((20, 150), (0, 0), (1, 20)))
_PHI_3 = PagedAttentionSpec("phi_3_head_dim_96", N=2, K=1, H=96, rows=((19, 150),), page_size=64)
_GPT_OSS = PagedAttentionSpec("gpt_oss_sinks", N=4, K=1, H=64, rows=((70, 250), (1, 5)), with_sinks=True)
_TINY = PagedAttentionSpec("tiny", N=4, K=2, H=32, rows=((5, 9), (1, 4), (3, 3)), page_size=4, dtype="float32")

PAGED_ATTENTION_SPECS = (
    replace(_LLAMA, padding_tokens=13),
    replace(_LLAMA, name="llama_3_1_8b_page_64", page_size=64),
    replace(_QWEN, name="qwen3_0_6b_f32", dtype="float32"),
    replace(_MQA, padding_tokens=1),
    replace(_MQA, name="mha_window", N=4, K=4, window=20),
    replace(_LLAMA, name="mistral_7b_window", window=100, rows=((1, 600), (40, 40), (64, 500), (5, 103))),
    replace(
        _QWEN, name="gemma_2_soft_cap_window", N=8, K=4, H=256, soft_cap=1.5, window=64, rows=(*_RAGGED[:5], (24, 150))
    ),
    replace(_PHI_2, padding_tokens=3),
    _PHI_3,
    replace(_GPT_OSS, window=128),
    replace(_TINY, name="tiny", padding_tokens=4),
    replace(_TINY, name="tiny_window_of_one", window=1),
    replace(_TINY, name="odd_page_size", page_size=12, rows=((7, 500), (1, 13))),
    replace(_TINY, name="all_rows_empty", rows=((0, 0), (0, 7)), padding_tokens=3),
    replace(_TINY, name="more_rows_than_tokens", rows=((1, 1), *((0, 0),) * 6, (1, 30))),
)
# The same paths with fewer heads, for interpreters that take seconds a kernel and half a second a tile and head; None:
# others have them (windows and several kv heads: gemma; 80 elements a head: as 96; sinks: asked for with denominators).
PAGED_ATTENTION_REDUCED: dict[str, PagedAttentionSpec | None] = {
    "mqa": replace(PAGED_ATTENTION_SPECS[3], name="mqa_of_3_heads", N=3),
    "mha_window": None,
    "gemma_2_soft_cap_window": replace(
        PAGED_ATTENTION_SPECS[6], name="gemma_2_of_4_heads", N=4, K=2, rows=((1, 300), (0, 0), (24, 150))
    ),
    "phi_2_head_dim_80": None,
    "gpt_oss_sinks": None,
}
PAGED_ATTENTION_DECODE_SPECS = (
    replace(_LLAMA, rows=_DECODE),
    replace(_LLAMA, name="llama_3_1_8b_page_64", page_size=64, rows=_DECODE),
    replace(_QWEN, name="qwen3_0_6b_f32", dtype="float32", rows=_DECODE),
    replace(_MQA, rows=_DECODE),
    replace(_MQA, name="mha_window", N=4, K=4, window=20, rows=_DECODE),
    replace(_LLAMA, name="mistral_7b_window", window=256, rows=((1, 600), (1, 256), (0, 0), (1, 257))),
    replace(_QWEN, name="gemma_2_soft_cap_window", N=8, K=4, H=256, soft_cap=1.5, window=64, rows=_DECODE[:5]),
    replace(_PHI_2, rows=_DECODE[:5]),
    replace(_PHI_3, rows=_DECODE[:3]),
    replace(_GPT_OSS, rows=((1, 600), (0, 0), (1, 70))),
    replace(_GPT_OSS, name="gpt_oss_sinks_window", N=16, K=2, window=128, rows=_DECODE[-3:]),
    replace(_TINY, rows=((1, 9), (1, 4), (0, 0))),
    replace(_TINY, name="tiny_window_of_one", window=1, rows=((1, 9), (1, 1))),
    replace(_TINY, name="odd_page_size", page_size=12, rows=((1, 500), (1, 13))),
    replace(_TINY, name="one_row", rows=((1, 1),)),
    replace(_TINY, name="all_rows_empty", rows=((0, 0), (0, 0))),
)
