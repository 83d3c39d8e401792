"""What the launcher is told: a recipe's [launch] table and flags; and this process's place among others.

Frozen; resolved once. Knows nothing of processes, sockets or JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.config import ConfigError
from serve.launch.environment import Membership

MODES = ("auto", "local", "multihost", "ray")
DEFAULT_PORT = 5790


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    mode: str = "auto"
    processes: int = 0  # of one engine; 0: one, or as many as the scheduler started
    process_id: int = -1  # -1: the scheduler says
    coordinator: str = ""  # host:port of process 0; the port after it is used too
    token_file: str = ""  # a secret the group's processes share
    timeout_s: float = 300.0  # for all processes to come
    max_restarts: int = 3  # of each process or replica, within restart_window_s; then the launcher ends with 1
    restart_window_s: float = 600.0
    replica_port: int = 8100  # of the first replica behind the gateway
    one_server: bool = False  # replicas behind one server, rather than a server each and the gateway
    ray_address: str = "auto"  # of a running cluster; "local" starts one here
    gpus_per_process: int = -1  # -1: what the mesh needs; 0: none are asked for

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"launch.mode = {self.mode!r}: must be one of {', '.join(MODES)}")
        if self.coordinator:
            check_address(self.coordinator)
        for name, low in (("processes", 0), ("process_id", -1), ("max_restarts", 0), ("gpus_per_process", -1)):
            if getattr(self, name) < low:
                raise ConfigError(f"launch.{name} = {getattr(self, name)}: must be at least {low}")
        if self.timeout_s <= 0:
            raise ConfigError(f"launch.timeout_s = {self.timeout_s}: must be more than 0")


def check_address(text: str) -> None:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise ConfigError(f"launch.coordinator = {text!r}: must be host:port, with a port in [1, 65534]")


def launch_settings(table: Mapping[str, Any], flags: Mapping[str, Any]) -> LaunchSettings:
    """Flags beat the recipe's [launch] table, which beats the defaults."""
    known = {item.name: item.default for item in dataclasses.fields(LaunchSettings)}
    values: dict[str, Any] = {}
    for name, value in {**table, **{name: value for name, value in flags.items() if value is not None}}.items():
        if name not in known:
            raise ConfigError(f"unknown setting {name!r} in [launch]; allowed: {', '.join(sorted(known))}")
        kind = type(known[name])
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(f"launch.{name} = {value!r}: must be like {known[name]!r}")
        values[name] = value
    return LaunchSettings(**values)


@dataclass(frozen=True)
class Place:
    """This process among the processes of one engine."""

    coordinator: str
    processes: int
    rank: int
    source: str  # who says so


def place_of(settings: LaunchSettings, found: Membership | None) -> Place:
    """Settings beat the scheduler's word; ConfigError says what neither knows."""
    processes = settings.processes or (found.processes if found else None) or 1
    rank = settings.process_id if settings.process_id >= 0 else (found.rank if found else 0)
    coordinator = settings.coordinator or (found.coordinator if found else None) or ""
    source = "settings" if found is None else found.source
    if processes > 1 and not coordinator:
        raise ConfigError(
            f"process {rank} of {processes} ({source}): nobody says where process 0 is; give --coordinator HOST:PORT"
        )
    if found is not None and found.processes is None and not settings.processes:
        raise ConfigError(f"{source} does not say how many processes there are; give --num-processes")
    if not 0 <= rank < processes:
        raise ConfigError(f"--process-id {rank}: must be in [0, {processes - 1}] ({source})")
    return Place(coordinator, processes, rank, source)


def read_token(settings: LaunchSettings) -> str:
    if not settings.token_file:
        return ""
    try:
        token = Path(settings.token_file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"launch.token_file = {settings.token_file!r}: not readable: {error}") from None
    if len(token) < 16:
        raise ConfigError(f"launch.token_file = {settings.token_file!r}: a token has at least 16 characters")
    return token
