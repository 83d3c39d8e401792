"""Sums that decode steps of known models make: rows x width of the residual stream, by devices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    name: str
    ranks: int
    shape: tuple[int, ...]
    dtype: str = "bfloat16"


ALL_REDUCE_SPECS = tuple(
    Spec(f"{model} tp{ranks} batch {rows}", ranks, (rows, width), dtype)
    for model, width, dtype in (
        ("llama-8b", 4096, "bfloat16"),
        ("llama-70b", 8192, "bfloat16"),
        ("first-light", 384, "float32"),
    )
    for ranks in (2, 4, 8)
    for rows in (1, 2, 3, 32, 128)
)
