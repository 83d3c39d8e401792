"""Quantised weights as leaves of a parameter tree: what is stored, and the product that goes with it.

In: activations [..., I]. Out: [..., O], as a product with a plain weight [O, I] would give. A leaf is a dataclass
pytree, so a step takes it as it takes an array; whoever multiplies asks the leaf and never looks at a dtype. Sizes are
padded to what the kernels tile (outputs to 64, inputs to 128) with weights of zero, and cut or padded back here. A
leaf can say what a shard of a mesh holds of it, as a smaller leaf. Knows nothing of how the numbers were chosen.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxllm.graph.quant.cutting import INPUT_TILE, OUTPUT_TILE, Places, by_group, by_output, padded, values_of, words_of
from pallas_kernels.quant_matmul import api, packing, reference
from sharding.axes import MeshError

PACKED: Any = ("outputs", "inputs", None, None)

# Layers of one shape share one trace of these.
_int8 = jax.jit(api.int8_matmul, static_argnames=("out_dtype", "implementation"))
_int4 = jax.jit(api.int4_matmul, static_argnames=("out_dtype", "implementation"))
_fp8 = jax.jit(api.fp8_matmul, static_argnames=("out_dtype", "implementation"))


def _size() -> Any:
    return field(metadata={"static": True})


class QuantisedWeight(abc.ABC):
    """A weight [outputs, inputs] in few bits."""

    outputs: int
    inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def __getitem__(self, index: EllipsisType) -> Self:
        """A module reads its parameter as `parameter[...]`, whatever it holds."""
        if index is not ...:
            raise TypeError("a quantised weight is read whole")
        return self

    def project(self, x: Float[Array, "... I"], dtype: DTypeLike = jnp.float32) -> Float[Array, "... O"]:
        """x @ weight.T, summed in f32, cast to `dtype`."""
        flat = jnp.pad(x.reshape(-1, self.inputs), ((0, 0), (0, -self.inputs % INPUT_TILE)))
        product = self.multiply(flat, jnp.dtype(dtype))
        return product[:, : self.outputs].reshape(*x.shape[:-1], self.outputs)

    @abc.abstractmethod
    def multiply(self, x: Float[Array, "M K"], dtype: DTypeLike) -> Float[Array, "M N"]:
        """The product at padded sizes."""

    @abc.abstractmethod
    def widened(self) -> Float[Array, "O I"]:
        """The weight in f32: what it stands for."""

    @abc.abstractmethod
    def part(self, outputs: Places | None, inputs: Places | None, along: tuple[str, ...]) -> Self:
        """What one shard holds: these outputs, or these inputs with the others along mesh axes `along`; None: all.

        MeshError where the layout cannot be cut there.
        """

    @abc.abstractmethod
    def dims(self) -> Self:
        """In the place of each array, what its dims follow: "outputs", "inputs" or None."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Weight(QuantisedWeight):
    """W = scale * q, one scale an output."""

    words: jax.Array  # packed as packing.py says
    scale: jax.Array  # f32[N]
    outputs: int = _size()
    inputs: int = _size()

    @staticmethod
    def of(q: jax.Array, scale: jax.Array) -> Int8Weight:
        """q i8[O, I], scale f32[O]."""
        outputs, inputs = q.shape
        words = packing.pack(padded(q), 8)
        return Int8Weight(words, jnp.pad(scale, (0, -outputs % OUTPUT_TILE)), outputs, inputs)

    def multiply(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        return _int8(x, self.words, self.scale, out_dtype=dtype)

    def widened(self) -> jax.Array:
        wide = packing.unpack(self.words, 8).astype(jnp.float32) * self.scale[:, None]
        return wide[: self.outputs, : self.inputs]

    def part(self, outputs: Places | None, inputs: Places | None, along: tuple[str, ...]) -> Int8Weight:
        words, scale = words_of(self.words, 8, outputs, inputs), by_output(self.scale, outputs)
        return Int8Weight(words, scale, *_sizes(self, outputs, inputs))

    def dims(self) -> Any:
        return replace(self, words=PACKED, scale=("outputs",))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int4Weight(QuantisedWeight):
    """W = scale * (q - zero), a scale an output and group of inputs; without `zero`, q is signed.

    With `order`, stored input j is input order[j] of the weight: groups were drawn in another order (GPTQ's act-order).
    """

    words: jax.Array
    scale: jax.Array  # [K / group, N]
    zero: jax.Array | None
    order: jax.Array | None  # i32[I]
    outputs: int = _size()
    inputs: int = _size()

    @staticmethod
    def of(q: jax.Array, scale: jax.Array, zero: jax.Array | None = None, order: jax.Array | None = None) -> Int4Weight:
        """q i8[O, I]: -8..7, or 0..15 with zeros; scale and zero [I / group, O]."""
        outputs, inputs = q.shape
        words = packing.pack(padded(q), 4)
        group = inputs // scale.shape[0]
        more = ((0, -inputs % INPUT_TILE // group), (0, -outputs % OUTPUT_TILE))
        zeros = None if zero is None else jnp.pad(zero, more)
        return Int4Weight(words, jnp.pad(scale, more), zeros, order, outputs, inputs)

    def multiply(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        if self.order is not None:
            rest = jnp.arange(self.inputs, x.shape[1], dtype=jnp.int32)
            x = x[:, jnp.concatenate([self.order, rest])]
        return _int4(x, self.words, self.scale, self.zero, out_dtype=dtype)

    def widened(self) -> jax.Array:
        stored = reference.int4_weight(self.words, self.scale, self.zero)[: self.outputs, : self.inputs]
        return stored if self.order is None else jnp.zeros_like(stored).at[:, self.order].set(stored)

    def part(self, outputs: Places | None, inputs: Places | None, along: tuple[str, ...]) -> Int4Weight:
        if inputs is not None and self.order is not None:
            raise MeshError(
                "a quantised weight whose groups were drawn in another order of inputs (GPTQ's desc_act) cannot be cut "
                "along its inputs: a part would hold pieces of all groups; use a checkpoint without desc_act"
            )
        group = self.words.shape[1] * packing.TILE // self.scale.shape[0]

        def of(scale: jax.Array) -> jax.Array:
            mine = by_output(scale, outputs)
            return mine if inputs is None else by_group(mine, group, inputs, min(api.GROUPS))

        words, zero = words_of(self.words, 4, outputs, inputs), None if self.zero is None else of(self.zero)
        return Int4Weight(words, of(self.scale), zero, self.order, *_sizes(self, outputs, inputs))

    def dims(self) -> Any:
        grouped = "inputs", "outputs"
        zero, order = None if self.zero is None else grouped, None if self.order is None else (None,)
        return replace(self, words=PACKED, scale=grouped, zero=zero, order=order)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fp8Weight(QuantisedWeight):
    """W = scale * q in e4m3, a scale an output or an output and 128 inputs; activations are rounded to e4m3 too.

    `x_scale` is the activations' scale where a checkpoint fixed one; else each row (each 128 of a row) finds its own.
    """

    values: jax.Array  # e4m3[N, K]
    scale: jax.Array  # f32[N] or f32[K / 128, N]
    x_scale: jax.Array | None  # f32[]
    outputs: int = _size()
    inputs: int = _size()
    # Mesh axes along which the other inputs lie: a row's scale is that of all of the row, as on one device.
    along: tuple[str, ...] = field(default=(), metadata={"static": True})

    @staticmethod
    def of(values: jax.Array, scale: jax.Array, x_scale: jax.Array | None = None) -> Fp8Weight:
        """values e4m3[O, I], scale f32[O] or f32[ceil(I / 128), O]."""
        outputs, inputs = values.shape
        more = ((0, 0),) * (scale.ndim - 1) + ((0, -outputs % OUTPUT_TILE),)
        return Fp8Weight(padded(values), jnp.pad(scale, more), x_scale, outputs, inputs)

    def multiply(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        if not self.along or self.x_scale is not None or self.scale.ndim == 2:
            return _fp8(x, self.values, self.scale, self.x_scale, out_dtype=dtype)
        wide = x.astype(jnp.float32)
        highest = jax.lax.pmax(jnp.abs(wide).max(axis=1), self.along)
        row = jnp.where(highest > 0, highest, 1.0)[:, None] / reference.E4M3_MAX
        product = _fp8(wide / row, self.values, self.scale, jnp.float32(1), out_dtype=jnp.float32)
        return (product * row).astype(dtype)

    def widened(self) -> jax.Array:
        by_input = self.scale[:, None] if self.scale.ndim == 1 else jnp.repeat(self.scale, INPUT_TILE, axis=0).T
        return (self.values.astype(jnp.float32) * by_input)[: self.outputs, : self.inputs]

    def part(self, outputs: Places | None, inputs: Places | None, along: tuple[str, ...]) -> Fp8Weight:
        scale = by_output(self.scale, outputs)
        if inputs is not None and scale.ndim == 2:
            scale = by_group(scale, INPUT_TILE, inputs, INPUT_TILE)
        values = values_of(self.values[: self.outputs, : self.inputs], outputs, inputs)
        along = () if inputs is None else along
        return Fp8Weight(values, scale, self.x_scale, *_sizes(self, outputs, inputs), along)

    def dims(self) -> Any:
        by_block = self.scale.ndim == 2
        scale: Any = ("inputs", "outputs") if by_block else ("outputs",)
        return replace(self, values=PACKED[:2], scale=scale, x_scale=None if self.x_scale is None else ())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackedWeight(QuantisedWeight):
    """Weights that share their input but not their scheme, one below the other: a merged leaf that cannot be one."""

    parts: tuple[QuantisedWeight, ...]
    outputs: int = _size()
    inputs: int = _size()

    @staticmethod
    def of(parts: tuple[QuantisedWeight, ...]) -> StackedWeight:
        return StackedWeight(parts, sum(part.outputs for part in parts), parts[0].inputs)

    def multiply(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        return jnp.concatenate([part.multiply(x, dtype)[:, : part.outputs] for part in self.parts], axis=1)

    def widened(self) -> jax.Array:
        return jnp.concatenate([part.widened() for part in self.parts])

    def part(self, outputs: Places | None, inputs: Places | None, along: tuple[str, ...]) -> StackedWeight:
        found, start = [], 0
        for each in self.parts:
            mine = outputs
            if outputs is not None:
                mine = outputs[(outputs >= start) & (outputs < start + each.outputs)] - start
            found.append(each.part(mine, inputs, along))
            start += each.outputs
        return StackedWeight.of(tuple(found))

    def dims(self) -> Any:
        return replace(self, parts=tuple(part.dims() for part in self.parts))


def _sizes(weight: QuantisedWeight, outputs: Places | None, inputs: Places | None) -> tuple[int, int]:
    """Of a part."""
    return (
        weight.outputs if outputs is None else len(outputs),
        weight.inputs if inputs is None else len(inputs),
    )
