"""Named shapes of routed experts, shared by tests and benchmarks: models' shapes, skewed and empty groups.

In: a spec's name. Out: numpy inputs. This module knows no implementation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import ml_dtypes
import numpy as np

Routing = Literal["random", "one_expert_hot", "few_experts", "half_elsewhere", "all_elsewhere"]


@dataclass(frozen=True)
class RoutedSpec:
    name: str
    T: int
    D: int
    F: int
    E: int
    k: int
    routing: Routing = "random"
    dtype: str = "bfloat16"

    def inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """x, gate_up, down, expert_ids, expert_weights."""
        rng = np.random.default_rng(seed)
        dtype = np.dtype(ml_dtypes.bfloat16) if self.dtype == "bfloat16" else np.dtype(self.dtype)

        def normal(*shape: int) -> np.ndarray:
            return (rng.standard_normal(shape, np.float32) / np.sqrt(np.float32(shape[-1]))).astype(dtype)

        x = rng.standard_normal((self.T, self.D), np.float32).astype(dtype)
        weights = rng.random((self.T, self.k), np.float32)
        weights = weights / weights.sum(axis=1, keepdims=True)
        return x, normal(self.E, 2 * self.F, self.D), normal(self.E, self.D, self.F), self._ids(rng), weights

    def _ids(self, rng: np.random.Generator) -> np.ndarray:
        """Distinct experts a token, i32[T, k]."""
        order = rng.random((self.T, self.E))
        if self.routing == "one_expert_hot":
            order[:, self.E // 2] = -1
        if self.routing == "few_experts":
            order[:, : self.k] -= 1
        ids = np.argsort(order, axis=1)[:, : self.k].astype(np.int32)
        if self.routing == "half_elsewhere":
            ids -= self.E // 2
        if self.routing == "all_elsewhere":
            ids += self.E
        return ids


_TINY = RoutedSpec("tiny", T=5, D=64, F=64, E=6, k=2)
ROUTED_SPECS = (
    _TINY,
    replace(_TINY, name="tiny_f32", dtype="float32"),
    RoutedSpec("one_token", T=1, D=128, F=64, E=8, k=4),
    RoutedSpec("one_token_half_elsewhere", T=1, D=128, F=64, E=8, k=4, routing="half_elsewhere"),
    RoutedSpec("one_choice", T=9, D=128, F=128, E=4, k=1),
    RoutedSpec("sorted", T=50, D=128, F=64, E=8, k=2),
    RoutedSpec("sorted_one_expert_hot", T=40, D=128, F=64, E=8, k=2, routing="one_expert_hot"),
    RoutedSpec("sorted_empty_experts", T=40, D=128, F=64, E=16, k=2, routing="few_experts"),
    RoutedSpec("sorted_half_elsewhere", T=40, D=128, F=64, E=8, k=2, routing="half_elsewhere"),
    RoutedSpec("all_elsewhere", T=3, D=128, F=64, E=4, k=2, routing="all_elsewhere"),
)
# As large as models are: on the GPU only.
LARGE_SPECS = (
    RoutedSpec("qwen3_30b_a3b_1", T=1, D=2048, F=768, E=128, k=8),
    RoutedSpec("qwen3_30b_a3b_8", T=8, D=2048, F=768, E=128, k=8),
    RoutedSpec("qwen3_30b_a3b_200", T=200, D=2048, F=768, E=128, k=8),
    RoutedSpec("qwen3_30b_a3b_300_hot", T=300, D=2048, F=768, E=128, k=8, routing="one_expert_hot"),
    RoutedSpec("qwen3_30b_a3b_2000", T=2000, D=2048, F=768, E=128, k=8),
    RoutedSpec("qwen3_30b_a3b_2000_a_quarter_of_each_expert", T=2000, D=2048, F=192, E=128, k=8),
    RoutedSpec("qwen2_moe_a2_7b_33", T=33, D=2048, F=1408, E=60, k=4),
    RoutedSpec("mixtral_small_130", T=130, D=1024, F=3584, E=8, k=2),
)
