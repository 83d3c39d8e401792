"""A decode server in this process, and the prefill workers of this machine as supervised processes beside it.

In: a Layout of roles. Out: an exit code: 0 after a clean stop, 1 when a worker was given up. Workers of other machines
are started there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from jaxllm.gpus import child_environment, see_gpus
from serve.launch.layout import Layout
from serve.launch.multihost import give_up, serve_here
from serve.launch.settings import LaunchSettings
from serve.launch.supervise import Supervisor


def run_roles(
    layout: Layout, launch: LaunchSettings, source: dict[str, Any], server: dict[str, Any], directory: Path
) -> int:
    *workers, own = layout.processes
    given_up: list[str] = []

    def end(why: str) -> None:
        given_up.append(why)
        give_up(why)

    supervisors = []
    for process in workers:
        if process.where != "here":
            typer.echo(f"{process.name} is to be started on its own host: {process}")
            continue
        changes = {} if process.gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(process.gpus)}
        supervisors.append(
            Supervisor(
                process.name,
                process.command,
                variables=child_environment(**changes),
                max_restarts=launch.max_restarts,
                window_s=launch.restart_window_s,
                on_given_up=end,
            )
        )
    for each in supervisors:
        each.start()
    if own.gpus is not None:
        see_gpus(own.gpus)
    try:
        code = serve_here(source, server, directory)
    finally:
        for each in supervisors:
            each.stop()
    return 1 if given_up else code
