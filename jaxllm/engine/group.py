"""A group of processes that are one engine: how they find each other, agree, and notice that one is gone.

Rank 0 listens beside the coordinator's port; the others call it, show that they know the group's token and that they
run the same versions, config and devices, or are told in one line why not. Then jax.distributed joins their devices.
Afterwards rank 0's calls go down these connections and signs of life come up. Nothing waits longer than it says.

In: a GroupPlace. Out: a Leading or a Following; GroupError with one clear line. Knows nothing of steps or requests.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib.metadata
import os
import platform
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from jaxllm.core import JaxLLMError
from jaxllm.engine.replay import Call

BEAT_S = 2.0
SILENT_S = 20.0  # without a sign of life: the process is stopped or its host is gone
HELLO_S = 10.0  # for one message of the beginning
MAX_MESSAGE_BYTES = 2**28
LOST = 72  # exit code of a process whose group is gone: another start may find a new one
REFUSED = 1  # and of one whose leader cannot start: another start would not change that


class GroupError(JaxLLMError, RuntimeError):
    """The group cannot come together."""


class GroupPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Which process of which group this one is."""

    coordinator: str  # host:port of rank 0; the port after it is the group's own
    processes: int
    rank: int
    token: str = ""
    timeout_s: float = 300.0  # for all to come

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port) + 1


class Hello(msgspec.Struct, tag="hello", frozen=True):
    rank: int
    processes: int
    versions: dict[str, str]
    config: str  # digest of the resolved settings
    proof: bytes


class Devices(msgspec.Struct, tag="devices", frozen=True):
    """What a process brings: alike in all of them."""

    kind: str
    count: int


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    pass


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """To one or all: why there will be no group. From a follower: why it cannot go on."""

    why: str


class Alive(msgspec.Struct, tag="alive", frozen=True):
    pass


class Built(msgspec.Struct, tag="built", frozen=True):
    """The engine's shape: unlike ones would wait for each other for ever."""

    num_pages: int
    executables: str


class Reached(msgspec.Struct, tag="reached", frozen=True):
    """A point where each waits for all: what comes after it must not be minutes apart."""

    what: str


Message = Hello | Devices | Welcome | Refused | Alive | Built | Reached | Call
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


def versions() -> dict[str, str]:
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in ("jaxllm", "jax", "jaxlib"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "source"
    return found


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def proof_of(token: str, nonce: bytes, rank: int) -> bytes:
    return hmac.digest(token.encode(), nonce + rank.to_bytes(4, "big"), "sha256")


class Line:
    """One connection: whole messages, each way by one thread."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that vanished says no goodbye
        for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
            connected.setsockopt(socket.IPPROTO_TCP, option, value)
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        data = _encode(message)
        with self._lock:
            self._socket.sendall(len(data).to_bytes(4, "big") + data)

    def raw(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self, timeout_s: float | None) -> Message:
        """ConnectionError at the end, TimeoutError when nothing comes."""
        self._socket.settimeout(timeout_s)
        size = int.from_bytes(self.exactly(4), "big")
        if size > MAX_MESSAGE_BYTES:
            raise ConnectionError("this is no process of a group")
        try:
            return _decode(self.exactly(size))
        except msgspec.DecodeError:
            raise ConnectionError("this is no process of a group") from None

    def exactly(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            piece = self._socket.recv(size - len(found))
            if not piece:
                raise ConnectionError("the connection ended")
            found += piece
        return bytes(found)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that receives
        self._socket.close()


def hello_of(place: GroupPlace, config: str, nonce: bytes) -> Hello:
    return Hello(place.rank, place.processes, versions(), config, proof_of(place.token, nonce, place.rank))


def difference(ours: Hello, theirs: Hello) -> str | None:
    """Why these two are no group; None when they are."""
    who = f"rank {theirs.rank}"
    for name, version in ours.versions.items():
        other = theirs.versions.get(name, "none")
        if other != version:
            return f"version mismatch: {who} has {name} {other} and rank 0 has {version}"
    if theirs.processes != ours.processes:
        return f"{who} was told of {theirs.processes} processes and rank 0 of {ours.processes}"
    if theirs.config != ours.config:
        return f"config mismatch: the settings of {who} are not those of rank 0"
    return None


@dataclass
class Leading:
    """Rank 0's hold on the others. From `gather` on, a lost process is told to `on_lost`, which ends this one."""

    lines: dict[int, Line]
    on_lost: Callable[[str], None]
    _said: dict[int, queue.SimpleQueue[Message]] = field(default_factory=dict)

    @classmethod
    def gather(cls, place: GroupPlace, config: str, on_lost: Callable[[str], None]) -> Leading:
        """Waits for every other rank. GroupError."""
        listener = _listen(place)
        deadline = time.monotonic() + place.timeout_s
        lines: dict[int, Line] = {}
        try:
            while len(lines) < place.processes - 1:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connected, _ = listener.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, place.processes)) - set(lines))
                    raise GroupError(
                        f"{len(lines) + 1} of {place.processes} processes came within {place.timeout_s:g} s; "
                        f"missing: rank {', '.join(map(str, missing))}"
                    ) from None
                _admit(place, config, connected, lines)
        except GroupError as error:
            _tell_all(lines, Refused(str(error)))
            for line in lines.values():
                line.close()
            raise
        finally:
            listener.close()
        found = cls(lines, on_lost)
        for rank, line in lines.items():
            found._said[rank] = queue.SimpleQueue()
            threading.Thread(target=found._watch, args=(rank, line), daemon=True).start()
        return found

    def compare(self, ours: Devices | Built | Reached, what: str) -> None:
        """All must bring the same; GroupError, told to all, when they do not."""
        for rank, said in self._said.items():
            theirs = said.get()
            if theirs != ours:
                why = f"{what}: rank {rank} has {_show(theirs)} and rank 0 has {_show(ours)}"
                self.refuse(why)
                raise GroupError(why)
        _tell_all(self.lines, Welcome())

    def refuse(self, why: str) -> None:
        """Rank 0 cannot go on."""
        self.on_lost = lambda why: None
        _tell_all(self.lines, Refused(why))

    def close(self) -> None:
        self.on_lost = lambda why: None
        for line in self.lines.values():
            line.close()

    def call(self, call: Call) -> None:
        for rank, line in self.lines.items():
            try:
                line.send(call)
            except OSError:
                self.on_lost(f"rank {rank} is gone")

    def _watch(self, rank: int, line: Line) -> None:
        while True:
            try:
                found = line.receive(SILENT_S)
            except TimeoutError:
                self.on_lost(f"rank {rank} has been silent for {SILENT_S:g} s")
                return
            except OSError:
                self.on_lost(f"rank {rank} is gone")
                return
            if isinstance(found, Refused):
                self.on_lost(f"rank {rank}: {found.why}")
                return
            if not isinstance(found, Alive):
                self._said[rank].put(found)


@dataclass
class Following:
    """Another rank's hold on rank 0. From `join` on, the leader's end is told to `on_lost` and what it cannot start for
    to `on_refused`; either ends this process.
    """

    line: Line
    on_lost: Callable[[str], None]
    on_refused: Callable[[str], None]
    said: queue.SimpleQueue[Message] = field(default_factory=queue.SimpleQueue)

    @classmethod
    def join(
        cls, place: GroupPlace, config: str, on_lost: Callable[[str], None], on_refused: Callable[[str], None]
    ) -> Following:
        """Calls until rank 0 answers. GroupError."""
        deadline = time.monotonic() + place.timeout_s
        line = _connect(place, deadline)
        try:
            nonce = line.exactly(16)
            line.send(hello_of(place, config, nonce))
            answer = line.receive(max(0.1, deadline - time.monotonic()))
        except (OSError, TimeoutError):
            line.close()
            raise GroupError(f"the coordinator {place.coordinator} went away while the group came together") from None
        if isinstance(answer, Refused):
            line.close()
            raise GroupError(answer.why)
        found = cls(line, on_lost, on_refused)
        for body in (found._beat, found._listen):
            threading.Thread(target=body, daemon=True).start()
        return found

    def compare(self, ours: Devices | Built | Reached) -> None:
        """Returns when rank 0 has compared all; a refusal ends this process through `on_refused`."""
        self.line.send(ours)
        while not isinstance(self.said.get(), Welcome):
            continue

    def next_call(self) -> Call:
        while not isinstance(found := self.said.get(), Call):
            continue
        return found

    def refuse(self, why: str) -> None:
        try:
            self.line.send(Refused(why))
        except OSError:
            return  # nobody is left to be told

    def close(self) -> None:
        self.on_lost = self.on_refused = lambda why: None
        self.line.close()

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_S)
            try:
                self.line.send(Alive())
            except OSError:
                return  # the listener says so

    def _listen(self) -> None:
        while True:
            try:
                found = self.line.receive(None)
            except OSError:
                self.on_lost("the leader is gone")
                return
            if isinstance(found, Refused):
                self.on_refused(found.why)
                return
            self.said.put(found)


def _listen(place: GroupPlace) -> socket.socket:
    host, port = place.address
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise GroupError(f"the coordinator's name {host!r} cannot be resolved") from None
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        why = {98: "is in use by another process", 99: "is not an address of this machine, and rank 0 runs here"}
        reason = why.get(error.errno or 0, error.strerror)
        raise GroupError(f"the group's port {host}:{port} (the coordinator's and one) {reason}") from None
    found.listen(place.processes)
    return found


def _admit(place: GroupPlace, config: str, connected: socket.socket, lines: dict[int, Line]) -> None:
    """One caller. A stranger is sent away; a member that does not fit ends the attempt."""
    line, nonce = Line(connected), os.urandom(16)
    try:
        line.raw(nonce)
        hello = line.receive(HELLO_S)
    except (OSError, TimeoutError):
        line.close()
        return
    ours = hello_of(place, config, nonce)
    if not isinstance(hello, Hello) or not hmac.compare_digest(hello.proof, proof_of(place.token, nonce, hello.rank)):
        line.send(Refused("wrong token: this process is not of the group that listens here"))
        line.close()
        return
    why = difference(ours, hello)
    if why is None and not 1 <= hello.rank < place.processes:
        why = f"rank {hello.rank} is not in a group of {place.processes} processes"
    if why is None and hello.rank in lines:
        why = f"two processes say that they are rank {hello.rank}"
    if why is not None:
        line.send(Refused(why))
        line.close()
        raise GroupError(why)
    lines[hello.rank] = line
    line.send(Welcome())


def _connect(place: GroupPlace, deadline_s: float) -> Line:
    reason = "nobody listens there"
    while time.monotonic() < deadline_s:
        try:
            return Line(socket.create_connection(place.address, timeout=min(5.0, place.timeout_s)))
        except OSError as error:
            reason = error.strerror or str(error) or reason
            time.sleep(0.2)
    raise GroupError(f"the coordinator {place.coordinator} did not answer within {place.timeout_s:g} s ({reason})")


def _tell_all(lines: dict[int, Line], message: Message) -> None:
    for line in lines.values():
        try:
            line.send(message)
        except OSError:
            continue  # its watcher says so


def _show(found: Any) -> str:
    match found:
        case Devices():
            return f"{found.count} x {found.kind}"
        case Built():
            return f"{found.num_pages} pages"
    return type(found).__name__
