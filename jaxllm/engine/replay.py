"""One leader decides, every process computes: executables called here are named to followers, who call the same.

The level is as low as it can be: an executable's name, the host arrays it was given, and names for what earlier calls
made (registers). So followers know nothing of sequences, rows, sampling or of the runner's methods; whatever the
leader's runner does with its table of executables, they repeat in the same order.

In: a runner of the leader, or the calls. Out: calls to send, or the same steps on this process's devices. Knows nothing
of sockets. An executable's results stay in its registers until it is called again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import msgspec
import numpy as np

INITIAL = ("params", "kv", "counts", "last_tokens", "_logits", "_neutral")  # of a runner: what its calls start from


class Blob(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """An array of the leader's host memory."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Call(msgspec.Struct, tag="call", frozen=True):
    """One call of an executable: a host array, or the name of a register, for each argument."""

    executable: str
    arguments: list[Blob | str]


class Tabled(Protocol):
    """What a table of executables lies in."""

    table: dict[Any, Any]


class Runs(Protocol):
    """What replaying needs of a runner."""

    @property
    def executables(self) -> Tabled: ...


def registers_of(runner: Any) -> Iterator[tuple[str, Any]]:
    """The name and the value of everything a runner's first calls may be given; alike in every process."""
    for name in INITIAL:
        yield from _named(name, getattr(runner, name), 0 if name in ("params", "kv") else 2)


def _named(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    yield name, value
    items: Any = ()
    if depth and isinstance(value, dict):
        items = value.items()
    elif depth and isinstance(value, tuple | list):
        items = enumerate(value)
    for key, inner in items:
        yield from _named(f"{name}.{key}", inner, depth - 1)


def results_of(executable: str, result: Any) -> Iterator[tuple[str, Any]]:
    """The registers a call writes: its result, and that one's parts."""
    yield f"{executable}=", result
    if dataclasses.is_dataclass(result):
        for spec in dataclasses.fields(result):
            yield f"{executable}={spec.name}", getattr(result, spec.name)
    elif isinstance(result, tuple):
        for i, part in enumerate(result):
            yield f"{executable}={i}", part


class Announcer:
    """The leader's half: every call of the runner's executables is sent before it is made."""

    def __init__(self, runner: Runs, send: Callable[[Call], None]) -> None:
        self._send = send
        self._values: dict[str, Any] = {}  # keeps what it names alive, so that no id is another's
        self._names: dict[int, str] = {}
        for name, value in registers_of(runner):
            self._put(name, value)
        table = runner.executables.table
        for key, compiled in table.items():
            table[key] = self._announced(repr(key), compiled)

    def _put(self, name: str, value: Any) -> None:
        old = self._values.get(name)
        if old is not None and self._names.get(id(old)) == name:
            del self._names[id(old)]
        if value is None:
            self._values.pop(name, None)
        else:
            self._values[name] = value
            self._names[id(value)] = name

    def _announced(self, executable: str, compiled: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self._send(Call(executable, [self._argument(executable, value) for value in arguments]))
            result = compiled(*arguments)
            for name, part in results_of(executable, result):
                self._put(name, part)
            return result

        return call

    def _argument(self, executable: str, value: Any) -> Blob | str:
        name = self._names.get(id(value))
        if name is not None:
            return name
        if isinstance(value, np.ndarray | np.generic):
            return Blob(value.dtype.str, value.shape, value.tobytes())
        raise TypeError(f"{executable} was given a {type(value).__name__} that followers cannot have")


class Follower:
    """The other half: calls in, the same calls made here."""

    def __init__(self, runner: Runs) -> None:
        self._registers = dict(registers_of(runner))
        self._table = {repr(key): compiled for key, compiled in runner.executables.table.items()}
        self.calls = 0

    def replay(self, call: Call) -> None:
        arguments = [self._argument(value) for value in call.arguments]
        result = self._table[call.executable](*arguments)
        del arguments
        self._registers |= dict(results_of(call.executable, result))
        self.calls += 1

    def _argument(self, value: Blob | str) -> Any:
        if isinstance(value, str):
            return self._registers[value]
        return np.frombuffer(value.data, np.dtype(value.dtype)).reshape(value.shape)

    def wait(self) -> None:
        """Until this process's devices have done all that was asked."""
        jax.block_until_ready([value for value in self._registers.values() if isinstance(value, jax.Array)])
