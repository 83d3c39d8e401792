"""Devices arranged as meshes: one jax Mesh for every pipeline stage of every replica.

In: a MeshConfig and devices. Out: meshes with the axes seq, expert, tensor, devices of one stage next to each other;
or a MeshError that counts devices. Over several processes the last stage, whose results are read, has the first ones:
those of the process that leads. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sharding.axes import MeshConfig, MeshError

STAGE_AXES = ("seq", "expert", "tensor")
SHARD_AXES = ("expert", "tensor")  # along which one layer's matrices are cut


def stage_meshes(config: MeshConfig, devices: Sequence[Any] | None = None) -> tuple[tuple[Mesh, ...], ...]:
    """[replica][stage] -> Mesh over the first `config.size` devices."""
    found = list(jax.devices() if devices is None else devices)
    if len(found) < config.size:
        counts = f"{config.data} x {config.pipe} x {config.seq} x {config.expert} x {config.tensor}"
        raise MeshError(
            f"mesh {config} needs data x pipe x seq x expert x tensor = {counts} = {config.size} devices; "
            f"there are {len(found)} ({found[0].platform if found else 'none'})"
        )
    processes = len({device.process_index for device in found[: config.size]})
    if processes > 1 and config.data > 1:
        raise MeshError(
            f"mesh.data > 1 over {processes} processes: an engine drives replicas of its own process only; "
            "spread mesh.tensor or mesh.pipe over processes, or start one engine a process behind the gateway"
        )
    if processes > 1 and config.attention_data:
        raise MeshError(
            f"mesh.attention_data over {processes} processes: one process schedules all shards and reads their tokens; "
            "start one engine a process behind the gateway instead"
        )
    if processes > 1 and config.balances:
        raise MeshError(
            f"mesh.redundant_experts or rebalance_threshold over {processes} processes: experts are moved within one "
            "process only; leave both at 0"
        )
    shape = (config.data, config.pipe, config.seq, config.expert, config.tensor)
    grid = np.array(found[: config.size], dtype=object).reshape(shape)
    if processes > 1:
        grid = grid[:, ::-1]
    auto = (AxisType.Auto,) * len(STAGE_AXES)
    return tuple(tuple(Mesh(stage, STAGE_AXES, axis_types=auto) for stage in replica) for replica in grid)
