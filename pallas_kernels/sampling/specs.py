"""Named shapes of sampling, shared by tests and benchmarks: vocabularies of real models, mixed parameters.

In: a spec's name. Out: numpy inputs whose rows walk through every kind of parameter, alone and together. This module
knows no implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# (temperature, top_k, top_p, min_p), one a row, in turn
GREEDY = ((0.0, 0, 1.0, 0.0), (0.0, 5, 0.3, 0.5))
MIXED = (
    (1.0, 0, 1.0, 0.0),
    (0.0, 0, 1.0, 0.0),
    (0.7, 50, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (1.0, 0, 1.0, 0.05),
    (0.9, 40, 0.95, 0.02),
    (2.0, 1, 1.0, 0.0),
    (1.0, 0, 0.0, 0.0),
    (1e-6, 0, 1.0, 0.0),
    (1e-38, 3, 0.5, 0.0),
    (1.0, -1, 1.0, 1.0),
    (1.0, 2**31 - 1, 1e-9, 0.0),
)


@dataclass(frozen=True)
class SamplingSpec:
    name: str
    B: int
    V: int
    parameters: tuple[tuple[float, int, float, float], ...] = MIXED
    spread: float = 3.0  # standard deviation of the logits
    masked: float = 0.0  # share of tokens at -inf
    levels: int | None = None  # round logits to this many values a unit: ties

    def inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """logits, keys, temperature, top_k, top_p, min_p."""
        rng = np.random.default_rng(seed)
        logits = (rng.standard_normal((self.B, self.V)) * self.spread).astype(np.float32)
        if self.levels is not None:
            logits = np.round(logits * self.levels) / np.float32(self.levels)
        hidden = rng.random((self.B, self.V)) < self.masked
        hidden[np.arange(self.B), rng.integers(0, self.V, self.B)] = False
        logits[hidden] = -np.inf
        keys = rng.integers(0, 2**32, (self.B, 2), dtype=np.uint32)
        rows = [self.parameters[b % len(self.parameters)] for b in range(self.B)]
        temperature, top_k, top_p, min_p = (np.array(column) for column in zip(*rows, strict=True))
        return (
            logits,
            keys,
            temperature.astype(np.float32),
            top_k.astype(np.int32),
            top_p.astype(np.float32),
            min_p.astype(np.float32),
        )


SAMPLING_SPECS = (
    SamplingSpec("llama_3_1_8b", B=12, V=128256),
    SamplingSpec("qwen3_0_6b_flat", B=6, V=151936, spread=0.5, parameters=MIXED[:6]),
    SamplingSpec("bundled", B=36, V=8192),
    SamplingSpec("bundled_greedy", B=4, V=8192, parameters=GREEDY),
    SamplingSpec("masked_by_a_grammar", B=24, V=8192, masked=0.99),
    SamplingSpec("ties", B=24, V=1000, levels=2),
    SamplingSpec("steep", B=24, V=1000, spread=40.0),
    SamplingSpec("odd_vocabulary", B=13, V=257, masked=0.3),
    SamplingSpec("two_tokens", B=12, V=2),
    SamplingSpec("one_token", B=12, V=1),
)
