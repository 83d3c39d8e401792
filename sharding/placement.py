"""Where every array of a model lies on a mesh, and step functions over what one device holds of them.

In: one stage's mesh, the model's sizes, arrays with the names of their logical axes. Out: arrays cut and laid out by
shard (each shard's q, k and v rows together, gate and up likewise; matrices stay two-dimensional), PartitionSpecs, and
shard_mapped functions. Knows nothing of layers' names, steps or what a function computes.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.axes import (
    EXPERT,
    ONCE,
    SPLIT,
    MeshConfig,
    ModelSizes,
    check,
    expert_rows,
    local_sizes,
    rows_of_shards,
)
from sharding.collectives import ALONE, AttentionData, Exchange, Spread
from sharding.context import Context
from sharding.dispatch import Dispatch, choose
from sharding.mesh import SHARD_AXES

log = logging.getLogger(__name__)
Axes = tuple[str | None, ...]
ROW_BYTES = 2  # of one hidden number of a token, in the rule of how experts are reached


@dataclass(frozen=True)
class Placement:
    """One pipeline stage of one replica on its devices. Raises MeshError for a model that cannot be cut so."""

    mesh: Mesh
    config: MeshConfig
    model: ModelSizes
    implementation: str | None = None  # of all_reduce
    roles: dict[str, Any] = field(default_factory=dict)  # name -> PartitionSpecs of a pytree, for `wrap`

    def __post_init__(self) -> None:
        check(self.model, self.config)
        self.roles.setdefault("whole", P())
        self.roles.setdefault("kv", self.kv_spec)
        rows = "expert" if self.config.attention_data else None
        self.roles.setdefault("rows", P(rows))  # what there is of each row
        self.roles.setdefault("logits", P(rows, self.shard_axes or None))
        seq = ("seq",) if self.config.seq > 1 else ()
        self.roles.setdefault("tokens", P(self.shard_axes or None))
        self.roles.setdefault("context", P(seq or None))
        self.roles.setdefault("context tokens", P((*seq, *self.shard_axes) or None))

    @property
    def shard_axes(self) -> tuple[str, ...]:
        """Along which attention, the feed-forward and the vocabulary are cut."""
        axes = SHARD_AXES[1:] if self.config.attention_data else SHARD_AXES
        return tuple(name for name in axes if self.mesh.shape[name] > 1)

    @property
    def whole(self) -> NamedSharding:
        """On every device, all of it."""
        return NamedSharding(self.mesh, P())

    def sharding(self, role: str) -> NamedSharding:
        """Of a role that is one array, or many alike."""
        return NamedSharding(self.mesh, self.roles[role])

    @property
    def kv_spec(self) -> P:
        """Pages [P, K, page, H]: kv heads are cut, repeated where there are fewer of them than shards."""
        pages = "expert" if self.config.attention_data else "seq" if self.config.seq > 1 else None
        return P(pages, self.shard_axes or None)

    @property
    def context(self) -> Context | None:
        """Set where the keys of a sequence are spread over devices."""
        return Context(self.config.seq) if self.config.seq > 1 else None

    def local_model(self) -> Any:
        return local_sizes(self.model, self.config)

    def exchange(self, tokens: int | None = None, decode: bool = False) -> Exchange:
        """How shards meet in a step of so many tokens a shard of attention; None: at the head.

        The residual stream is spread only where tokens divide, and only in prefill.
        """
        config, spread, count = self.config, False, tokens or 0
        if config.sequence_parallel and not decode and count and count % config.width == 0:
            spread = True
        axes, groups = self.shard_axes, self._groups(config.width)
        if config.attention_data:
            dispatch = self._dispatch(count)
            inner = Spread(axes, spread, groups, self.implementation) if axes else ALONE
            every = "expert", *axes
            groups = self._groups(config.stage_size)
            return AttentionData(inner, every, inner.scatter, groups, self.implementation, dispatch)
        if not axes:
            return ALONE
        dispatch = self._dispatch(count // config.expert) if spread else None
        return Spread(axes, spread, groups, self.implementation, dispatch, apart=dispatch is not None)

    def _dispatch(self, tokens: int) -> Dispatch | None:
        """How so many tokens on each expert shard are sent to their experts; None: every device sees all tokens."""
        experts, config = self.model.experts, self.config
        if experts is None:
            return None
        row_bytes = ROW_BYTES * self.model.d_model
        way = choose(config.expert_exchange, tokens, config.expert, experts.per_token, row_bytes)
        log.debug("%d tokens: %s", tokens, way.why)
        return Dispatch(config.expert, self.mesh.devices.flat[0].platform == "gpu") if way.all_to_all else None

    def _groups(self, size: int) -> tuple[tuple[int, ...], ...]:
        """Ids of the devices that meet, in the order of the mesh: `size` neighbours each."""
        ids = np.vectorize(lambda device: device.id, otypes=[int])(self.mesh.devices)
        return tuple(tuple(map(int, group)) for group in ids.reshape(-1, size))

    # ---- parameters ----

    def spec(self, axes: Axes) -> P:
        return P(*(self._along(name, axes)[0] for name in axes))

    def _along(self, name: str | None, axes: Axes) -> tuple[tuple[str, ...] | None, int]:
        """The mesh axes that cut one logical axis of a leaf, and into how many shards."""
        if name == EXPERT:
            return (("expert",) if self.config.expert > 1 else None), self.config.expert
        if name in SPLIT and EXPERT in axes:
            return (("tensor",) if self.config.tensor > 1 else None), self.config.tensor
        if name in SPLIT or name == ONCE:
            return self.shard_axes or None, self.config.width
        return None, 1

    def along(self, axes: Axes) -> list[tuple[str, ...]]:
        """The mesh axes that cut each dim of a leaf."""
        return [self._along(name, axes)[0] or () for name in axes]

    def held(self, axes: Axes, shape: tuple[int, ...]) -> list[np.ndarray | None]:
        """i[shards, rows a shard] for each dim that is cut; None for one that is not."""
        return [rows if cut else None for rows, cut in zip(self._laid_out(axes, shape)[0], self.along(axes))]

    def shards(self) -> list[tuple[Any, int]]:
        """This process's devices, and which shard of a layer's matrices each holds."""
        order = enumerate(self.mesh.devices.reshape(-1))
        mine = jax.process_index()
        return [(device, at % self.config.width) for at, device in order if device.process_index == mine]

    def holding(self, params: Any) -> Placement:
        """The same for these parameters: whatever their leaves are made of."""
        specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
        return dataclasses.replace(self, roles={**self.roles, "params": specs})

    def shape(self, axes: Axes, leaf: Any) -> jax.ShapeDtypeStruct:
        """What `place` makes of a leaf of this shape and dtype."""
        shape = self._laid_out(axes, leaf.shape)[1]
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(self.mesh, self.spec(axes)))

    def _laid_out(self, axes: Axes, shape: tuple[int, ...]) -> tuple[list[np.ndarray | None], tuple[int, ...]]:
        """For every dim, the rows each shard holds (None: all of them), and its size over all shards."""
        held, sizes = [], []
        for name, size in zip(axes, shape, strict=True):
            shards = self._along(name, axes)[1]
            rows = self._rows(name, shards, size) if name is not None and name in SPLIT else None
            held.append(rows)
            sizes.append(size * shards if name == ONCE else size if rows is None else rows.size)
        return held, tuple(sizes)

    def _rows(self, name: str, shards: int, size: int) -> np.ndarray:
        if name == EXPERT:
            return expert_rows(self.model, self.config)
        return rows_of_shards(name, self.model, shards, size)

    def place(self, axes: Axes, leaf: Any) -> jax.Array:
        """A whole leaf, in host memory or on a device, cut and laid out over the mesh."""
        sharding = NamedSharding(self.mesh, self.spec(axes))
        if not self.shard_axes and not self.config.attention_data:
            return jax.device_put(leaf, sharding)
        held, shape = self._laid_out(axes, leaf.shape)
        local = sharding.shard_shape(shape)
        pieces = []
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            assert index is not None  # only of devices without a part
            piece = leaf
            for dim, (name, rows) in enumerate(zip(axes, held)):
                shard = (index[dim].start or 0) // local[dim]
                if name == ONCE:
                    piece = piece if shard == 0 else np.zeros(leaf.shape, leaf.dtype)
                elif rows is not None:
                    piece = _take(piece, rows[shard], dim)
            pieces.append(jax.device_put(piece, device, may_alias=False))
        return jax.make_array_from_single_device_arrays(shape, sharding, pieces)

    # ---- functions ----

    def wrap(self, function: Callable[..., Any], takes: Any, gives: Any) -> Callable[..., Any]:
        """`function` over what each device holds. `takes` and `gives` name a role for each argument and result."""
        into, out = jax.tree.map(self.roles.__getitem__, (takes, gives))
        return jax.shard_map(function, mesh=self.mesh, in_specs=into, out_specs=out, check_vma=False)


def _take(array: Any, rows: np.ndarray, dim: int) -> Any:
    """array[..., rows, ...]: a view or one slice where rows are consecutive, runs joined where they are not."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    runs = [array[(slice(None),) * dim + (slice(int(r[0]), int(r[-1]) + 1),)] for r in np.split(rows, breaks)]
    if len(runs) == 1:
        return runs[0]
    join = np.concatenate if isinstance(array, np.ndarray) else jax.numpy.concatenate
    return join(runs, axis=dim)
