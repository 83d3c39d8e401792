"""`jaxllm gateway`: flags and a recipe's [gateway] table in, a running gateway out. JAX is not needed for it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from jaxllm.config import load_table
from serve.commands.serve import read_keys
from serve.gateway.settings import gateway_settings


def command(
    workers: Annotated[
        str | None, typer.Option(metavar="URL,URL", help="Servers behind it: http://host:port or unix:/path.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Recipe: TOML with a [gateway] table.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; default 8000, 0 = any.")] = None,
    policy: Annotated[str | None, typer.Option(help="prefix, least_loaded or round_robin.")] = None,
    admin_key: Annotated[list[str] | None, typer.Option(help="Key of /gateway/...; repeatable.")] = None,
    stall_timeout: Annotated[float | None, typer.Option(help="Seconds without progress that end a worker.")] = None,
    drain_timeout: Annotated[float | None, typer.Option(help="Seconds that requests in flight get at the end.")] = None,
    log_level: Annotated[str, typer.Option()] = "warning",
) -> None:
    """One OpenAI endpoint in front of many servers."""
    flags = {
        "workers": workers,
        "host": host,
        "port": port,
        "policy": policy,
        "stall_s": stall_timeout,
        "drain_timeout_s": drain_timeout,
    }
    table = load_table(config, "gateway")
    settings = gateway_settings(table, flags, admin_keys=read_keys(admin_key, None))
    logging.basicConfig(
        level=log_level.upper(), stream=sys.stderr, format="%(asctime)s gateway %(levelname)s %(message)s"
    )
    from serve.gateway.run import serve

    def started(url: str) -> None:
        typer.echo(f"Gateway at {url} in front of {', '.join(settings.workers)}")
        sys.stdout.flush()

    raise typer.Exit(serve(settings, started))
