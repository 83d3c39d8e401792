"""`jaxllm launch`: a recipe in; the server, processes, replicas or Ray actors it needs running until they end.

What is wrong is said in one line before anything is started. Knows nothing of HTTP or devices.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxllm.config import ConfigError, load, load_table, model_directory, resolve
from jaxllm.gpus import gpus_here, visible_gpus
from serve.launch.settings import launch_settings

MESH_FLAGS = {
    "data_parallel_size": "data",
    "pipeline_parallel_size": "pipe",
    "context_parallel_size": "seq",
    "expert_parallel_size": "expert",
    "tensor_parallel_size": "tensor",
}


def command(
    model: Annotated[str | None, typer.Argument(help="Model directory; default: the recipe's, else bundled.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Recipe, such as configs/serve/*.toml.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print mesh, bytes a device and commands; exit.")] = False,
    mode: Annotated[str | None, typer.Option(help="auto, local, multihost or ray.")] = None,
    coordinator: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where process 0 is.")] = None,
    num_processes: Annotated[int | None, typer.Option(help="Processes of one engine.")] = None,
    process_id: Annotated[int | None, typer.Option(help="Which of them this is.")] = None,
    token_file: Annotated[str | None, typer.Option(help="File with a secret the processes share.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for all processes to come.")] = None,
    one_server: Annotated[
        bool | None, typer.Option("--one-server", help="Replicas behind one server, without the gateway.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to serve HTTP on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to serve HTTP on.")] = None,
    data_parallel_size: Annotated[int | None, typer.Option("--data-parallel-size", "--dp-size", "-dp")] = None,
    pipeline_parallel_size: Annotated[int | None, typer.Option("--pipeline-parallel-size", "--pp-size", "-pp")] = None,
    context_parallel_size: Annotated[int | None, typer.Option("--context-parallel-size", "-cp")] = None,
    expert_parallel_size: Annotated[int | None, typer.Option("--expert-parallel-size", "--ep-size", "-ep")] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option("--tensor-parallel-size", "--tp-size", "-tp")] = None,
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster: auto, local or HOST:PORT.")] = None,
) -> None:
    """Start what a recipe needs: one process, several, replicas behind a gateway, or Ray actors."""
    given = {name: value for name, value in locals().items() if value is not None}
    flags = {
        name: given[flag]
        for flag, name in {
            "mode": "mode",
            "coordinator": "coordinator",
            "num_processes": "processes",
            "process_id": "process_id",
            "token_file": "token_file",
            "timeout": "timeout_s",
            "ray_address": "ray_address",
            "one_server": "one_server",
        }.items()
        if flag in given
    }
    overrides: dict[str, Any] = {name: given[name] for name in MESH_FLAGS if name in given}
    if model is not None:
        overrides["model"] = model
    raise typer.Exit(_launch(config, flags, overrides, {"host": host, "port": port}, dry_run=dry_run))


def as_flags(overrides: dict[str, Any]) -> tuple[str, ...]:
    """Overrides as arguments of another jaxllm command."""
    found: list[str] = []
    for name, value in overrides.items():
        found += [str(value)] if name == "model" else [f"--{name.replace('_', '-')}", str(value)]
    return tuple(found)


def _launch(
    config: Path | None, flags: dict[str, Any], overrides: dict[str, Any], front: dict[str, Any], *, dry_run: bool
) -> int:
    from serve.launch.environment import membership
    from serve.launch.layout import lay_out, read_model
    from serve.launch.settings import place_of

    launch = launch_settings(load_table(config, "launch"), flags)
    found = None if launch.mode in ("local", "ray") else membership()
    if launch.mode in ("local", "auto") and found is None and launch.processes > 1 and launch.process_id < 0:
        launch = dataclasses.replace(launch, coordinator=launch.coordinator or _free_coordinator())
    if launch.mode == "ray":
        found = None
    engine = load(config, **overrides)
    directory = model_directory(engine.model.path)
    model = read_model(directory)
    on_gpu = gpus_here() > 0
    resolved = resolve(engine, model.context_length, "gpu" if on_gpu or dry_run else "cpu")
    given = {name: value for name, value in front.items() if value is not None}
    server, gateway = load_table(config, "server"), load_table(config, "gateway")
    ray = launch.mode == "ray"
    layout = lay_out(
        resolved,
        launch,
        place_of(dataclasses.replace(launch, processes=1) if ray else launch, found),
        model,
        recipe=config,
        overrides=as_flags(overrides),
        server={**server, **given},
        gateway={**gateway, **given},
        visible=visible_gpus(),
        on_gpu=on_gpu,
    )
    if dry_run:
        typer.echo(str(layout))
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s launch %(levelname)s %(message)s", stream=sys.stderr)
    source = {"config_file": None if config is None else str(config), "overrides": overrides}
    if layout.kind == "ray":
        from serve.launch.ray_cluster import run as run_ray

        return run_ray(layout, launch, gateway | given, config)
    if layout.gateway:
        from serve.launch.local import run_replicas

        return run_replicas(layout, launch, gateway | given)
    if layout.kind == "roles":
        from serve.launch.roles import run_roles

        return run_roles(layout, launch, source, server | given, directory)
    if engine.disaggregation.role == "prefill":
        from serve.disagg.worker import run_worker

        return run_worker(engine)
    from serve.launch.multihost import run_group

    return run_group(layout, launch, source, server | given, directory)


def _free_coordinator() -> str:
    """A loopback address with two free ports, for processes that are all started here."""
    import socket

    for _ in range(50):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return f"127.0.0.1:{port}"
    raise ConfigError("no two neighbouring ports are free on this machine")
