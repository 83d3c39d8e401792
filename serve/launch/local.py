"""Replicas on this machine behind a gateway in this process.

In: a Layout of replicas. Out: an exit code: 0 after a clean stop, 1 when a replica was given up. Each replica is a
`jaxllm serve` with its own devices, supervised; the gateway keeps requests away from one that restarts.
"""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

import typer

from jaxllm.gpus import child_environment
from serve.gateway.run import serve
from serve.gateway.settings import gateway_settings
from serve.launch.layout import Layout
from serve.launch.settings import LaunchSettings
from serve.launch.supervise import Supervisor

log = logging.getLogger(__name__)


def run_replicas(layout: Layout, launch: LaunchSettings, gateway: dict[str, Any]) -> int:
    replicas = layout.processes[:-1]
    urls = ",".join(f"http://127.0.0.1:{launch.replica_port + i}" for i in range(len(replicas)))
    settings = gateway_settings({"workers": urls, **gateway}, {})
    given_up: list[str] = []

    def give_up(why: str) -> None:
        given_up.append(why)
        os.kill(os.getpid(), signal.SIGTERM)

    supervisors = []
    for process in replicas:
        changes = {} if process.gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(process.gpus)}
        supervisors.append(
            Supervisor(
                process.name,
                process.command,
                variables=child_environment(**changes),
                max_restarts=launch.max_restarts,
                window_s=launch.restart_window_s,
                fatal_code=2,
                on_given_up=give_up,
            )
        )

    def started(url: str) -> None:
        typer.echo(f"Gateway at {url} in front of {len(replicas)} replicas")
        for each in supervisors:
            each.start()

    try:
        serve(settings, started)
    finally:
        for each in supervisors:
            each.stop()
    for why in given_up:
        typer.echo(f"error: {why}", err=True)
    return 1 if given_up else 0
