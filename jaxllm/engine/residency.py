"""The big arrays of an engine's runners, off the devices and back: sleep, wake up, other weights, traces.

In: the runners of each replica, and how to check and load a directory's weights. Out: the same runners with other
arrays; the executables stay, as shapes and placement do, so nothing is compiled. The caller sees to it that no step is
on a device. Knows nothing of requests, queues or HTTP.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxllm.core import JaxLLMError

LEVELS = (1, 2)  # 1: the weights wait in host memory; 2: they are read again from where they came


class ResidencyError(JaxLLMError, RuntimeError):
    """This cannot be done now; the message says why."""


class BigArrays(Protocol):
    """What is moved: of a Runner."""

    params: Any
    kv: Any


@dataclass
class Residency:
    """Where weights and pages are, and which weights they are."""

    replicas: tuple[tuple[BigArrays, ...], ...]  # those of one replica share its parameters
    check: Callable[[Path], object]  # raises JaxLLMError when a directory's weights do not fit; touches no device
    load: Callable[[int, Path], Any]  # the parameters of a replica, on its devices
    directory: Path
    version: str = "0"
    asleep: int = 0  # 0 = awake, else the level
    updates: int = 0
    trace_directory: Path | None = None
    _host: Any = None  # one copy, as replicas are alike
    _homes: list[Any] = field(default_factory=list)  # where each replica's parameters lie
    _pages: list[list[Any]] = field(default_factory=list)  # by replica and runner

    def sleep(self, level: int) -> None:
        """Frees the device of weights and pages; what the pages held is lost."""
        if self.asleep:
            raise ResidencyError("the engine is asleep already")
        if level not in LEVELS:
            raise ResidencyError(f"level = {level}: must be 1 or 2")
        if level == 1:
            self._host = jax.tree.map(np.array, self.replicas[0][0].params)
            self._homes = [jax.tree.map(lambda leaf: leaf.sharding, lanes[0].params) for lanes in self.replicas]
        self._pages = [[jax.tree.map(_shape_of, runner.kv) for runner in lanes] for lanes in self.replicas]
        for lanes in self.replicas:
            for runner in lanes:
                _delete(runner.kv)
                runner.kv = None
            self._put(lanes, None)
        self.asleep = level

    def wake_up(self) -> None:
        """Everything back on the device; the pages are empty."""
        if not self.asleep:
            raise ResidencyError("the engine is awake")
        for number, lanes in enumerate(self.replicas):
            if self._host is not None:
                self._put(lanes, jax.tree.map(jax.device_put, self._host, self._homes[number]))
            elif lanes[0].params is None:
                self._put(lanes, self.load(number, self.directory))
            for runner, pages in zip(lanes, self._pages[number], strict=True):
                runner.kv = jax.tree.map(_zeros, pages)
            jax.block_until_ready([(runner.params, runner.kv) for runner in lanes])
        self._host, self._homes, self._pages, self.asleep = None, [], [], 0

    def update(self, directory: Path, version: str | None) -> None:
        """Other weights. The directory is checked whole before the old ones go; then there is room for the new."""
        self.check(directory)
        self._host = None
        for number, lanes in enumerate(self.replicas):
            self._put(lanes, None)
            self._put(lanes, jax.block_until_ready(self.load(number, directory)))
        self.updates += 1
        self.directory, self.version = directory, version or str(self.updates)

    def _put(self, lanes: tuple[BigArrays, ...], params: Any) -> None:
        """Other parameters for all runners of a replica; those they had are freed."""
        _delete(lanes[0].params)  # none while asleep
        for runner in lanes:
            runner.params = params

    def start_trace(self) -> Path:
        """A profile of the device, into a new directory."""
        if self.trace_directory is not None:
            raise ResidencyError("a trace is being taken already")
        self.trace_directory = Path(tempfile.mkdtemp(prefix="jaxllm-trace-"))
        jax.profiler.start_trace(str(self.trace_directory))
        return self.trace_directory

    def stop_trace(self) -> Path:
        if self.trace_directory is None:
            raise ResidencyError("no trace is being taken")
        found, self.trace_directory = self.trace_directory, None
        jax.profiler.stop_trace()
        return found


def _delete(arrays: Any) -> None:
    for leaf in jax.tree.leaves(arrays):
        leaf.delete()


def _shape_of(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _zeros(shape: Any) -> jax.Array:
    """From the host, so that nothing is compiled; pages are made anew once a sleep."""
    return jax.device_put(np.broadcast_to(np.zeros((), shape.dtype), shape.shape), shape.sharding)
