"""An array handed from the devices of one pipeline stage to those of another, which may be another process's.

In: an array as it lies on the earlier stage (nothing, where this process has none of it). Out: the same on the later
stage, or nothing. Within a process it is a copy from device to device. Between processes it is a collective inside a
jitted function over the devices of both, which every process that has some of them calls, all in one order. Knows
nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

HOP = "hop"


def is_here(sharding: Sharding) -> bool:
    """Whether this process has a device of it."""
    return bool(sharding.addressable_devices)


@dataclass(frozen=True)
class Copy:
    """Between devices of one process."""

    target: Sharding
    here: bool  # else of another one

    def __call__(self, x: Any) -> Any:
        return jax.device_put(x, self.target) if self.here else None


@dataclass(frozen=True)
class Hop:
    """Between processes."""

    shape: tuple[int, ...]
    target: Sharding
    joint: NamedSharding  # both stages' parts one after the other along the first dim
    blanks: dict[Any, jax.Array]  # what a device of this process gives that has nothing to give
    takers: tuple[Any, ...]  # devices of this process in the later stage
    moved: Any  # compiled

    def __call__(self, x: Any) -> Any:
        if not self.blanks:
            return None  # other processes' affair
        given = {} if x is None else {shard.device: shard.data for shard in x.addressable_shards}
        parts = [given.get(device, blank) for device, blank in self.blanks.items()]
        whole = (2 * self.shape[0], *self.shape[1:])
        made = self.moved(jax.make_array_from_single_device_arrays(whole, self.joint, parts))
        if next(iter(self.blanks)).platform == "cpu":
            # A CPU runs what is launched side by side: two collectives at once would meet the wrong partners.
            jax.block_until_ready(made)
        got = {shard.device: shard.data for shard in made.addressable_shards}
        if not self.takers:
            return None
        mine = [got[device] for device in self.takers]
        return jax.make_array_from_single_device_arrays(self.shape, self.target, mine)


def hop_between(source: Mesh, target: Mesh, like: jax.ShapeDtypeStruct) -> Copy | Hop:
    """For arrays of this shape and dtype; `like.sharding` is that of the target, and the source's is its like."""
    wanted = like.sharding
    assert wanted is not None
    both = np.stack([source.devices, target.devices])
    if len({device.process_index for device in both.flat}) == 1:
        return Copy(wanted, is_here(wanted))
    names = (HOP, *source.axis_names)
    mesh = Mesh(both, names, axis_types=(AxisType.Auto,) * len(names))
    first, *rest = wanted.spec if isinstance(wanted, NamedSharding) and len(wanted.spec) else (None,)
    over = (first,) if isinstance(first, str) else tuple(first or ())
    joint = NamedSharding(mesh, P((HOP, *over), *rest))
    shape = (2 * like.shape[0], *like.shape[1:])
    held = joint.shard_shape(shape)
    here = joint.addressable_devices_indices_map(shape) if is_here(joint) else {}
    if not here:
        return Hop(like.shape, wanted, joint, {}, (), None)
    blanks = {device: jnp.zeros(held, like.dtype, device=device) for device in here}
    function = jax.shard_map(
        lambda x: lax.ppermute(x, HOP, [(0, 1)]), mesh=mesh, in_specs=joint.spec, out_specs=joint.spec, check_vma=False
    )
    moved = jax.jit(function).lower(jax.ShapeDtypeStruct(shape, like.dtype, sharding=joint)).compile()
    takers = tuple(device for device in target.devices.flat if device in here)
    return Hop(like.shape, wanted, joint, blanks, takers, moved)
