"""Rotary position embedding: frequencies of each scaling kind.

In: a RopeConfig and positions. Out: f32 cosines and sines, made once a step and shared by all layers. The formulas are
those of the papers and of transformers: linear (position interpolation), llama3 (by wavelength), yarn (by rotations
over the original context, with a temperature that multiplies cosines and sines).
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.graph.models.config import RopeConfig


def frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Radians a position for each pair, f32[H/2], and the factor that multiplies cosines and sines."""
    base = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scale = 1.0
    match rope.kind:
        case "default":
            freqs = base
        case "linear":
            freqs = base / rope.factor
        case "llama3":
            freqs = _llama3(rope, base)
        case "yarn":
            freqs, scale = _yarn(rope, base, head_dim), _yarn_scale(rope)
    return freqs.astype(np.float32), scale


def _llama3(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    """Long wavelengths stretched by `factor`, short ones kept, a smooth ramp between."""
    turns = rope.original_context_length * base / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = np.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0)
    return (1 - keep) * base / rope.factor + keep * base


def _yarn(rope: RopeConfig, base: np.ndarray, head_dim: int) -> np.ndarray:
    """Pairs that turn often keep their frequency, those that turn rarely are stretched, a ramp over pairs between."""

    def pair_with_turns(turns: float) -> float:
        return head_dim * math.log(rope.original_context_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    stretch = np.clip((np.arange(head_dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
    return base / rope.factor * stretch + base * (1 - stretch)


def _yarn_scale(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def temperature(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


def rotations(
    positions: Int[Array, "*lead"], rope: RopeConfig, head_dim: int
) -> tuple[Float[Array, "... h"], Float[Array, "... h"]]:
    """Cosines and sines, f32[..., H/2]."""
    freqs, scale = frequencies(rope, head_dim)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(freqs)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale
