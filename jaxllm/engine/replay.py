"""One leader decides, every process computes: executables called here are named to followers, who call the same.

The level is as low as it can be: an executable's name, the host arrays it was given, and names for what earlier calls
made (registers). So followers know nothing of sequences, rows, sampling or of the runner's methods; whatever the
leader's runner does with its table of executables, they repeat in the same order.

In: a runner of the leader, or the calls. Out: calls to send, or the same steps on this process's devices. Knows nothing
of sockets. An executable's results stay in its registers until it is called again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np

NO_STATE = frozenset({"executables", "ladder", "metrics"})  # of a runner's fields: nothing that a call is given
WHOLE = frozenset({"params", "kv"})  # given to calls as they are, never in parts
DEPTH = 2


class Blob(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """An array of the leader's host memory."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Call(msgspec.Struct, tag="call", frozen=True):
    """One call of an executable: a host array, or the name of a register, for each argument."""

    executable: str
    arguments: list[Blob | str]
    lane: int = 0  # which of the leader's runners


class Runs(Protocol):
    """What replaying needs of a runner: a dataclass with a table of executables in it."""

    executables: Any


def registers_of(runner: Any) -> Iterator[tuple[str, Any]]:
    """The name and the value of everything a runner's first calls may be given; alike in every process."""
    for name, value in vars(runner).items():
        if name not in NO_STATE:
            yield from _named(name, value, 0 if name in WHOLE else DEPTH)


def results_of(executable: str, result: Any) -> Iterator[tuple[str, Any]]:
    """The registers a call writes: its result, and that one's parts."""
    yield from _named(f"{executable}=", result, DEPTH)


def _named(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """A value and its parts, by their path. Numbers, texts and host arrays are no registers: they are sent."""
    if value is None or isinstance(value, str | bytes | int | float | np.ndarray | np.generic):
        return
    yield name, value
    if not depth:
        return
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, tuple | list):
        items = zip(getattr(value, "_fields", range(len(value))), value)
    elif dataclasses.is_dataclass(value):
        items = ((spec.name, getattr(value, spec.name)) for spec in dataclasses.fields(value))
    for key, inner in items:
        yield from _named(f"{name}.{key}", inner, 0 if key in WHOLE else depth - 1)


class Announcer:
    """The leader's half: every call of a runner's executables is sent before it is made."""

    def __init__(self, runner: Runs, send: Callable[[Call], None], lane: int = 0) -> None:
        self._send, self._lane = send, lane
        self._values: dict[str, Any] = {}  # keeps what it names alive, so that no id is another's
        self._names: dict[int, str] = {}
        self._inside = False  # a call that is made of others: followers' copies are too
        for name, value in registers_of(runner):
            self._put(name, value)
        table = {key: self._announced(repr(key), compiled) for key, compiled in runner.executables.table.items()}
        runner.executables = dataclasses.replace(runner.executables, table=table)  # others may share the old one

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
            if self._inside:
                return compiled(*arguments)
            self._send(Call(executable, [self._argument(executable, value) for value in arguments], self._lane))
            self._inside = True
            try:
                result = compiled(*arguments)
            finally:
                self._inside = False
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

    def __init__(self, runners: Sequence[Runs]) -> None:
        self._registers = [dict(registers_of(runner)) for runner in runners]
        self._tables = [{repr(key): made for key, made in runner.executables.table.items()} for runner in runners]
        self.calls = 0

    def replay(self, call: Call) -> None:
        registers = self._registers[call.lane]
        arguments = [_value(registers, argument) for argument in call.arguments]
        result = self._tables[call.lane][call.executable](*arguments)
        registers |= dict(results_of(call.executable, result))
        self.calls += 1


def _value(registers: dict[str, Any], argument: Blob | str) -> Any:
    if isinstance(argument, str):
        return registers[argument]
    return np.frombuffer(argument.data, np.dtype(argument.dtype)).reshape(argument.shape)
