"""One gateway from start to end: the socket bound first, then probes, the address to paste, drain on a signal.

In: settings. Out: an exit code. Knows nothing of flags.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import time
from collections.abc import Callable

import uvloop

from jaxllm.config import ConfigError
from serve.gateway.listener import Listener
from serve.gateway.probes import watch
from serve.gateway.service import Gateway
from serve.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """ConfigError says why the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        why = {13: "needs more rights", 98: "is in use by another process", 99: "is not an address of this machine"}
        raise ConfigError(f"--host {host} --port {port}: {why.get(error.errno or 0, error.strerror)}") from None
    except OverflowError:
        found.close()
        raise ConfigError(f"--port {port}: must be an integer in [0, 65535]") from None
    found.listen(2048)
    found.setblocking(False)
    return found


Move = Callable[[str, str], None]  # a worker's old and new address, from any thread


async def run(
    settings: GatewaySettings,
    bound: socket.socket,
    on_start: Callable[[str], None],
    with_move: Callable[[Move], None] | None = None,
) -> None:
    """Until a signal; a second one ends it at once. `with_move` is given what moves a worker to another address."""
    loop = asyncio.get_running_loop()
    gateway = Gateway(settings)
    listener = Listener(settings, gateway.handle)
    server = await loop.create_server(listener.make, sock=bound, backlog=2048)
    tasks = [loop.create_task(watch(gateway, worker)) for worker in gateway.workers]
    tasks.append(loop.create_task(listener.sweep()))

    def move(old: str, new: str) -> None:
        tasks.append(loop.create_task(watch(gateway, gateway.move(old, new))))

    if with_move is not None:
        with_move(lambda old, new: loop.call_soon_threadsafe(move, old, new) and None)
    signals: asyncio.Queue[str] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, signals.put_nowait, number.name)
    host, port = bound.getsockname()[:2]
    on_start(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    name = await signals.get()
    log.warning("%s: no new requests; those in flight get %g s", name, settings.drain_timeout_s)
    gateway.draining = True
    deadline = time.monotonic() + settings.drain_timeout_s
    while listener.tasks and time.monotonic() < deadline and signals.empty():
        await asyncio.sleep(0.05)
    server.close()
    for worker in gateway.workers:
        worker.unready("the gateway is shutting down", lost=True)
    await asyncio.sleep(0)
    listener.finish()
    for task in tasks:
        task.cancel()
    await asyncio.sleep(0.05)
    gateway.close()


def serve(
    settings: GatewaySettings, on_start: Callable[[str], None], with_move: Callable[[Move], None] | None = None
) -> int:
    """Blocks until the end."""
    bound = bind(settings.host, settings.port)
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    asyncio.run(run(settings, bound, on_start, with_move), loop_factory=uvloop.new_event_loop)
    return 0
