"""How a plain weight becomes a quantised one when a model is loaded, and which of a model's weights do.

In: a bf16 (f16, f32) weight [O, I] on its device. Out: a leaf of leaf.py. One small program a distinct shape, so a
model is quantised tensor by tensor as it streams in. Embeddings and norms stay as they are; a tied head is the
embedding and stays too. With int4 the head becomes int8: four bits there cost the most and save the least.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxllm.config import ConfigError, ModelSource
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import Params
from jaxllm.graph.quant.leaf import Fp8Weight, Int4Weight, Int8Weight, QuantisedWeight

Path = tuple[str | int, ...]
Kind = Literal["none", "int8", "int4", "fp8"]
MATRICES = ("qkv", "o", "gate_up", "down")
E4M3_MAX = 448.0
SMALLEST_SCALE = 1e-30
# |W - quantised W| / |W|: normal weights lose 0.7% (int8), 2.6% (fp8), 8 to 11% (int4). Twice that means that a few
# weights far from the others took the scale of all, or that something is not a number.
MOST_LOST = 0.2
# Shares of a group's largest weight that int4's scale may end at; the one that hurts least is taken.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


@dataclass(frozen=True)
class Scheme:
    """What `model.quantization` and `model.quantization_group` ask for."""

    kind: Kind = "none"
    group: int = 128  # int4: inputs that share a scale

    def check(self, config: ModelConfig) -> None:
        """ConfigError, with the figure, where the scheme does not fit the model."""
        if self.kind != "none" and config.stored is not None:
            raise ConfigError(
                f'model.quantization = "{self.kind}": the checkpoint is quantised already ({config.stored.method}); '
                'leave it at "none"'
            )
        if self.kind != "int4":
            return
        widths = {
            "d_model": config.d_model,
            "num_heads * head_dim": config.num_heads * config.head_dim,
            "d_ff": config.d_ff,
        }
        for name, width in widths.items():
            if width % self.group:
                fits = [str(group) for group in (128, 64, 32) if width % group == 0]
                instead = f"quantization_group = {fits[0]}" if fits else 'quantization = "int8"'
                raise ConfigError(
                    f"model.quantization_group = {self.group}: does not divide {name} = {width}; use {instead}"
                )

    def leaf(self, path: Path, weight: jax.Array) -> jax.Array | QuantisedWeight:
        """The leaf to keep at this path of the parameter tree."""
        name = path[-1]
        if self.kind == "none" or weight.ndim != 2 or name not in (*MATRICES, "head"):
            return weight
        if self.kind == "fp8":
            return to_fp8(weight)
        return to_int4(weight, self.group) if self.kind == "int4" and name != "head" else to_int8(weight)

    def shapes(self, params: Params) -> Params:
        """The same tree of ShapeDtypeStructs with its matrices quantised."""
        return jax.tree.map_with_path(
            lambda path, leaf: jax.eval_shape(functools.partial(self.leaf, tuple(part.key for part in path)), leaf),
            params,
        )


def complaint(path: Path, weight: jax.Array, leaf: jax.Array | QuantisedWeight) -> str | None:
    """Why this weight must not be quantised so, with the figure; None where all is well."""
    if not isinstance(leaf, QuantisedWeight) or (lost := float(lost_share(weight, leaf))) <= MOST_LOST:
        return None
    return (
        f"{'.'.join(map(str, path))}: quantised, it would lose {lost:.1%} of its size, more than {MOST_LOST:.0%}; "
        'choose quantization = "int8" or "none"'
    )


PLAIN = Scheme()


def quantisation(source: ModelSource) -> Scheme:
    kind: Any = source.quantization  # one of Kind: config checks it
    return Scheme(kind, source.quantization_group)


@jax.jit
def lost_share(weight: jax.Array, made: QuantisedWeight) -> jax.Array:
    """|W - quantised W| / |W|."""
    wide = weight.astype(jnp.float32)
    size = jnp.linalg.norm(wide)
    return jnp.linalg.norm(wide - made.widened()) / jnp.where(size == 0, 1.0, size)


@jax.jit
def to_int8(weight: jax.Array) -> Int8Weight:
    """Round to nearest, one scale an output."""
    wide = weight.astype(jnp.float32)
    scale = _positive(jnp.abs(wide).max(axis=1)) / 127.0
    return Int8Weight.of(jnp.round(wide / scale[:, None]).astype(jnp.int8), scale)


@functools.partial(jax.jit, static_argnames="group")
def to_int4(weight: jax.Array, group: int) -> Int4Weight:
    """Round to nearest, signed, with the clip of each group that gives the least squared error."""
    outputs, inputs = weight.shape
    wide = weight.astype(jnp.float32).reshape(outputs, inputs // group, group)
    # The largest weight by size takes -8: one level more than 7 on the other side.
    signed = jnp.take_along_axis(wide, jnp.abs(wide).argmax(axis=2, keepdims=True), axis=2)[:, :, 0]
    best, error = None, None
    for clip in CLIPS:
        scale = _nonzero(-signed * clip / 8.0).astype(jnp.bfloat16)
        q, wrong = _rounded(wide, scale)
        if best is None or error is None:
            best, error = (scale, q), wrong
            continue
        better = wrong < error
        best = jnp.where(better, scale, best[0]), jnp.where(better[:, :, None], q, best[1])
        error = jnp.minimum(wrong, error)
    assert best is not None
    scale, q = best
    return Int4Weight.of(q.reshape(outputs, inputs).astype(jnp.int8), scale.T)


def _rounded(wide: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    by_group = scale.astype(jnp.float32)[:, :, None]
    q = jnp.clip(jnp.round(wide / by_group), -8, 7)
    return q, jnp.square(wide - q * by_group).sum(axis=2)


@jax.jit
def to_fp8(weight: jax.Array) -> Fp8Weight:
    """One scale an output."""
    wide = weight.astype(jnp.float32)
    scale = _positive(jnp.abs(wide).max(axis=1)) / E4M3_MAX
    return Fp8Weight.of((wide / scale[:, None]).astype(jnp.float8_e4m3fn), scale)


def _positive(highest: jax.Array) -> jax.Array:
    return jnp.where(highest > 0, highest, 1.0)


def _nonzero(scale: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(scale) > SMALLEST_SCALE, scale, 1.0)
