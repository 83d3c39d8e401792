"""How commands reach an engine and its events come back: a thread in this process, or a process over ZeroMQ ipc.

In: commands (`send`, from one thread), several at once where the engine should see them so. Out: events (`receive`,
blocking, from one other thread). Both links carry the same typed messages. Knows nothing of streams, restarts or HTTP.
"""

from __future__ import annotations

import contextlib
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

import msgspec
import zmq

from jaxllm.engine.disagg.engine import DisaggregatedEngine
from jaxllm.engine.engine import Engine
from jaxllm.engine.loop import EngineBroken, EngineLoop, watch
from jaxllm.engine.messages import Command, Event, Failed, Stop
from jaxllm.engine.replicas import ReplicatedEngine

STOP_WAIT_S = 5.0
Build = Callable[[], tuple[Engine | ReplicatedEngine | DisaggregatedEngine, dict[str, Any]]]


class Link(Protocol):
    def start(self) -> None: ...

    def send(self, *commands: Command) -> None: ...

    def receive(self, timeout_s: float) -> list[Event]:
        """At least one event, or [] at the timeout or when the engine is gone."""
        ...

    def death(self) -> str | None:
        """Why the engine is gone; None while it lives."""
        ...

    def kill(self) -> None:
        """End it now."""
        ...

    def close(self) -> None: ...


def drain(inbox: queue.SimpleQueue[Any], timeout_s: float) -> list[Any]:
    """All that is in the queue, after waiting for the first."""
    try:
        found = [inbox.get(timeout=timeout_s) if timeout_s > 0 else inbox.get_nowait()]
    except queue.Empty:
        return []
    while True:
        try:
            found.append(inbox.get_nowait())
        except queue.Empty:
            return found


class ThreadLink:
    """The engine in a thread of this process: for debugging and tests."""

    def __init__(self, build: Build, stall_s: float = 1e9) -> None:
        self._build, self._stall_s = build, stall_s
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._death: str | None = None

    def start(self) -> None:
        self._commands, self._events, self._death = queue.SimpleQueue(), queue.SimpleQueue(), None
        self._thread = threading.Thread(
            target=self._body, args=(self._commands, self._events), name="engine", daemon=True
        )
        self._thread.start()

    def _body(self, commands: queue.SimpleQueue[Command], events: queue.SimpleQueue[Event]) -> None:
        try:
            engine, facts = self._build()
            loop = EngineLoop(engine, lambda wait: drain(commands, wait), events.put)
            watch(loop.progress, events.put, lambda: self._die("it hung"), stall_s=self._stall_s)
            loop.run(facts)
            self._die("it was stopped")
        except EngineBroken as error:
            self._die(str(error))
        except Exception as error:
            events.put(Failed(f"{type(error).__name__}: {error}"))
            self._die(f"{type(error).__name__}: {error}")

    def _die(self, why: str) -> None:
        self._death = self._death or why

    def send(self, *commands: Command) -> None:
        for command in commands:
            self._commands.put(command)

    def receive(self, timeout_s: float) -> list[Event]:
        return drain(self._events, timeout_s)

    def death(self) -> str | None:
        return self._death

    def kill(self) -> None:
        self._commands.put(Stop())

    def close(self) -> None:
        self._commands.put(Stop())
        if self._thread is not None:
            self._thread.join(STOP_WAIT_S)


class ProcessLink:
    """The engine in a process of its own, started from `command`.

    The two socket addresses are its last arguments and lie in a directory only this user can enter. `config` goes in
    on its standard input, which stays open: when this process dies, the engine reads the end of file and goes too.
    `environment`: its variables, instead of this process's.
    """

    def __init__(
        self,
        command: list[str],
        config: bytes = b"",
        stderr: IO[Any] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._command, self._config, self._stderr, self.environment = command, config, stderr, environment
        self._context = zmq.Context()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Event).decode
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._push: zmq.Socket[bytes] | None = None
        self._pull: zmq.Socket[bytes] | None = None
        self._lock = threading.Lock()  # the sockets are replaced by the reader thread while the loop may send

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def events(self) -> zmq.Socket[bytes]:
        """Where events come in, to be polled beside those of others; another one after each start."""
        assert self._pull is not None
        return self._pull

    def start(self) -> None:
        """Fresh sockets and a fresh process: nothing meant for the last engine reaches this one."""
        with self._lock:
            self._start()

    def _start(self) -> None:
        self._shut_sockets()
        self._directory = tempfile.TemporaryDirectory(prefix="jaxllm-")
        addresses = [f"ipc://{Path(self._directory.name) / name}" for name in ("commands", "events")]
        push, pull = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        for socket, address in zip((push, pull), addresses, strict=True):
            socket.set_hwm(0)  # admission bounds what is under way
            socket.set(zmq.LINGER, 0)
            socket.bind(address)
        self._push, self._pull = push, pull
        self._process = subprocess.Popen(
            [*self._command, *addresses], stdin=subprocess.PIPE, stderr=self._stderr, env=self.environment
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already; death() says so
            self._process.stdin.write(len(self._config).to_bytes(8, "big") + self._config)
            self._process.stdin.flush()

    def send(self, *commands: Command) -> None:
        message = [self._encode(command) for command in commands]
        with self._lock:
            if self._push is None:
                return
            with contextlib.suppress(zmq.Again):  # nobody is connected: the engine's death ends the stream
                self._push.send_multipart(message, zmq.NOBLOCK)

    def receive(self, timeout_s: float) -> list[Event]:
        assert self._pull is not None
        if not self._pull.poll(int(timeout_s * 1000)):
            return []
        events = [self._decode(self._pull.recv())]
        while len(events) < 64:
            try:
                events.append(self._decode(self._pull.recv(zmq.NOBLOCK)))
            except zmq.Again:
                break
        return events

    def death(self) -> str | None:
        if self._process is None:
            return "it was never started"
        code = self._process.poll()
        if code is None:
            return None
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.send(Stop())
            deadline = time.monotonic() + STOP_WAIT_S
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            self.kill()
        with self._lock:
            self._shut_sockets()
        self._context.term()

    def _shut_sockets(self) -> None:
        for socket in (self._push, self._pull):
            if socket is not None:
                socket.close(linger=0)
        self._push = self._pull = None
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None
