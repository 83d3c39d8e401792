"""The big arrays of a runner, off the device and back: sleep, wake up, other weights of the same shapes; traces.

In: a runner, and how to check and load a directory's weights. Out: the same runner with other arrays; the executables
stay, as shapes and placement do, so nothing is compiled. The caller sees to it that no step is on the device. Knows
nothing of requests, queues or HTTP.
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
    """Where a runner's weights and pages are, and which weights they are."""

    runner: BigArrays
    check: Callable[[Path], object]  # raises JaxLLMError when a directory's weights do not fit; touches no device
    load: Callable[[Path], Any]  # the parameters, on the device
    directory: Path
    version: str = "0"
    asleep: int = 0  # 0 = awake, else the level
    updates: int = 0
    trace_directory: Path | None = None
    _host: Any = None
    _pages: list[tuple[jax.ShapeDtypeStruct, ...]] = field(default_factory=list)

    def sleep(self, level: int) -> None:
        """Frees the device of weights and pages; what the pages held is lost."""
        if self.asleep:
            raise ResidencyError("the engine is asleep already")
        if level not in LEVELS:
            raise ResidencyError(f"level = {level}: must be 1 or 2")
        runner = self.runner
        if level == 1:
            self._host = jax.tree.map(lambda leaf: (np.array(leaf), leaf.sharding), runner.params)
        self._pages = [tuple(_shape_of(array) for array in layer) for layer in runner.kv]
        for leaf in (*jax.tree.leaves(runner.params), *jax.tree.leaves(runner.kv)):
            leaf.delete()
        runner.params, runner.kv, self.asleep = None, None, level

    def wake_up(self) -> None:
        """Everything back on the device; the pages are empty."""
        if not self.asleep:
            raise ResidencyError("the engine is awake")
        if self._host is not None:
            is_leaf = lambda value: isinstance(value, tuple)  # noqa: E731
            self.runner.params = jax.tree.map(lambda pair: jax.device_put(*pair), self._host, is_leaf=is_leaf)
        elif self.runner.params is None:
            self.runner.params = self.load(self.directory)
        self.runner.kv = [tuple(_zeros(shape) for shape in layer) for layer in self._pages]
        jax.block_until_ready((self.runner.params, self.runner.kv))
        self._host, self._pages, self.asleep = None, [], 0

    def update(self, directory: Path, version: str | None) -> None:
        """Other weights. The directory is checked whole before the old ones go; then there is room for the new."""
        self.check(directory)
        for leaf in jax.tree.leaves(self.runner.params):  # none while asleep
            leaf.delete()
        self.runner.params, self._host = None, None
        self.runner.params = jax.block_until_ready(self.load(directory))
        self.updates += 1
        self.directory, self.version = directory, version or str(self.updates)

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


def _shape_of(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _zeros(shape: Any) -> jax.Array:
    """From the host, so that nothing is compiled; pages are made anew once a sleep."""
    return jax.device_put(np.broadcast_to(np.zeros((), shape.dtype), shape.shape), shape.sharding)
