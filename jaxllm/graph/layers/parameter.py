"""How a weight is declared: shape, logical axes and how it starts. One declaration serves every use.

In: a shape and the names of its logical axes. Out: an nnx.Param that holds a ShapeDtypeStruct (a description) or,
when random streams are given, an initial array. The axis names travel as Flax's `out_sharding` metadata; which
mesh axis they land on is not known here.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

Fill = Literal["normal", "ones", "zeros"]
Axes = tuple[str | None, ...]

INIT_STD = 0.02


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "fill"))
def filled(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike, fill: Fill) -> jax.Array:
    """An initial array made where it will live, one small program a distinct shape."""
    if fill == "normal":
        return (INIT_STD * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    return (jnp.ones if fill == "ones" else jnp.zeros)(shape, dtype)


def parameter(
    shape: tuple[int, ...], axes: Axes, dtype: DTypeLike, rngs: nnx.Rngs | None, fill: Fill = "normal"
) -> nnx.Param[Any]:
    value = jax.ShapeDtypeStruct(shape, dtype) if rngs is None else filled(rngs.params(), shape, dtype, fill)
    # eager_sharding off: the names are logical and need no mesh to be set.
    return nnx.Param(value, out_sharding=axes, eager_sharding=False, fill=fill)
