"""Where a model's arrays live: one device, or one stage's mesh. The rest of the stack asks and does not branch.

In: a ModelConfig, how its weights are quantised, and a device or a mesh. Out: a Home: the shardings of parameters,
pages, logits and everything else, the model as one device holds it, and a function that lays out one leaf at a time, so
that no device ever holds a whole spread model. Knows nothing of steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxllm.graph.kv_cache import Device, KVCacheSpec
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import WHOLE, Ends, Params, abstract, axes
from jaxllm.graph.quant import stored
from jaxllm.graph.quant.leaf import QuantisedWeight
from jaxllm.graph.quant.scheme import PLAIN, Scheme
from jaxllm.graph.weights.packed import with_shapes
from sharding.axes import MeshConfig, tabled
from sharding.hop import is_here
from sharding.mesh import STAGE_AXES
from sharding.placement import Placement

Path = tuple[str | int, ...]
PlaceLeaf = Callable[[Path, Any], Any]


@functools.cache
def _names(model: ModelConfig, ends: Ends) -> Params:
    return axes(model, ends)


def is_axes(node: Any) -> bool:
    """The logical axes of one leaf, in a tree of them."""
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)


def spread(
    model: ModelConfig, mesh: Mesh, config: MeshConfig, implementation: str | None = None, ends: Ends = WHOLE
) -> Placement:
    """Raises MeshError where this model cannot be cut over this mesh."""
    placement = Placement(mesh, config, model, implementation)
    placement.roles["params"] = jax.tree.map(placement.spec, axes(model, ends), is_leaf=is_axes)
    return placement


@dataclass(frozen=True)
class Home:
    """`device` is the first of them: memory is planned by it. `model` has the layers that live here, with `ends`;
    `packed`: their matrices have twins, of jaxllm.graph.weights.packed."""

    model: ModelConfig
    device: Device
    placement: Placement | None = None
    ends: Ends = WHOLE
    scheme: Scheme = PLAIN
    packed: bool = False

    @staticmethod
    def on(mesh: Mesh, model: ModelConfig, config: MeshConfig, ends: Ends = WHOLE, scheme: Scheme = PLAIN) -> Home:
        """A mesh of one device is that device."""
        model = tabled(model, config)
        placement = spread(model, mesh, config, ends=ends) if mesh.devices.size > 1 else None
        return Home(model, mesh.devices.flat[0], placement, ends, scheme)

    @property
    def mesh(self) -> Mesh:
        """Of one device too."""
        if self.placement is not None:
            return self.placement.mesh
        return Mesh(np.array(self.device).reshape((1,) * len(STAGE_AXES)), STAGE_AXES)

    @property
    def here(self) -> bool:
        """Whether this process has a device of it."""
        return is_here(self.whole)

    @property
    def own_device(self) -> Device:
        """One of this process: of this home, or like it."""
        mine = jax.process_index()
        found = (device for device in self.mesh.devices.flat if device.process_index == mine)
        return next(found, jax.local_devices()[0])

    def placed(self, params: Params) -> Placement | None:
        """The placement for these parameters, or for their shapes."""
        return None if self.placement is None else self.placement.holding(params)

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
        """The parameters' shapes where they will lie. MeshError where quantised weights cannot be cut so."""
        _, shapes = abstract(self.model, dtype, self.ends)
        if self.model.stored is not None:
            shapes = stored.shapes(self.model.stored, shapes)
        elif self.scheme.kind != "none":
            shapes = self.scheme.shapes(shapes)
        placement = self.placement
        if placement is None:
            shapes = shapes_on(shapes, self.whole)
            return with_shapes(shapes) if self.packed else shapes

        def laid_out(names: Any, leaf: Any) -> Any:
            quantised = isinstance(leaf, QuantisedWeight)
            return shape_of_quantised(placement, names, leaf) if quantised else placement.shape(names, leaf)

        shapes = jax.tree.map(laid_out, axes(self.model, self.ends), shapes, is_leaf=is_axes)
        return with_shapes(shapes) if self.packed else shapes

    def place(self, path: Path, leaf: Any) -> Any:
        """The leaf at a path of this model's parameters, where it belongs; its shape, if that is another process."""
        placement = self.placement
        if placement is None:
            return jax.device_put(leaf, self.whole) if self.here else shapes_on(leaf, self.whole)
        node: Any = _names(self.model, self.ends)
        for key in path:
            node = node[key]
        if isinstance(leaf, QuantisedWeight):
            return (place_quantised if self.here else shape_of_quantised)(placement, node, leaf)
        return (placement.place if self.here else placement.shape)(node, leaf)


# ---- arrays on devices of other processes: their shapes stand for them here ----


def shapes_on(tree: Any, sharding: Sharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def zeros(shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding) -> Any:
    if not is_here(sharding):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return jnp.zeros(shape, dtype, device=sharding)


def put(tree: Any, sharding: Sharding) -> Any:
    """Host arrays onto devices."""
    return jax.device_put(tree, sharding) if is_here(sharding) else shapes_on(tree, sharding)


# ---- quantised leaves: arrays that are cut together ----


def part_of(placement: Placement, names: Any, leaf: QuantisedWeight, shard: int) -> QuantisedWeight:
    """What one shard holds of a leaf [outputs, inputs]."""
    outputs, inputs = (rows if rows is None else rows[shard] for rows in placement.held(names, leaf.shape))
    return leaf.part(outputs, inputs, placement.along(names)[1])


def _over(placement: Placement, names: Any, dims: Any, held: Any) -> tuple[tuple[int, ...], NamedSharding]:
    """The shape and the sharding over all shards of an array of which one shard holds `held`."""
    axes_of = dict(zip(("outputs", "inputs"), placement.along(names)))
    along = [axes_of.get(name, ()) for name in dims]
    sizes = (n * (placement.config.width if cut else 1) for n, cut in zip(held.shape, along))
    return tuple(sizes), NamedSharding(placement.mesh, P(*(cut or None for cut in along)))


def shape_of_quantised(placement: Placement, names: Any, leaf: QuantisedWeight) -> QuantisedWeight:
    """What `place_quantised` makes of a leaf of these shapes."""
    own = jax.eval_shape(lambda whole: part_of(placement, names, whole, 0), leaf)

    def laid_out(dims: Any, held: Any) -> jax.ShapeDtypeStruct:
        shape, sharding = _over(placement, names, dims, held)
        return jax.ShapeDtypeStruct(shape, held.dtype, sharding=sharding)

    return jax.tree.map(laid_out, own.dims(), own, is_leaf=is_axes)


def place_quantised(placement: Placement, names: Any, leaf: QuantisedWeight) -> QuantisedWeight:
    """A whole leaf laid out over the mesh: a leaf of one shard's sizes, whose arrays hold every shard's."""
    shards = placement.shards()
    parts = {shard: part_of(placement, names, leaf, shard) for shard in {shard for _, shard in shards}}
    one = parts[shards[0][1]]

    def joined(dims: Any, *held: Any) -> jax.Array:
        shape, sharding = _over(placement, names, dims, held[0])
        by_shard = dict(zip(parts, held))
        pieces = [jax.device_put(by_shard[shard], device) for device, shard in shards]
        return jax.make_array_from_single_device_arrays(shape, sharding, pieces)

    return jax.tree.map(joined, one.dims(), *parts.values(), is_leaf=is_axes)


def held_bytes(params: Params) -> int:
    """Of arrays, or of their shapes with shardings, on one device."""

    def size(leaf: Any) -> int:
        held = 1
        for n in leaf.sharding.shard_shape(leaf.shape):
            held *= n
        return held * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(params))
