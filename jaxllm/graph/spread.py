"""Where a model's arrays live: one device, or one stage's mesh. The rest of the stack asks and does not branch.

In: a ModelConfig and a device or a mesh. Out: a Home: the shardings of parameters, pages, logits and everything else,
the model as one device holds it, and a function that lays out one leaf at a time, so that no device ever holds a whole
spread model. Knows nothing of steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from jaxllm.graph.kv_cache import Device, KVCacheSpec
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import WHOLE, Ends, Params, abstract, axes
from sharding.axes import MeshConfig, tabled
from sharding.placement import Placement

Path = tuple[str | int, ...]
PlaceLeaf = Callable[[Path, Any], Any]


@functools.cache
def _names(model: ModelConfig, ends: Ends) -> Params:
    return axes(model, ends)


def is_axes(node: Any) -> bool:
    """The logical axes of one leaf, in a tree of them."""
    return isinstance(node, tuple)


def spread(
    model: ModelConfig, mesh: Mesh, config: MeshConfig, implementation: str | None = None, ends: Ends = WHOLE
) -> Placement:
    """Raises MeshError where this model cannot be cut over this mesh."""
    placement = Placement(mesh, config, model, implementation)
    placement.roles["params"] = jax.tree.map(placement.spec, axes(model, ends), is_leaf=is_axes)
    return placement


@dataclass(frozen=True)
class Home:
    """`device` is the first of them: memory is planned by it. `model` has the layers that live here, with `ends`."""

    model: ModelConfig
    device: Device
    placement: Placement | None = None
    ends: Ends = WHOLE

    @staticmethod
    def on(mesh: Mesh, model: ModelConfig, config: MeshConfig, ends: Ends = WHOLE) -> Home:
        """A mesh of one device is that device."""
        device, model = mesh.devices.flat[0], tabled(model, config)
        return Home(model, device, spread(model, mesh, config, ends=ends) if mesh.devices.size > 1 else None, ends)

    @property
    def held(self) -> ModelConfig:
        """The model as one device holds it."""
        return self.model if self.placement is None else self.placement.local_model()

    @property
    def whole(self) -> Sharding:
        """Of what every device has all of."""
        return SingleDeviceSharding(self.device) if self.placement is None else self.placement.whole

    def sharding(self, role: str) -> Sharding:
        return SingleDeviceSharding(self.device) if self.placement is None else self.placement.sharding(role)

    def kv_shapes(self, held: KVCacheSpec) -> Any:
        """Of the pages on all devices, from those of one, or of all that a sequence may lie on."""
        if self.placement is not None:
            mesh = self.placement.config
            held = held.repeated(mesh.width).with_pages(held.num_pages * mesh.attention_shards)
        return held.shapes(self.sharding("kv"))

    def shapes(self, dtype: DTypeLike) -> Params:
        """The parameters' shapes where they will lie."""
        _, shapes = abstract(self.model, dtype, self.ends)
        if self.placement is None:
            alone = self.whole
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=alone), shapes)
        return jax.tree.map(self.placement.shape, axes(self.model, self.ends), shapes, is_leaf=is_axes)

    def place(self, path: Path, leaf: Any) -> Any:
        """The leaf at a path of this model's parameters, where it belongs."""
        if self.placement is None:
            return jax.device_put(leaf, self.whole)
        node: Any = _names(self.model, self.ends)
        for key in path:
            node = node[key]
        return self.placement.place(node, leaf)


def held_bytes(params: Params) -> int:
    """Of arrays, or of their shapes with shardings, on one device."""

    def size(leaf: Any) -> int:
        held = 1
        for n in leaf.sharding.shard_shape(leaf.shape):
            held *= n
        return held * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(params))
