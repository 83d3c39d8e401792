"""One server from start to end: sockets bound first, then the engine, the address to paste, drain on a signal.

In: a Front. Out: an exit code: 0 after a clean stop, 1 when the engine cannot start or is lost. Knows nothing of flags.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import uvicorn
import uvloop

from jaxllm.config import ConfigError
from serve.app import build_app
from serve.front import Front
from serve.settings import FrontSettings
from serve.wire import protocol_factory

log = logging.getLogger(__name__)

DRAIN_TICK_S = 0.05
ECHO_S = 0.1  # two signals closer than this are one
Say = Callable[[str], None]


def bind(settings: FrontSettings) -> socket.socket:
    """The listening socket, before anything slow happens; ConfigError says why it cannot be had."""
    if settings.uds is not None:
        return _bind_unix(Path(settings.uds))
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((settings.host, settings.port))
    except OSError as error:
        found.close()
        why = {13: "needs more rights", 98: "is in use by another process", 99: "is not an address of this machine"}
        reason = why.get(error.errno or 0, error.strerror or "cannot be used")
        raise ConfigError(f"--host {settings.host} --port {settings.port}: {reason}") from None
    except OverflowError:
        found.close()
        raise ConfigError(f"--port {settings.port}: must be an integer in [0, 65535]") from None
    found.listen(2048)
    return found


def _bind_unix(path: Path) -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and not _answers(path):
            path.unlink()  # left by a server that is gone
        found.bind(str(path))
        os.chmod(path, 0o600)
    except OSError as error:
        found.close()
        raise ConfigError(f"--uds {path}: {error.strerror or error}") from None
    found.listen(2048)
    return found


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def url_of(settings: FrontSettings, bound: socket.socket) -> str:
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def calm_gc() -> None:
    """What start-up made stays: collections look at young objects, and the full ones that stop every stream are rare.

    Measured with benchmarks/front.py on a shared machine: the p99 of added latency goes from 85-110 ms to 17-47 ms.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


class Lifetime:
    """Decides when the server ends and with what code."""

    def __init__(self, front: Front, server: uvicorn.Server) -> None:
        self.front, self.server, self.code = front, server, 0
        self._signalled_s = 0.0
        self._task: asyncio.Task[None] | None = None
        front.client.on_lost = self.lost

    def signalled(self, name: str) -> None:
        now = time.monotonic()
        if self._task is not None and now - self._signalled_s < ECHO_S:
            return  # sent to this process and to its group
        self._signalled_s = now
        if self._task is not None:
            log.warning("%s again: stopping now", name)
            self._stop_now()
            return
        log.warning("%s: no new requests; those in flight get %g s", name, self.front.settings.drain_timeout_s)
        self.front.client.health.draining = True
        self._task = asyncio.get_running_loop().create_task(self._drain())

    def lost(self, why: str) -> None:
        """There will be no engine again: say so to whoever asks during one last moment, and fail."""
        log.error("the engine is lost: %s", why)
        self.code = 1
        asyncio.get_running_loop().call_later(0.2, self._stop_now)

    async def _drain(self) -> None:
        deadline = time.monotonic() + self.front.settings.drain_timeout_s
        while self.front.admission.slots and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_TICK_S)
        self._stop_now()

    def _stop_now(self) -> None:
        self.front.client.fail_all("shutting_down: the server is shutting down")
        self.server.should_exit = True


def make_server(front: Front) -> uvicorn.Server:
    config = uvicorn.Config(
        build_app(front),
        http=protocol_factory(front.settings),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=front.settings.max_header_bytes * 2,
        timeout_graceful_shutdown=5,
        backlog=2048,
    )
    return uvicorn.Server(config)


def serve(front: Front, bound: socket.socket, on_ready: Callable[[str], None] | None = None) -> int:
    """Blocks until the end."""
    server = make_server(front)
    calm_gc()
    lifetime = Lifetime(front, server)

    async def body() -> None:
        loop = asyncio.get_running_loop()
        waiter = loop.create_task(_announce(front, url_of(front.settings, bound), on_ready))
        serving = loop.create_task(server.serve(sockets=[bound]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # after uvicorn has taken them
            loop.add_signal_handler(number, lifetime.signalled, number.name)
        await serving
        waiter.cancel()

    asyncio.run(body(), loop_factory=uvloop.new_event_loop)
    return lifetime.code


async def _announce(front: Front, url: str, on_ready: Callable[[str], None] | None) -> None:
    await front.client.warm()
    if front.client.health.lost is None and on_ready is not None:
        on_ready(url)
