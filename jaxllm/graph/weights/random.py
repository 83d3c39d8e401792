"""Random weights made where they will live, from nothing but a config: for benchmarks and tests without a checkpoint.

In: a ModelConfig and a seed. Out: parameters with the shapes and types a checkpoint would give: matrices normal with
standard deviation 0.02, norms one, biases zero. The same seed gives the same weights on any device of one kind.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.graph.layers.parameter import filled
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import Params, abstract, fills
from jaxllm.graph.quant.scheme import PLAIN, Scheme
from jaxllm.graph.spread import PlaceLeaf
from jaxllm.graph.weights.loader import Placement


def dummy(
    config: ModelConfig,
    dtype: DTypeLike = jnp.bfloat16,
    seed: int = 0,
    device: Placement = None,
    scheme: Scheme = PLAIN,
    place: PlaceLeaf | None = None,
) -> Params:
    """One small program for each distinct shape; each leaf made on `device`, and moved on by `place` if given."""
    shapes, kinds = abstract(config, dtype)[1], fills(config)
    found, tree = jax.tree.flatten_with_path(shapes)
    keys = jax.device_put(jax.random.split(jax.random.key(seed), len(found)), device)
    made = []
    for number, ((path, leaf), kind) in enumerate(zip(found, jax.tree.leaves(kinds), strict=True)):
        names = tuple(key.key for key in path)
        array = scheme.leaf(names, filled(keys[number], leaf.shape, leaf.dtype, kind))
        made.append(array if place is None else place(names, array))
    return jax.tree.unflatten(tree, made)
