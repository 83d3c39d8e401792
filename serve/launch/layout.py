"""What a launch will start: a recipe resolved into processes, each with its command, and what each device will hold.

In: the engine's config, the launch, gateway and server tables, this process's place. Out: a Layout, which prints
itself for --dry-run. Starts nothing and imports no JAX.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.config import ConfigError, EngineConfig
from jaxllm.engine.disagg.sides import prefill_side
from jaxllm.gpus import gpu_slices
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.dims import dims_of
from jaxllm.tools.planner import MemoryUse, memory_use
from serve.launch.settings import LaunchSettings, Place
from sharding.axes import MeshConfig, stage_layers
from sharding.axes import check as check_mesh

JAXLLM = (sys.executable, "-m", "serve.cli")
GIB = 2**30
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class Process:
    """One to be started here or elsewhere."""

    name: str
    command: tuple[str, ...]
    gpus: tuple[str, ...] | None = None  # which it sees; None: not limited
    where: str = "here"

    def __str__(self) -> str:
        seen = "" if self.gpus is None else f"CUDA_VISIBLE_DEVICES={','.join(self.gpus)} "
        return f"{self.name} ({self.where}): {seen}{shlex.join(('jaxllm', *self.command[len(JAXLLM) :]))}"


@dataclass(frozen=True)
class Layout:
    kind: str  # one process, processes, replicas, ray
    mesh: MeshConfig
    place: Place
    processes: tuple[Process, ...]
    memory: MemoryUse
    gateway: bool = False
    prefill: tuple[MeshConfig, MemoryUse] | None = None  # where prompts are computed apart; the rest is the decode side

    def __str__(self) -> str:
        sides = [("" if self.prefill is None else " of role decode", self.mesh, self.memory)]
        sides += [(" of role prefill", *self.prefill)] if self.prefill is not None else []
        lines = [f"mesh{side}: {_spelled(mesh)}" for side, mesh, _ in sides]
        lines.append(f"launch: {self.kind}, {len(self.processes)} processes (place: {self.place.source})")
        lines += [f"bytes per device{side}: {memory}" for side, _, memory in sides]
        return "\n".join([*lines, *(f"  {process}" for process in self.processes)])


def _spelled(mesh: MeshConfig) -> str:
    axes = " x ".join(f"{name} {getattr(mesh, name)}" for name in ("data", "pipe", "seq", "expert", "tensor"))
    return f"{mesh} ({axes} = {mesh.size} devices)"


def read_model(directory: Path) -> ModelConfig:
    return ModelConfig.from_directory(directory)


def without_data(overrides: tuple[str, ...]) -> tuple[str, ...]:
    """A replica's flags: how many there are is the launcher's business."""
    at = overrides.index("--data-parallel-size") if "--data-parallel-size" in overrides else len(overrides)
    return overrides[:at] + overrides[at + 2 :]


def lay_out(
    config: EngineConfig,
    launch: LaunchSettings,
    place: Place,
    model: ModelConfig,
    *,
    recipe: Path | None,
    overrides: tuple[str, ...],
    server: dict[str, Any],
    gateway: dict[str, Any],
    visible: list[str] | None,
    on_gpu: bool,
) -> Layout:
    """Raises ConfigError or MeshError with the arithmetic."""
    mesh = config.mesh
    replica = dataclasses.replace(mesh, data=1)
    check_mesh(model, replica)
    stage_layers(model.num_layers, mesh.pipe)
    memory = memory_use(dims_of(model), replica, config)
    base = (*JAXLLM, "serve", *(("-c", str(recipe)) if recipe else ()), *without_data(overrides))
    if config.disaggregation.role != "none":
        return _roles(base, config, launch, place, model, memory, visible if on_gpu else None, on_gpu)
    if launch.mode == "ray":
        return _ray(base, launch, place, mesh, memory, gateway, server)
    if place.processes > 1:
        return _processes(launch, place, mesh, memory, recipe, overrides)
    if mesh.data > 1 and not launch.one_server:
        return _replicas(base, launch, place, mesh, memory, gateway, server, visible if on_gpu else None, on_gpu)
    if launch.mode == "multihost":
        raise ConfigError("launch.mode = 'multihost' and one process: give --num-processes and --coordinator")
    server_command = (*JAXLLM, "serve", *(("-c", str(recipe)) if recipe else ()), *overrides)
    return Layout("one process", mesh, place, (Process("server", server_command),), memory)


def _roles(
    base: tuple[str, ...],
    config: EngineConfig,
    launch: LaunchSettings,
    place: Place,
    model: ModelConfig,
    memory: MemoryUse,
    visible: list[str] | None,
    on_gpu: bool,
) -> Layout:
    """Workers whose address is this machine's own are started here, each with GPUs of its own before the server's."""
    filling, own = prefill_side(config), config.disaggregation
    check_mesh(model, filling.mesh)
    if launch.mode in ("ray", "multihost") or place.processes > 1:
        raise ConfigError(
            f"disaggregation.role = {own.role!r} with launch.mode = {launch.mode!r} and {place.processes} processes of "
            "one engine: start each role by itself, with jaxllm serve --disaggregation-mode"
        )
    prefill = filling.mesh, memory_use(dims_of(model), filling.mesh, filling)
    if own.role != "decode":
        what = "server (both roles)" if own.role == "both" else "prefill worker"
        return Layout("one process", config.mesh, place, (Process(what, base),), memory, prefill=prefill)
    if not own.workers:
        raise ConfigError("disaggregation.role = 'decode': name its prefill workers in disaggregation.workers")
    here = [address for address in own.workers if address.rpartition(":")[0] in LOOPBACK]
    gpus: list[Any] = [None] * (len(here) + 1)
    if on_gpu:
        sizes = [filling.mesh.size] * len(here) + [config.mesh.size]
        single = [gpu for (gpu,) in gpu_slices(sum(sizes), 1, visible)]
        gpus = [tuple(single[sum(sizes[:i]) : sum(sizes[: i + 1])]) for i in range(len(sizes))]
    found = []
    for number, address in enumerate(own.workers):
        command = (*base, "--disaggregation-mode", "prefill", "--prefill-listen", address)
        at = (gpus[here.index(address)], "here") if address in here else (None, "another host")
        found.append(Process(f"prefill worker {number}", command, *at))
    found.append(Process("server (decode)", base, gpus[-1]))
    return Layout("roles", config.mesh, place, tuple(found), memory, prefill=prefill)


def _processes(
    launch: LaunchSettings,
    place: Place,
    mesh: MeshConfig,
    memory: MemoryUse,
    recipe: Path | None,
    overrides: tuple[str, ...],
) -> Layout:
    if mesh.data > 1:
        raise ConfigError(
            f"mesh.data = {mesh.data} in {place.processes} processes of one engine: launch each replica by itself "
            "with data = 1 and put jaxllm gateway before them, or use launch.mode = 'ray'"
        )
    if mesh.attention_data or mesh.balances:
        what = "mesh.attention_data" if mesh.attention_data else "mesh.redundant_experts or rebalance_threshold"
        raise ConfigError(f"{what} in {place.processes} processes: one process drives all devices of such a mesh")
    if mesh.size % place.processes:
        raise ConfigError(f"mesh {mesh}: {mesh.size} devices do not divide over {place.processes} processes")
    here = launch.mode == "local" or (launch.mode == "auto" and launch.process_id < 0 and place.source == "settings")
    found = []
    for rank in range(place.processes):
        command = (*JAXLLM, "launch", *(("-c", str(recipe)) if recipe else ()), *overrides)
        command += ("--coordinator", place.coordinator, "--num-processes", str(place.processes))
        command += ("--process-id", str(rank))
        where = "here" if here or rank == place.rank else "another host"
        found.append(Process(f"rank {rank}{' (leads, serves HTTP)' if not rank else ''}", command, where=where))
    return Layout("processes here" if here else "processes", mesh, place, tuple(found), memory)


def _replicas(
    base: tuple[str, ...],
    launch: LaunchSettings,
    place: Place,
    mesh: MeshConfig,
    memory: MemoryUse,
    gateway: dict[str, Any],
    server: dict[str, Any],
    visible: list[str] | None,
    on_gpu: bool,
) -> Layout:
    slices: list[Any] = gpu_slices(mesh.data, mesh.replica_size, visible) if on_gpu else [None] * mesh.data
    found, urls = [], []
    for replica, gpus in enumerate(slices):
        port = launch.replica_port + replica
        command = (*base, "--data-parallel-size", "1", "--host", "127.0.0.1", "--port", str(port))
        urls.append(f"http://127.0.0.1:{port}")
        found.append(Process(f"replica {replica}", command, gpus))
    host, port = gateway.get("host", server.get("host")), gateway.get("port", server.get("port"))
    command = (*JAXLLM, "gateway", "--workers", ",".join(urls))
    command += (("--host", str(host)) if host else ()) + (("--port", str(port)) if port is not None else ())
    found.append(Process("gateway", command))
    return Layout("replicas and gateway", mesh, place, tuple(found), memory, gateway=True)


def _ray(
    base: tuple[str, ...],
    launch: LaunchSettings,
    place: Place,
    mesh: MeshConfig,
    memory: MemoryUse,
    gateway: dict[str, Any],
    server: dict[str, Any],
) -> Layout:
    each = max(1, launch.processes)
    if mesh.replica_size % each:
        raise ConfigError(f"mesh {mesh}: {mesh.replica_size} devices of a replica do not divide over {each} processes")
    found = []
    for replica in range(mesh.data):
        command = (*base, "--data-parallel-size", "1", "--host", "NODE", "--port", "ANY")
        found += [Process(f"replica {replica} process {rank}", command, where="a ray actor") for rank in range(each)]
    found.append(Process("gateway", (*JAXLLM, "gateway", "--workers", "the replicas' addresses")))
    return Layout("ray", mesh, place, tuple(found), memory, gateway=True)
