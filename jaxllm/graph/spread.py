"""A model over a mesh: its Placement, its parameters' specs, and leaves put where they belong as they are loaded.

In: a ModelConfig, one stage's mesh. Out: a Placement whose roles name the parameters' PartitionSpecs, and `Leaves`,
which lays out one leaf at a time so that no device ever holds a whole model. Knows nothing of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import axes
from sharding.axes import MeshConfig
from sharding.placement import Placement

Path = tuple[str | int, ...]
PlaceLeaf = Callable[[Path, Any], Any]


def is_axes(node: Any) -> bool:
    """The logical axes of one leaf, in a tree of them."""
    return isinstance(node, tuple)


def spread(model: ModelConfig, mesh: Mesh, config: MeshConfig, implementation: str | None = None) -> Placement:
    """Raises MeshError where this model cannot be cut over this mesh."""
    placement = Placement(mesh, config, model, implementation)
    placement.roles["params"] = jax.tree.map(placement.spec, axes(model), is_leaf=is_axes)
    return placement


def leaf_placer(placement: Placement, model: ModelConfig) -> PlaceLeaf:
    """A function that lays out the leaf at a path of the parameter tree."""
    names = axes(model)

    def place(path: Path, leaf: Any) -> Any:
        node: Any = names
        for key in path:
            node = node[key]
        return placement.place(node, leaf)

    return place
