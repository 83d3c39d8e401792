"""Which mesh axis splits which logical axis of a model, and what arithmetic forbids it. No JAX here.

In: a MeshConfig (how many devices along each mesh axis) and the sizes of a model. Out: for every logical axis of a
parameter the rows each shard holds, the model as one shard sees it, or a MeshError with the division that fails.
Knows nothing of devices, arrays or ranks in programs.

Mesh axes, outermost first: `data` (replicas that share nothing), `pipe` (consecutive layers), `seq` (tokens of one
sequence: context parallelism), `expert` (experts; attention is split over it too), `tensor` (rows and columns of
matrices). The CLI's names are dp, pp, cp, ep, tp; sp is no axis: it spreads the residual stream over the devices that
share a layer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from jaxllm.core import JaxLLMError
from sharding.balance import first_slots, most_copies

MAX_AXIS = 4096


class MeshError(JaxLLMError, ValueError):
    """A mesh and a model, or a mesh and the devices, do not fit: the message holds the arithmetic."""


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_AXIS:
        raise MeshError(f"{name} = {value!r}: must be an integer in [1, {MAX_AXIS}]")
    return value


def _interval(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**31 - 1:
        raise MeshError(f"{name} = {value!r}: must be an integer in [1, {2**31 - 1}]")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise MeshError(f"{name} = {value!r}: must be true or false")
    return value


def _flag_or_auto(name: str, value: Any) -> bool | str:
    if value != "auto" and not isinstance(value, bool):
        raise MeshError(f"{name} = {value!r}: must be true, false or auto")
    return value


def _spare(name: str, value: Any) -> int:
    return 0 if value == 0 and not isinstance(value, bool) else _count(name, value)


def _exchange(name: str, value: Any) -> str:
    if value not in ("auto", "sum", "all_to_all"):
        raise MeshError(f"{name} = {value!r}: must be auto, sum or all_to_all")
    return value


def _threshold(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value == 0 or 1 < value <= MAX_AXIS):
        raise MeshError(f"{name} = {value!r}: must be over 1 (the fullest device's load by the mean), or 0 for never")
    return float(value)


def _setting(default: Any, check: Callable[[str, Any], Any], *aliases: str) -> Any:
    return field(default=default, metadata={"check": check, "aliases": aliases})


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices lie along each mesh axis. One of everything is one device."""

    data: int = _setting(1, _count, "dp", "data_parallel_size")
    # Replicas as processes of their own, each with its devices; auto: on GPUs (docs/adr/0034).
    data_processes: bool | str = _setting("auto", _flag_or_auto)
    pipe: int = _setting(1, _count, "pp", "pipeline_parallel_size")
    seq: int = _setting(1, _count, "cp", "context_parallel_size")
    expert: int = _setting(1, _count, "ep", "expert_parallel_size")
    tensor: int = _setting(1, _count, "tp", "tensor_parallel_size")
    sequence_parallel: bool = _setting(False, _flag, "sp")  # residual stream split along tokens over expert x tensor
    # Attention, shared experts and the vocabulary are not cut over `expert`: each of its shards has rows and pages of
    # its own, and all shards share the experts.
    attention_data: bool = _setting(False, _flag, "enable_dp_attention")
    # How routed tokens that are dealt out meet their experts; auto: what sends less (sharding.dispatch.choose).
    expert_exchange: str = _setting("auto", _exchange)
    redundant_experts: int = _setting(0, _spare, "num_redundant_experts", "ep_num_redundant_experts")  # spare slots
    # Experts are moved when the fullest device's measured load is over this many times the mean; 0: when told to.
    rebalance_threshold: float = _setting(0.0, _threshold)
    rebalance_interval: int = _setting(1000, _interval, "eplb_rebalance_num_iterations")  # steps that are measured

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            spec.metadata["check"](f"mesh.{spec.name}", getattr(self, spec.name))
        if self.sequence_parallel and self.width == 1:
            raise MeshError(
                "mesh.sequence_parallel needs mesh.tensor > 1 or mesh.expert > 1: one device has nothing to spread"
            )
        if self.attention_data and self.expert == 1:
            raise MeshError("mesh.attention_data needs mesh.expert > 1: its shards are what has rows of its own")
        if self.attention_data and self.pipe * self.seq > 1:
            raise MeshError(
                f"mesh.attention_data with mesh.pipe = {self.pipe} and mesh.seq = {self.seq}: not built; "
                "leave both at 1, or attention_data false"
            )
        if self.balances and self.expert == 1:
            raise MeshError("mesh.redundant_experts and mesh.rebalance_threshold need mesh.expert > 1")
        if self.balances and self.pipe > 1:
            raise MeshError(
                f"mesh.pipe = {self.pipe}: experts are measured and moved in a whole model only; "
                "leave mesh.redundant_experts and mesh.rebalance_threshold at 0, or give these devices to mesh.expert"
            )

    @property
    def stage_size(self) -> int:
        """Devices of one pipeline stage of one replica."""
        return self.seq * self.expert * self.tensor

    @property
    def replica_size(self) -> int:
        return self.pipe * self.stage_size

    @property
    def size(self) -> int:
        return self.data * self.replica_size

    @property
    def width(self) -> int:
        """Into how many shards attention's heads, the feed-forward and the vocabulary are cut."""
        return self.tensor if self.attention_data else self.expert * self.tensor

    @property
    def attention_shards(self) -> int:
        """How many parts of a stage have rows and pages of their own."""
        return self.expert if self.attention_data else 1

    @property
    def balances(self) -> bool:
        """Whether experts' load is measured and experts can be moved."""
        return self.redundant_experts > 0 or self.rebalance_threshold > 0

    def __str__(self) -> str:
        named = {"dp": self.data, "pp": self.pipe, "cp": self.seq, "ep": self.expert, "tp": self.tensor}
        parts = [f"{name}{count}" for name, count in named.items() if count > 1]
        parts += ["sp"] * self.sequence_parallel + ["attention data"] * self.attention_data
        return " x ".join(parts) or "one device"


class ExpertSizes(Protocol):
    """The same of routed experts."""

    @property
    def count(self) -> int: ...
    @property
    def d_ff(self) -> int: ...
    @property
    def shared_d_ff(self) -> int: ...


class ModelSizes(Protocol):
    """What the arithmetic needs of a model's config."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def d_ff(self) -> int: ...
    @property
    def windows(self) -> tuple[int | None, ...]: ...
    @property
    def experts(self) -> Any: ...  # ExpertSizes | None


@dataclass(frozen=True)
class Block:
    """`count` units of rows, split among shards by whole units.

    Where there are fewer units than shards, units that may repeat are given to several neighbouring shards.
    """

    name: str
    count: int
    may_repeat: bool = False

    def units(self, shards: int) -> np.ndarray:
        """i[shards, units a shard]: the units each shard holds."""
        if self.count % shards == 0:
            return np.arange(self.count).reshape(shards, -1)
        if self.may_repeat and shards % self.count == 0:
            return np.repeat(np.arange(self.count), shards // self.count)[:, None]
        also = f", nor {shards} by {self.count}" if self.may_repeat else ""
        raise MeshError(
            f"{self.name} = {self.count} cannot be split over {shards} devices: {self.count} = "
            f"{shards} x {self.count // shards} + {self.count % shards}, not a whole number each{also}"
        )


def _heads(model: ModelSizes) -> Block:
    return Block("num_heads", model.num_heads)


def _kv_heads(model: ModelSizes) -> Block:
    return Block("num_kv_heads", model.num_kv_heads, may_repeat=True)


# Logical axis of a parameter of so many rows -> the blocks it is made of, each cut by itself: a shard's rows lie
# together. Axes not named here are whole on every device.
SPLIT: Mapping[str, Callable[[ModelSizes, int], tuple[Block, ...]]] = {
    "qkv": lambda model, size: (_heads(model), _kv_heads(model), _kv_heads(model)),
    "heads": lambda model, size: (_heads(model),),
    "gate_up": lambda model, size: (Block("d_ff", size // 2), Block("d_ff", size // 2)),
    "ffn": lambda model, size: (Block("d_ff", size),),
    "vocab": lambda model, size: (Block("vocab_size", size),),
    "expert": lambda model, size: (Block("experts.count", size),),
}
EXPERT = "expert"  # a leaf of experts: they lie along mesh axis `expert`, their rows along `tensor` alone
ONCE = "once"  # what is added to a sum over shards: the first shard holds it, the others hold zeros


def rows_of_shards(axis: str, model: ModelSizes, shards: int, size: int) -> np.ndarray:
    """i[shards, rows a shard]: which of the axis' `size` rows each shard holds, in its own order."""
    blocks = SPLIT[axis](model, size)
    units = sum(block.count for block in blocks)
    if size == 0 or size % units:
        raise MeshError(f"axis {axis!r} has {size} rows, which are not a whole number for each of {units} units")
    rows, found, start = size // units, [], 0
    for block in blocks:
        held = block.units(shards)
        found.append(((start + held[:, :, None]) * rows + np.arange(rows)).reshape(shards, -1))
        start += block.count
    return np.concatenate(found, axis=1)


def local_sizes(model: Any, mesh: MeshConfig) -> Any:
    """The model's config as one shard of one stage sees it: a smaller model. Raises MeshError."""
    check(model, mesh)
    shards = mesh.width
    changed = {
        "num_heads": model.num_heads // shards,
        "num_kv_heads": max(1, model.num_kv_heads // shards),
        "d_ff": model.d_ff // shards,
        "vocab_size": model.vocab_size // shards,
    }
    if model.experts is not None:
        one, shared = model.experts.d_ff // mesh.tensor, model.experts.shared_d_ff // shards
        changed["experts"] = dataclasses.replace(model.experts, d_ff=one, shared_d_ff=shared)
    return dataclasses.replace(model, **changed)


def tabled(model: Any, mesh: MeshConfig) -> Any:
    """The model with a table of its experts' copies in each layer, where they can be moved."""
    if not mesh.balances or model.experts is None:
        return model
    copies = most_copies(mesh.redundant_experts, mesh.expert)
    return dataclasses.replace(model, experts=dataclasses.replace(model.experts, copies=copies))


def expert_rows(model: ModelSizes, mesh: MeshConfig) -> np.ndarray:
    """i32[mesh.expert, slots a device]: the expert in each slot, before any is moved."""
    return first_slots(model.experts.count, mesh.redundant_experts, mesh.expert).reshape(mesh.expert, -1)


def check(model: ModelSizes, mesh: MeshConfig) -> None:
    """Raises MeshError for a mesh this model cannot be spread over."""
    experts: ExpertSizes | None = model.experts
    if mesh.expert > 1 and experts is None:
        raise MeshError(f"mesh.expert = {mesh.expert}: the model has no experts; give these devices to mesh.tensor")
    if experts is not None:
        spare = mesh.redundant_experts
        Block("experts.count" + " + redundant_experts" * (spare > 0), experts.count + spare).units(mesh.expert)
        held = (experts.count + spare) // mesh.expert
        if held > experts.count:
            raise MeshError(
                f"mesh.redundant_experts = {spare}: each of {mesh.expert} devices would hold {held} of "
                f"{experts.count} experts; a second copy on one device serves nothing"
            )
        Block("experts.d_ff", experts.d_ff).units(mesh.tensor)
        Block("experts.shared_d_ff", experts.shared_d_ff).units(mesh.width)
    sizes = {"gate_up": 2 * model.d_ff, "ffn": model.d_ff, "vocab": model.vocab_size}
    for name, blocks in SPLIT.items():
        for block in blocks(model, sizes.get(name, 0)) if name != EXPERT else ():
            block.units(mesh.width)
    if mesh.seq > 1 and any(window is not None for window in model.windows):
        raise MeshError(
            f"mesh.seq = {mesh.seq}: a window over keys that lie page by page on several devices: not built"
        )


def stage_layers(num_layers: int, stages: int) -> tuple[range, ...]:
    """Which consecutive layers each pipeline stage runs; the first stages take one more where it does not divide."""
    if stages > num_layers:
        raise MeshError(f"mesh.pipe = {stages}: the model has only {num_layers} layers")
    share, extra = divmod(num_layers, stages)
    starts = [stage * share + min(stage, extra) for stage in range(stages + 1)]
    return tuple(range(a, b) for a, b in itertools.pairwise(starts))
