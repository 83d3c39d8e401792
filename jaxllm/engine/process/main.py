"""The engine's process: config in on standard input, two ZeroMQ addresses as arguments, the loop until told to stop.

Started by links.ProcessLink, never by people. Exit codes: 0 stopped, 1 could not start, 70 hung, 71 broken state. It
ends when standard input closes, so that it never outlives its front. Knows nothing of HTTP or text.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec
import zmq

from jaxllm.config import EngineConfig, load
from jaxllm.core import JaxLLMError
from jaxllm.engine.disagg.engine import DisaggregatedEngine
from jaxllm.engine.engine import Engine
from jaxllm.engine.faults import Fault, FaultyRunner, parse_faults
from jaxllm.engine.group import GroupPlace
from jaxllm.engine.loop import EngineBroken, EngineLoop, Send, watch
from jaxllm.engine.messages import Command, Event, Failed
from jaxllm.engine.replicas import ReplicatedEngine
from jaxllm.engine.retry import ShrinkingRunner
from jaxllm.logs import log_to_stderr
from pallas_kernels.roofline import peak_of

HUNG, BROKEN, CANNOT_START = 70, 71, 1
AnyEngine = Engine | ReplicatedEngine | DisaggregatedEngine
Build = Callable[[dict[str, Any]], tuple[AnyEngine, dict[str, Any]]]
Start = Callable[[EngineConfig], tuple[AnyEngine, Any]]  # with where start-up went


class Channel:
    """The engine's ends of the sockets; a sender a thread, as ZeroMQ sockets belong to one."""

    def __init__(self, commands: str, events: str) -> None:
        self._context, self._events = zmq.Context(), events
        self._pull = self._context.socket(zmq.PULL)
        self._pull.set_hwm(0)
        self._pull.connect(commands)
        self._decode = msgspec.msgpack.Decoder(Command).decode

    def receive(self, timeout_s: float) -> list[Command]:
        if not self._pull.poll(int(timeout_s * 1000)):
            return []
        found = [self._decode(part) for part in self._pull.recv_multipart()]
        while True:
            try:
                found += [self._decode(part) for part in self._pull.recv_multipart(zmq.NOBLOCK)]
            except zmq.Again:
                return found

    def sender(self) -> Send:
        """A function for one thread's events."""
        push, encode = self._context.socket(zmq.PUSH), msgspec.msgpack.Encoder().encode
        push.set_hwm(0)
        push.set(zmq.LINGER, 1000)
        push.connect(self._events)

        def send(event: Event) -> None:
            push.send(encode(event))

        return send

    def close(self) -> None:
        self._context.destroy(linger=1000)


def read_config() -> dict[str, Any]:
    size = int.from_bytes(sys.stdin.buffer.read(8), "big")
    return msgspec.json.decode(sys.stdin.buffer.read(size)) if size else {}


def follow_parent() -> None:
    """Ends this process when standard input does."""

    def body() -> None:
        while sys.stdin.buffer.raw.read(4096):  # type: ignore[attr-defined]
            pass
        os._exit(0)

    threading.Thread(target=body, name="parent", daemon=True).start()


def engines_of(engine: AnyEngine) -> tuple[Engine, ...]:
    """Those that give tokens."""
    if isinstance(engine, DisaggregatedEngine):
        return (engine.decode,)
    return engine.engines if isinstance(engine, ReplicatedEngine) else (engine,)


def guard_runners(engine: AnyEngine, faults: tuple[Fault, ...]) -> None:
    """Every runner gets by with less memory once; faults are the first one's: the others must not notice."""
    engines = engines_of(engine)
    if faults:
        engines[0].runner = FaultyRunner(engines[0].runner, faults)
    for each in engines:
        each.runner = ShrinkingRunner(each.runner)


def start_here(config: EngineConfig) -> tuple[AnyEngine, Any]:
    from jaxllm.engine.disagg.startup import start_role

    return start_role(config)


def build_engine(settings: dict[str, Any], start: Start = start_here) -> tuple[AnyEngine, dict[str, Any]]:
    """The real engine; JAX is imported in `start` and not before."""
    config = load(settings.get("config_file"), **settings.get("overrides", {}))
    faults = parse_faults(config.fault)
    if "group" in settings:
        from jaxllm.engine.group_start import lead

        engine, report = lead(msgspec.convert(settings["group"], GroupPlace), config)
    else:
        engine, report = start(config)
    guard_runners(engine, faults)
    facts: dict[str, Any] = {"seconds": report.seconds, "total_s": report.total_s, "executables": report.executables}
    facts["mesh"] = str(config.mesh)
    facts["dtype"] = engine.config.model.dtype
    if report.memory is not None:
        facts["weights_bytes"] = report.memory.weights_bytes
        facts["cache_bytes"] = report.memory.cache_bytes
    facts |= {"device": report.device_kind, "devices": report.devices}
    meter = engines_of(engine)[0].meter
    if meter is not None:
        facts["kv_token_bytes"] = meter.cost.kv_token_bytes
    peak = peak_of(report.device_kind)
    if peak is not None:
        facts["peak_flops_per_s"] = peak.bf16_flops_per_s * report.devices
        facts["peak_bytes_per_s"] = peak.bytes_per_s * report.devices
    return engine, facts


def run(build: Build) -> int:
    """The whole life of the process; returns its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to the whole group, they are the front's
        signal.signal(number, signal.SIG_IGN)
    settings = read_config()
    follow_parent()
    channel = Channel(*sys.argv[-2:])
    send = channel.sender()
    try:
        engine, facts = build(settings)
    except (JaxLLMError, ValueError, OSError, MemoryError) as error:
        logging.getLogger(__name__).error("the engine cannot start: %s", error)
        send(Failed(str(error) or type(error).__name__, CANNOT_START))
        channel.close()
        return CANNOT_START
    except Exception as error:  # ours to mend: people get the trace, clients only that it failed
        logging.getLogger(__name__).exception("the engine cannot start")
        send(Failed(f"{type(error).__name__} while starting", CANNOT_START))
        channel.close()
        return CANNOT_START
    loop = EngineLoop(engine, channel.receive, send)
    how = {"stall_s": settings.get("stall_s", 60.0), "when_idle": settings.get("beats_when_idle", True)}
    watch(loop.progress, channel.sender(), lambda: os._exit(HUNG), **how)
    gc.collect()
    gc.freeze()  # what start-up made stays: no collection in the middle of a step looks at it
    try:
        loop.run(facts)
    except EngineBroken as error:
        logging.getLogger(__name__).error("the engine cannot go on: %s", error)
        return BROKEN
    return 0


def life(build: Build) -> NoReturn:
    """Of a process that is nothing else."""
    log_to_stderr("WARNING", "engine ")
    code = run(build)
    sys.stderr.flush()
    os._exit(code)  # daemon threads may sit in the device's calls


if __name__ == "__main__":
    life(build_engine)
