"""One engine in one process or many: process 0 serves HTTP and leads, the others are supervised followers.

Started here all at once (local), or one of them by each scheduler's task (multihost). In: a Layout, this process's
place. Out: an exit code. When any process of the group dies, all of it does, and comes together again: the leader's
supervisor (serve.client) and the followers' (supervise) both count restarts and end non-zero at the limit.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import typer

from jaxllm.engine.group import GroupPlace
from jaxllm.gpus import child_environment, gpu_slices, gpus_here, see_gpus, visible_gpus
from serve.launch.layout import Layout
from serve.launch.settings import LaunchSettings, Place, read_token
from serve.launch.supervise import Supervisor

log = logging.getLogger(__name__)
FOLLOWER = (sys.executable, "-m", "serve.launch.follower")


def group_of(place: Place, launch: LaunchSettings, token: str) -> dict[str, Any]:
    found = GroupPlace(
        coordinator=place.coordinator,
        processes=place.processes,
        rank=place.rank,
        token=token,
        timeout_s=launch.timeout_s,
    )
    return msgspec.to_builtins(found)


def follower(
    layout: Layout, launch: LaunchSettings, source: dict[str, Any], rank: int, token: str, gpus: tuple[str, ...] | None
) -> Supervisor:
    place = Place(layout.place.coordinator, layout.place.processes, rank, layout.place.source)
    settings = msgspec.json.encode({**source, "group": group_of(place, launch, token)})
    changes = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    return Supervisor(
        f"rank {rank}",
        FOLLOWER,
        len(settings).to_bytes(8, "big") + settings,
        child_environment(**changes),
        max_restarts=launch.max_restarts,
        window_s=launch.restart_window_s,
        shows_life=True,
    )


def run_group(
    layout: Layout, launch: LaunchSettings, source: dict[str, Any], server: dict[str, Any], directory: Path
) -> int:
    """Until the front ends, or this follower is given up."""
    place = layout.place
    if place.processes == 1:
        return serve_here(source, server, directory)
    here = layout.kind == "processes here"
    token = read_token(launch) or (secrets.token_hex(16) if here else "")
    if not token:
        log.warning("no launch.token_file: any process that reaches %s may join this group", place.coordinator)
    if not here and place.rank:
        return _follow(follower(layout, launch, source, place.rank, token, None))
    slices = _slices(layout, launch) if here else None
    followers = []
    for rank in range(1, place.processes) if here else ():
        followers.append(follower(layout, launch, source, rank, token, slices[rank] if slices else None))
        followers[-1].on_given_up = give_up
        followers[-1].start()
    if slices is not None:
        see_gpus(slices[0])
    leading = Place(place.coordinator, place.processes, 0, place.source)
    try:
        return serve_here({**source, "group": group_of(leading, launch, token)}, server, directory)
    finally:
        for each in followers:
            each.stop(0.0)


def _slices(layout: Layout, launch: LaunchSettings) -> list[tuple[str, ...]] | None:
    """Which GPUs each process here sees; None where there are none to deal out."""
    if not gpus_here() or launch.gpus_per_process == 0:
        return None
    each = launch.gpus_per_process if launch.gpus_per_process > 0 else layout.mesh.size // layout.place.processes
    return gpu_slices(layout.place.processes, each, visible_gpus())


def give_up(why: str) -> None:
    """What cannot be replaced has gone: the front says so to its streams and ends."""
    log.error("%s", why)
    os.kill(os.getpid(), signal.SIGTERM)


def _follow(supervisor: Supervisor) -> int:
    """Until it is given up (1) or a signal comes (0)."""
    ended = threading.Event()
    reasons: list[str] = []

    def given_up(why: str) -> None:
        reasons.append(why)
        ended.set()

    supervisor.on_given_up = given_up
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    supervisor.start()
    ended.wait()
    supervisor.stop(0.0)
    for why in reasons:
        typer.echo(f"error: {why}", err=True)
    return 1 if reasons else 0


def serve_here(source: dict[str, Any], server: dict[str, Any], directory: Path) -> int:
    from jaxllm.config import environment_api_key
    from serve.commands.serve import front_settings, log_to_stderr, read_keys, run

    keys = {"keys": read_keys(None, None, environment_api_key()), "admin_keys": ()}
    return run(
        front_settings(server, {}, str(directory), keys), directory, source, in_process=False, log=log_to_stderr("INFO")
    )
