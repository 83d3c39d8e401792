"""Which implementation of an op runs: ordered candidates, the first that accepts its arguments wins.

In: registrations (op, name, a loader that imports the kernel only when it is wanted, platforms) and calls.
Out: the result of the first implementation of the platform that does not raise NotImplementedError("why"); every
other exception is a bug and propagates. The choice is logged once per outcome and shown by `explain()`.
It does not know what the ops compute: argument checks live in `<op>/api.py`, which also registers the op's
implementations, best first, the reference last.

Platforms are JAX backend names ("cpu", "gpu") and "interpret": kernels run by the Pallas interpreter on a CPU, for
tests. A kernel joins by two lines in `<op>/api.py` above the reference's line:

    register("page_write", "triton", imported("pallas_kernels.page_write.triton:page_write"), platforms=("gpu",))
    register("page_write", "triton_interpret", imported("...:page_write_interpret"), platforms=("interpret",))

An op's name is its room, or its room, a dot and a word ("paged_attention.decode") when the room holds several.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

type Kernel = Callable[..., Any]

ALL_PLATFORMS = ("cpu", "gpu", "interpret")
_GPU_NAMES = ("cuda", "rocm")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op. Calling it imports the kernel; nothing is imported before."""

    op: str
    name: str
    loader: Callable[[], Kernel]
    platforms: tuple[str, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.load()(*args, **kwargs)

    def load(self) -> Kernel:
        """The kernel itself. A stack that is not installed here reads as "not me"."""
        try:
            return self.loader()
        except ImportError as error:
            raise NotImplementedError(f"{self.op}/{self.name} cannot be imported: {error}") from error


@dataclass(frozen=True)
class Choice:
    """One outcome of a dispatch: who ran, and who was asked before and why they declined."""

    op: str
    platform: str
    name: str
    refused: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        declined = "; ".join(f"{name} declined: {why}" for name, why in self.refused)
        return f"{self.op} on {self.platform}: {self.name}" + (f" ({declined})" if declined else "")


def imported(target: str) -> Callable[[], Kernel]:
    """A loader for "module:function" that imports the module when called."""
    module, _, function = target.partition(":")
    if not module or not function:
        raise ValueError(f'a loader target reads "module:function", got {target!r}')
    return lambda: getattr(importlib.import_module(module), function)


def current_platform() -> str:
    """The platform calls run on when none is named; asks JAX, and so initialises its backend, only now."""
    return _canonical(jax.default_backend())


def _canonical(platform: str) -> str:
    return "gpu" if platform in _GPU_NAMES else platform


class Registry:
    """Ordered implementations per op, and the choices made among them. Tests make their own."""

    def __init__(self) -> None:
        self._implementations: dict[str, list[Implementation]] = {}
        self._choices: dict[Choice, None] = {}

    def register(
        self, op: str, name: str, loader: Callable[[], Kernel], platforms: tuple[str, ...] = ALL_PLATFORMS
    ) -> None:
        """Append an implementation: earlier ones are preferred. Names are unique within an op."""
        known = self._implementations.setdefault(op, [])
        if any(other.name == name for other in known):
            raise ValueError(f"{op} already has an implementation named {name!r}")
        known.append(Implementation(op, name, loader, tuple(_canonical(platform) for platform in platforms)))

    def implementations(self, op: str, platform: str | None = None) -> tuple[Implementation, ...]:
        """Every implementation of `op`, best first; with a platform, only those that run there."""
        if op not in self._implementations:
            _import_room(op)
        if op not in self._implementations:
            raise ValueError(f"unknown op {op!r}; known: {', '.join(sorted(self._implementations)) or 'none'}")
        found = tuple(self._implementations[op])
        if platform is None:
            return found
        return tuple(each for each in found if _canonical(platform) in each.platforms)

    def dispatch(self, op: str, *, implementation: str | None = None, platform: str | None = None) -> Kernel:
        """A callable that runs `op` through the first implementation that accepts the arguments.

        `implementation` pins one by name, whatever its platforms: it runs or its refusal propagates. `platform`
        replaces the present backend's name ("interpret" in tests).
        """
        if implementation is not None:
            return self._pinned(op, implementation).load()

        def call(*args: Any, **kwargs: Any) -> Any:
            where = current_platform() if platform is None else _canonical(platform)
            refused: list[tuple[str, NotImplementedError]] = []
            for candidate in self.implementations(op, where):
                try:
                    result = candidate(*args, **kwargs)
                except NotImplementedError as reason:
                    refused.append((candidate.name, reason))
                else:
                    self._note(Choice(op, where, candidate.name, tuple((name, str(why)) for name, why in refused)))
                    return result
            if not refused:
                raise NotImplementedError(f"{op} has no implementation for platform {where!r}")
            for name, reason in refused:
                reason.add_note(f"from {op}/{name}")
            raise ExceptionGroup(
                f"{op}: nobody on {where!r} accepted these arguments", [reason for _, reason in refused]
            )

        return call

    def explain(self) -> str:
        """What has been chosen so far, one outcome a line, with the reasons of those that declined."""
        return "\n".join(str(choice) for choice in tuple(self._choices)) or "nothing has been dispatched yet"

    def _pinned(self, op: str, name: str) -> Implementation:
        for candidate in self.implementations(op):
            if candidate.name == name:
                return candidate
        names = ", ".join(each.name for each in self.implementations(op))
        raise ValueError(f"{op} has no implementation named {name!r}; it has {names}")

    def _note(self, choice: Choice) -> None:
        if choice not in self._choices:
            self._choices[choice] = None
            logger.info("%s", choice)


def _import_room(op: str) -> None:
    """Registrations live in `<room>/api.py`; importing it makes them, and imports no kernel."""
    api = f"{__package__}.{op.partition('.')[0]}.api"
    try:
        importlib.import_module(api)
    except ModuleNotFoundError as error:
        if error.name is None or not api.startswith(error.name):
            raise


_registry = Registry()  # the process's one table of kernels: filled at import of the rooms, never by requests
register = _registry.register
implementations = _registry.implementations
dispatch = _registry.dispatch
explain = _registry.explain
