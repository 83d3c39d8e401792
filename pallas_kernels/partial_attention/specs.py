"""Partial attention as context parallelism asks for it: heads of known models, from no visible key to several pages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    visible: tuple[int, ...]  # of each query
    rows: tuple[int, ...]


PARTIAL_ATTENTION_SPECS = (
    Spec("llama-8b over 4, decode", 8, 2, 128, 16, (0, 1, 16, 47), (0, 1, 2, 3)),
    Spec("first-light, a chunk", 6, 2, 64, 8, (0, 0, 3, 4, 4, 4, 9), (0, 0, 0, 0, 0, 0, 1)),
    Spec("one head, many keys", 1, 1, 32, 64, (700, 300, 0), (1, 0, 1)),
)
