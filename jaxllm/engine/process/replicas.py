"""Replicas as processes: from one config to a link over one process a replica.

In: an EngineConfig with mesh.data replicas. Out: a FleetLink, not started, or an engine over one; each process gets the
config of one replica, GPUs of its own and its share of the cores to compile on. Imports no JAX: this process leaves the
devices alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from jaxllm.config import ConfigError, EngineConfig
from jaxllm.engine.process.fleet import FleetLink, Restarts
from jaxllm.engine.process.links import ProcessLink
from jaxllm.engine.process.remote import RemoteEngine
from jaxllm.gpus import gpu_slices, gpus_here, runs_on_gpus, seeing, visible_gpus

COMMAND = (sys.executable, "-m", "jaxllm.engine.process.main")


def fleet(config: EngineConfig, restarts: Restarts | None = None, **settings: Any) -> FleetLink:
    """`settings`: what engine processes are told beside their config."""
    environments = _environments(config)
    links = []
    for number in range(config.mesh.data):
        told = {**settings, "overrides": dataclasses.asdict(one_replica(config, number))}
        links.append(ProcessLink([*COMMAND], json.dumps(told).encode(), environment=environments[number]))
    return FleetLink(links, {"mesh": str(config.mesh)}, restarts)


def remote_engine(config: EngineConfig, progress: Callable[[str, float], None] | None = None) -> RemoteEngine:
    """For LLM, which listens while it asks for something, and else not."""
    link = fleet(config, Restarts(silent_s=math.inf), beats_when_idle=False)
    tell = progress or (lambda phase, share: None)
    return RemoteEngine(link, config, lambda: tell("replicas", link.num_ready / config.mesh.data))


def one_replica(config: EngineConfig, number: int) -> EngineConfig:
    """A fault is the first one's: the others must not notice."""
    threads = config.compile.threads or max(1, (os.cpu_count() or 1) // config.mesh.data)
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, data=1),
        compile=dataclasses.replace(config.compile, threads=threads),
        fault=config.fault if number == 0 else "",
    )


def _environments(config: EngineConfig) -> list[dict[str, str] | None]:
    """Of each process; None: this one's. Where nobody knows of GPUs they are dealt out too: it does no harm."""
    mesh, visible, here = config.mesh, visible_gpus(), gpus_here()
    if not runs_on_gpus() and (visible is not None or here):
        return [None] * mesh.data  # they are there, and not to be used
    if visible is None and 0 < here < mesh.size:
        raise ConfigError(f"mesh {mesh}: {mesh.data} replicas x {mesh.replica_size} GPUs = {mesh.size}, of {here} here")
    return [seeing(gpus) for gpus in gpu_slices(mesh.data, mesh.replica_size, visible)]
