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


@dataclass(frozen=True)
class AdjustSpec:
    """What rows ask to be changed about their logits: row b takes what its number has bits for."""

    name: str
    B: int
    V: int
    entries: int = 5  # of biases

    def inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """logits, counts, row, mask, bias_ids, bias, repetition, frequency, presence."""
        rng = np.random.default_rng(seed)
        logits = (rng.standard_normal((self.B, self.V)) * 3).astype(np.float32)
        counts = rng.integers(0, 4, (self.B + 1, self.V)).astype(np.uint16)
        counts |= (rng.random(counts.shape) < 0.1).astype(np.uint16) << np.uint16(15)
        row = rng.permutation(self.B + 1)[: self.B].astype(np.int32)
        masked, biased, penalised = (np.arange(self.B) >> bit & 1 == 1 for bit in range(3))
        words = rng.integers(0, 2**32, (self.B, -(-self.V // 32)), dtype=np.uint32)
        words[~masked] = 2**32 - 1
        entries = min(self.entries, self.V)
        ids = np.stack([rng.permutation(self.V)[:entries] for _ in range(self.B)]).astype(np.int32)
        ids[~biased] = self.V
        ids[:, -1] = self.V  # an entry nobody uses
        bias = (rng.standard_normal(ids.shape) * 20).astype(np.float32)
        one = np.ones(self.B, np.float32)
        some = np.where(penalised, np.float32(1), np.float32(0))
        penalties = one + some * np.float32(0.25), some * np.float32(0.5), some * np.float32(-0.75)
        return logits, counts, row, words, ids, bias, *penalties


ADJUST_SPECS = (
    AdjustSpec("llama_3_1_8b", B=8, V=128256, entries=300),
    AdjustSpec("bundled", B=8, V=8192),
    AdjustSpec("odd_vocabulary", B=9, V=257),
    AdjustSpec("two_tokens", B=8, V=2, entries=2),
)
