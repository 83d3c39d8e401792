"""Which part of a packed weight, and of its scales, belongs to a shard's rows or columns.

In: words as packing.py lays them, scales by output or by group of inputs, and the places (outputs or inputs, in order)
that one shard holds. Out: the same layouts of that part alone, padded as a whole weight of its size would be: what the
values and scales stand for does not change. Whole tiles are moved as they lie; anything finer is unpacked and packed
again. MeshError, with the arithmetic, where groups of inputs would be torn. Knows nothing of meshes or leaves.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quant_matmul import packing
from pallas_kernels.quant_matmul.api import GROUPS
from sharding.axes import MeshError

OUTPUT_TILE, INPUT_TILE = 64, 128  # what the kernels tile; a packed tile is 64 x 64
Places = np.ndarray  # i[count]


def padded(values: jax.Array) -> jax.Array:
    """[O, I] with zeros up to what the kernels tile."""
    outputs, inputs = values.shape
    if outputs % OUTPUT_TILE == 0 and inputs % INPUT_TILE == 0:
        return values
    return jnp.pad(values, ((0, -outputs % OUTPUT_TILE), (0, -inputs % INPUT_TILE)))


def words_of(words: jax.Array, bits: int, outputs: Places | None, inputs: Places | None) -> jax.Array:
    """The packed values of these outputs and inputs; None: all of them."""
    for axis, places, run in ((0, outputs, OUTPUT_TILE), (1, inputs, INPUT_TILE)):
        if places is None:
            continue
        if _in_runs(places, run, packing.TILE):
            words = jnp.take(words, places[:: packing.TILE] // packing.TILE, axis=axis)
        else:
            words = _packed_again(words, jnp.asarray(places, jnp.int32), bits, axis)
    return words


def values_of(values: jax.Array, outputs: Places | None, inputs: Places | None) -> jax.Array:
    """The same of values that are not packed."""
    for axis, places in enumerate((outputs, inputs)):
        values = values if places is None else jnp.take(values, jnp.asarray(places, jnp.int32), axis=axis)
    return padded(values)


def by_output(scale: jax.Array, outputs: Places | None) -> jax.Array:
    """Scales [..., N] of these outputs, padded."""
    if outputs is None:
        return scale
    more = ((0, 0),) * (scale.ndim - 1) + ((0, -len(outputs) % OUTPUT_TILE),)
    return jnp.pad(jnp.take(scale, jnp.asarray(outputs, jnp.int32), axis=-1), more)


def by_group(scale: jax.Array, group: int, inputs: Places, finest: int) -> jax.Array:
    """Scales [K / group, N] of these inputs, in groups as large as the parts allow, down to `finest`."""
    count = len(inputs)
    fine = math.gcd(group, count)
    if fine not in GROUPS or fine < finest or not _in_runs(inputs, fine, fine):
        raise MeshError(
            f"a quantised weight whose inputs share scales in groups of {group} cannot be cut into parts of {count} "
            f"inputs: {count} = {count // group} x {group} + {count % group}, and groups cannot be made smaller than "
            f"{finest}; use fewer devices along mesh.tensor and mesh.expert, smaller groups, or quantization int8"
        )
    split = jnp.repeat(scale, group // fine, axis=0)
    taken = jnp.take(split, inputs[::fine] // fine, axis=0)
    return jnp.pad(taken, ((0, -count % INPUT_TILE // fine), (0, 0)))


def _in_runs(places: Places, run: int, start: int) -> bool:
    """Whether they are runs of `run` neighbours, each from a multiple of `start` on."""
    if len(places) % run:
        return False
    firsts = places[::run]
    return bool(
        (firsts % start == 0).all() and (places == np.repeat(firsts, run) + np.tile(np.arange(run), len(firsts))).all()
    )


@functools.partial(jax.jit, static_argnames=("bits", "axis"))
def _packed_again(words: jax.Array, places: jax.Array, bits: int, axis: int) -> jax.Array:
    return packing.pack(padded(jnp.take(packing.unpack(words, bits), places, axis=axis)), bits)
