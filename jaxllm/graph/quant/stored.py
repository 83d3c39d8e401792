"""Weights that a checkpoint holds quantised: which tensors make one matrix, and how they become a leaf.

In: what config.json said (StoredQuantisation) and the tensors of the matrices that one leaf merges. Out: a leaf of
leaf.py, repacked once. The layouts are the formats' public ones: AWQ packs eight outputs a word, interleaved; GPTQ
eight inputs a word, in order; both have zeros packed by outputs and scales in f16. Knows nothing of files.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.graph.models.decoder import Params
from jaxllm.graph.models.quantised import BLOCK, StoredQuantisation
from jaxllm.graph.quant.leaf import Fp8Weight, Int4Weight, QuantisedWeight, StackedWeight
from jaxllm.graph.quant.scheme import MATRICES

A_WORD = 8  # values of 4 bits
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word output i of eight stands
SCALES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a matrix: `<module>.<suffix>` with a shape that may leave out sizes of 1."""

    suffix: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    optional: bool = False


def tensors(stored: StoredQuantisation, outputs: int, inputs: int) -> tuple[StoredTensor, ...]:
    """What a checkpoint of this kind holds for a matrix [outputs, inputs]."""
    if stored.method == "fp8":
        values = StoredTensor("weight", (outputs, inputs), ("F8_E4M3",))
        fixed = (StoredTensor("input_scale", (1,), SCALES),) if stored.fixed_inputs else ()
        if stored.blocks:
            shape = (-(-outputs // BLOCK), -(-inputs // BLOCK))
            either = [StoredTensor(name, shape, SCALES, True) for name in ("weight_scale_inv", "weight_scale")]
            return values, *either, *fixed
        return values, StoredTensor("weight_scale", (outputs,), SCALES), *fixed
    groups = inputs // stored.group
    zeros = StoredTensor("qzeros", (groups, outputs // A_WORD), ("I32",))
    scales = StoredTensor("scales", (groups, outputs), SCALES)
    if stored.method == "awq":
        return StoredTensor("qweight", (inputs, outputs // A_WORD), ("I32",)), zeros, scales
    words = StoredTensor("qweight", (inputs // A_WORD, outputs), ("I32",))
    return words, zeros, scales, StoredTensor("g_idx", (inputs,), ("I32",), not stored.reordered)


def shapes(stored: StoredQuantisation, params: Params) -> Params:
    """The same tree of ShapeDtypeStructs with its matrices as the checkpoint holds them."""

    def of(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        if path[-1].key not in MATRICES:
            return leaf
        return jax.eval_shape(functools.partial(_blank, stored, *leaf.shape))

    return jax.tree.map_with_path(of, params)


def _blank(stored: StoredQuantisation, outputs: int, inputs: int) -> QuantisedWeight:
    if stored.method == "fp8":
        values = jnp.zeros((outputs, inputs), jnp.float8_e4m3fn)
        scale = jnp.zeros((-(-inputs // BLOCK), outputs) if stored.blocks else (outputs,), jnp.float32)
        fixed = jnp.float32(1) if stored.fixed_inputs and not stored.blocks else None
        return Fp8Weight.of(values, scale, fixed)
    scale = jnp.zeros((inputs // stored.group, outputs), jnp.float16)
    order = jnp.zeros((inputs,), jnp.int32) if stored.reordered else None
    return Int4Weight.of(jnp.zeros((outputs, inputs), jnp.int8), scale, scale, order)


def leaf(stored: StoredQuantisation, matrices: Sequence[dict[str, jax.Array]]) -> QuantisedWeight:
    """One leaf of the matrices below one another, each a dict of its tensors by suffix."""
    if stored.method == "fp8":
        return _fp8(stored, matrices)
    orders = [_order(stored, each) for each in matrices]
    if any(not np.array_equal(orders[0], other) for other in orders[1:] if orders[0] is not None and other is not None):
        parts = tuple(_int4(stored, [each], order) for each, order in zip(matrices, orders, strict=True))
        return StackedWeight.of(parts)
    return _int4(stored, matrices, orders[0])


def _order(stored: StoredQuantisation, matrix: dict[str, jax.Array]) -> np.ndarray | None:
    """The inputs in the order of their groups. ValueError where groups are not all of one size."""
    if "g_idx" not in matrix:
        return None
    groups = np.asarray(matrix["g_idx"])
    if (np.bincount(groups, minlength=len(groups) // stored.group) != stored.group).any():
        raise ValueError(f"g_idx must give every group {stored.group} inputs")
    order = np.argsort(groups, kind="stable").astype(np.int32)
    return order if stored.reordered or (order != np.arange(len(order))).any() else None


def _int4(
    stored: StoredQuantisation, matrices: Sequence[dict[str, jax.Array]], order: np.ndarray | None
) -> QuantisedWeight:
    values, zeros = [], []
    for each in matrices:
        if stored.method == "awq":
            values.append(_unpacked(each["qweight"], AWQ_PLACES).T)  # [I, O] -> [O, I]
            zeros.append(_unpacked(each["qzeros"], AWQ_PLACES))
        else:
            values.append(_unpacked(each["qweight"].T, range(A_WORD)))
            stood = _unpacked(each["qzeros"], range(A_WORD))
            zeros.append((stood + 1) & 15 if stored.zero_less_one else stood)
    q = jnp.concatenate(values).astype(jnp.int8)
    scale = jnp.concatenate([each["scales"] for each in matrices], axis=1)
    zero = jnp.concatenate(zeros, axis=1).astype(scale.dtype)
    if order is not None:
        q = q[:, order]
    return Int4Weight.of(q, scale, zero, None if order is None else jnp.asarray(order))


def _unpacked(words: jax.Array, places: Sequence[int]) -> jax.Array:
    """i32[R, C] -> i32[R, 8 C]: value i of a word stands at place places[i]."""
    shifts = jnp.asarray([4 * place for place in places], jnp.uint32)
    raw = jax.lax.bitcast_convert_type(words, jnp.uint32)
    return ((raw[:, :, None] >> shifts) & 15).astype(jnp.int32).reshape(words.shape[0], -1)


def _fp8(stored: StoredQuantisation, matrices: Sequence[dict[str, jax.Array]]) -> QuantisedWeight:
    values = jnp.concatenate([each["weight"] for each in matrices])
    scales = []
    for each in matrices:
        outputs = each["weight"].shape[0]
        if stored.blocks:
            found = each["weight_scale_inv" if "weight_scale_inv" in each else "weight_scale"].astype(jnp.float32)
            scales.append(jnp.repeat(found, BLOCK, axis=0)[:outputs].T)  # [I / 128, O]
        else:
            scales.append(jnp.broadcast_to(each["weight_scale"].astype(jnp.float32).reshape(-1), (outputs,)))
    fixed = None
    if stored.fixed_inputs and not stored.blocks:
        # Merged matrices share their input: the widest of their scales clips nothing.
        fixed = jnp.stack([each["input_scale"].astype(jnp.float32).reshape(()) for each in matrices]).max()
    return Fp8Weight.of(values, jnp.concatenate(scales, axis=-1), fixed)
