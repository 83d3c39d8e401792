"""What the gateway is told: which servers stand behind it, how to choose among them, when to give one up.

Frozen; resolved once by the command line from flags and a recipe's [gateway] table. Knows nothing of sockets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from jaxllm.config import ConfigError

POLICIES = ("prefix", "least_loaded", "round_robin")


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    workers: tuple[str, ...] = ()  # base URLs: http://host:port or unix:/path
    host: str = "127.0.0.1"
    port: int = 8000
    admin_keys: tuple[bytes, ...] = ()  # digests; none = the admin routes are off
    # How a worker is chosen.
    policy: str = "prefix"
    block_bytes: int = 256  # of the prompt, hashed together
    max_blocks: int = 128  # a prompt's blocks beyond these do not matter
    memory_blocks: int = 200_000  # blocks remembered, the least recently used forgotten first
    load_bound: float = 1.25  # a worker takes at most so many times its share of the load
    slack: float = 4.0  # requests by which a worker may always be over its share
    salt: str = ""  # of every hash; gateways that share one place new prompts alike
    # When a worker is given up.
    probe_s: float = 1.0  # between looks at /ready and /metrics
    probe_timeout_s: float = 5.0
    stall_s: float = 30.0  # sequences run and no token comes: the worker is stuck
    connect_timeout_s: float = 2.0
    first_byte_timeout_s: float = 600.0
    break_after: int = 3  # failures in a row that open a worker's circuit
    break_s: float = 1.0  # first pause of an open circuit; doubles up to max_break_s
    max_break_s: float = 30.0
    attempts: int = 4  # of one request, the first included
    wait_s: float = 10.0  # for a worker, when there is none, before a request is refused
    # What is taken from clients.
    max_body_bytes: int = 4 * 2**20
    max_header_bytes: int = 32 * 1024
    max_headers: int = 128
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    idle_timeout_s: float = 120.0
    max_connections: int = 4096
    buffer_bytes: int = 8 * 2**20  # of an answer that is not a stream: held until whole, so that it can be asked again
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.workers:
            raise ConfigError("gateway.workers is empty: name at least one server, as --workers URL,URL")
        for url in self.workers:
            check_url(url)
        if len(set(self.workers)) != len(self.workers):
            raise ConfigError(f"gateway.workers = {', '.join(self.workers)}: each server once")
        if self.policy not in POLICIES:
            raise ConfigError(f"gateway.policy = {self.policy!r}: must be one of {', '.join(POLICIES)}")
        for name in ("block_bytes", "max_blocks", "memory_blocks", "break_after", "attempts", "max_connections"):
            if getattr(self, name) < 1:
                raise ConfigError(f"gateway.{name} = {getattr(self, name)}: must be at least 1")
        if self.load_bound < 1:
            raise ConfigError(f"gateway.load_bound = {self.load_bound}: must be at least 1")


def check_url(url: str) -> None:
    if url.startswith("unix:"):
        return
    parts = urlsplit(url)
    try:
        good = parts.scheme == "http" and parts.hostname and parts.port and parts.path in ("", "/") and not parts.query
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"gateway.workers: {url!r} is no server's address such as http://127.0.0.1:8001")


def gateway_settings(table: Mapping[str, Any], flags: Mapping[str, Any], **fixed: Any) -> GatewaySettings:
    """Flags beat the recipe's [gateway] table, which beats the defaults; ConfigError names what is unknown or wrong."""
    known = {item.name: item for item in dataclasses.fields(GatewaySettings) if item.name != "admin_keys"}
    values: dict[str, Any] = {}
    for name, value in {**table, **{name: value for name, value in flags.items() if value is not None}}.items():
        if name not in known:
            raise ConfigError(f"unknown setting {name!r} in [gateway]; allowed: {', '.join(sorted(known))}")
        values[name] = _read(name, value, known[name].default)
    return GatewaySettings(**values, **fixed)


def _read(name: str, value: Any, default: Any) -> Any:
    if name == "workers":
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"gateway.workers = {value!r}: must be a list of addresses")
        return tuple(item.strip().rstrip("/") for item in items if item.strip())
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, float) and number and value >= 0:
        return float(value)
    if isinstance(default, int) and number and isinstance(value, int) and value >= 0:
        return value
    if isinstance(default, str) and isinstance(value, str):
        return value
    raise ConfigError(f"gateway.{name} = {value!r}: must be like {default!r}")
