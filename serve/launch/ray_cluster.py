"""Replicas on a Ray cluster: a placement group each, an actor for each process, the gateway here.

In: a Layout of kind ray. Out: an exit code. An actor starts `jaxllm serve` (or, for engines of several processes,
`jaxllm launch` of its rank) on its node and watches it; this process asks every actor how it is. A replica one of whose
actors or processes is gone is started anew as a whole, in a fresh placement group, so many times and no more. Needs the
extra `ray`; imports it here and nowhere else.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=false
# Types are checked with and without Ray beside us (make test-ray installs it).
from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from jaxllm.config import ConfigError
from serve.gateway.run import serve
from serve.gateway.settings import gateway_settings
from serve.launch.layout import JAXLLM, Layout
from serve.launch.ray_node import NodeProcess
from serve.launch.settings import LaunchSettings

log = logging.getLogger(__name__)
LOOK_S = 1.0
PLACE_S = 120.0  # for a placement group
COORDINATOR_PORT = 5790


def import_ray() -> Any:
    try:
        import ray  # type: ignore[import-not-found]
    except ImportError:
        raise ConfigError("launch.mode = 'ray' needs Ray: pip install 'jaxllm[ray]'") from None
    return ray


@dataclass
class Replica:
    """One engine somewhere in the cluster."""

    ray: Any
    number: int
    launch: LaunchSettings
    command: tuple[str, ...]  # of jaxllm serve, without its address
    gpus: int  # of each process
    recipe: str | None  # its text: nodes need not have the file
    starts: deque[float] = field(default_factory=deque)
    url: str = ""
    _actors: list[Any] = field(default_factory=list)
    _group: Any = None

    def start(self) -> None:
        """Blocks until its processes have begun; ConfigError when the cluster has no room for them."""
        from ray.util.placement_group import placement_group  # type: ignore[import-not-found]
        from ray.util.scheduling_strategies import (  # type: ignore[import-not-found]
            PlacementGroupSchedulingStrategy,
        )

        ray, each = self.ray, max(1, self.launch.processes)
        bundle: dict[str, float] = {"CPU": 1, **({"GPU": self.gpus} if self.gpus else {})}
        # Engines of several processes may share a node; replicas that need none of each other are spread.
        self._group = placement_group([bundle] * each, strategy="PACK")
        try:
            ray.get(self._group.ready(), timeout=PLACE_S)
        except ray.exceptions.GetTimeoutError:
            raise ConfigError(
                f"replica {self.number} needs {each} x {bundle} and the cluster did not have it within {PLACE_S:g} s"
            ) from None
        actor = ray.remote(NodeProcess)
        self._actors = []
        for rank in range(each):
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
            options = {"num_cpus": 1, "num_gpus": self.gpus, "max_restarts": 0, "scheduling_strategy": strategy}
            self._actors.append(actor.options(**options).remote())
        host, port = ray.get(self._actors[0].address.remote(), timeout=PLACE_S)
        self.url = f"http://{host}:{port}"
        token, coordinator = secrets.token_hex(16), f"{host}:{COORDINATOR_PORT + 2 * self.number}"
        ray.get(
            [
                actor.start.remote(self._arguments(rank, each, host, port, coordinator), self.recipe, token)
                for rank, actor in enumerate(self._actors)
            ],
            timeout=PLACE_S,
        )

    def _arguments(self, rank: int, each: int, host: str, port: int, coordinator: str) -> list[str]:
        command = list(self.command)
        if each > 1:
            command[0] = "launch"
            command += ["--coordinator", coordinator, "--num-processes", str(each), "--process-id", str(rank)]
        return [*command, "--host", host, "--port", str(port)] if not rank else command

    def trouble(self) -> str | None:
        """Why it must be started anew; None while all is well."""
        try:
            for rank, code in enumerate(self.ray.get([actor.code.remote() for actor in self._actors], timeout=30)):
                if code is not None:
                    return f"process {rank} ended with code {code}"
        except self.ray.exceptions.RayError as error:
            return f"an actor or its node is gone ({type(error).__name__})"
        return None

    def stop(self) -> None:
        from ray.util.placement_group import remove_placement_group  # type: ignore[import-not-found]

        for actor in self._actors:
            try:
                self.ray.get(actor.stop.remote(), timeout=15)
            except self.ray.exceptions.RayError:
                log.debug("an actor was gone already")
            self.ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)
        self._actors, self._group = [], None


def watch(replicas: list[Replica], moved: Callable[[str, str], None], give_up: Callable[[str], None]) -> None:
    """For ever, in a thread: starts what died anew; `moved` hears its old and its new address."""
    while True:
        time.sleep(LOOK_S)
        for replica in replicas:
            why = replica.trouble()
            if why is None:
                continue
            limit, now = replica.launch.max_restarts, time.monotonic()
            while replica.starts and now - replica.starts[0] > replica.launch.restart_window_s:
                replica.starts.popleft()
            if len(replica.starts) >= limit:
                give_up(f"replica {replica.number}: {why}; {limit} restarts are the limit")
                return
            replica.starts.append(now)
            log.warning("replica %d: %s; it is started anew", replica.number, why)
            before = replica.url
            replica.stop()
            try:
                replica.start()
            except (ConfigError, replica.ray.exceptions.RayError) as error:
                give_up(f"replica {replica.number} cannot be started anew: {error}")
                return
            moved(before, replica.url)


def run(layout: Layout, launch: LaunchSettings, gateway: dict[str, Any], recipe: Path | None) -> int:
    ray = import_ray()
    if launch.ray_address == "local":
        ray.init(log_to_driver=True, include_dashboard=False)
    else:
        try:
            ray.init(address=launch.ray_address, log_to_driver=True)
        except ConnectionError:
            raise ConfigError(f"launch.ray_address = {launch.ray_address!r}: no Ray cluster answers there") from None
    first = layout.processes[0].command
    command = without_recipe(first[len(JAXLLM) : first.index("--host")])
    text = None if recipe is None else recipe.read_text()
    gpus = launch.gpus_per_process
    if gpus < 0:
        gpus = layout.mesh.replica_size // max(1, launch.processes)
    replicas = [Replica(ray, number, launch, command, gpus, text) for number in range(layout.mesh.data)]
    reasons: list[str] = []
    try:
        for replica in replicas:
            replica.start()
        return _serve(replicas, gateway, reasons)
    finally:
        for replica in replicas:
            replica.stop()
        ray.shutdown()
        for why in reasons:
            typer.echo(f"error: {why}", err=True)


def without_recipe(command: tuple[str, ...]) -> tuple[str, ...]:
    """The node's own copy takes its place."""
    at = command.index("-c") if "-c" in command else len(command)
    return command[:at] + command[at + 2 :]


def _serve(replicas: list[Replica], gateway: dict[str, Any], reasons: list[str]) -> int:
    def give_up(why: str) -> None:
        reasons.append(why)
        os.kill(os.getpid(), signal.SIGTERM)

    def begin(move: Callable[[str, str], None]) -> None:
        threading.Thread(target=watch, args=(replicas, move, give_up), name="watch", daemon=True).start()

    urls = [replica.url for replica in replicas]
    settings = gateway_settings({**gateway, "workers": urls}, {})
    serve(settings, lambda url: typer.echo(f"Gateway at {url} in front of {', '.join(urls)}"), begin)
    return 1 if reasons else 0
