"""One engine in several processes: the leader's start, and a follower's whole life.

In: a GroupPlace and the config that all share. Out: the leader's Engine, whose steps the followers repeat; a follower
never returns. Every process has loaded, compiled and warmed up the same before the first call is sent.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import jax
import numpy as np
from numpy.typing import NDArray

from jaxllm.config import EngineConfig, show
from jaxllm.core import JaxLLMError, RowResult, StepPlan
from jaxllm.engine.engine import Engine
from jaxllm.engine.group import (
    LOST,
    REFUSED,
    SILENT_S,
    Built,
    Devices,
    Following,
    GroupError,
    GroupPlace,
    Leading,
    Reached,
    digest,
)
from jaxllm.engine.replay import Announcer, Follower
from jaxllm.engine.replicas import ReplicatedEngine
from jaxllm.engine.runner import Runner
from jaxllm.engine.startup import StartReport, start

log = logging.getLogger(__name__)


def shared(config: EngineConfig) -> str:
    """A digest of what must be alike in all processes."""
    compile_config = dataclasses.replace(config.compile, cache_dir="", threads=0)
    return digest(show(dataclasses.replace(config, compile=compile_config, log_level="warning", fault="")))


def join_devices(place: GroupPlace) -> Devices:
    """jax.distributed: afterwards jax.devices() are those of all processes. Everybody is there: it cannot take long."""
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.rank,
        initialization_timeout=max(1, round(place.timeout_s)),
        heartbeat_timeout_seconds=max(10, round(SILENT_S * 3)),
    )
    local = jax.local_devices()
    return Devices(local[0].device_kind, len(local))


def check_devices(config: EngineConfig, place: GroupPlace) -> None:
    """Every process must hold a part of the mesh, or it would have nothing to repeat."""
    count = jax.device_count()
    if config.mesh.size < count:
        raise GroupError(
            f"mesh {config.mesh} needs {config.mesh.size} devices and the {place.processes} processes bring {count}: "
            "start fewer processes, or hide devices from them"
        )


def lost(why: str) -> None:
    log.error("the group is lost: %s", why)
    os._exit(LOST)  # collectives of this process may wait for ever


def refused(why: str) -> None:
    log.error("there is no group: %s", why)
    os._exit(REFUSED)


class Together:
    """A start's progress, with one point where all wait for all: compiled, and nothing yet that needs the others.

    The first collective gives up on a process that is half a minute late; compiling may differ by more than that.
    """

    def __init__(self, reach: Callable[[Reached], None]) -> None:
        self._reach, self._lock, self._done = reach, threading.Lock(), False

    def __call__(self, phase: str, share: float) -> None:
        if phase == "compile" and share >= 1.0:
            with self._lock:
                if not self._done:
                    self._done = True
                    self._reach(Reached("compiled"))


@dataclass(frozen=True)
class AllOrNothing:
    """The leader's runner: a step that fails here has left the others somewhere else, so it ends the group."""

    inner: Runner

    def launch(self, plan: StepPlan) -> Any:
        with _ends_the_group():
            return self.inner.launch(plan)

    def choose(self, launched: Any) -> None:
        with _ends_the_group():
            self.inner.choose(launched)

    def collect(self, launched: Any) -> list[RowResult]:
        with _ends_the_group():
            return self.inner.collect(launched)

    def hidden_states(self, token_ids: Sequence[int], start: int, pages: Sequence[int]) -> NDArray[np.float32]:
        with _ends_the_group():
            return self.inner.hidden_states(token_ids, start, pages)


@contextmanager
def _ends_the_group() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        lost(f"a step failed ({_line(error)})")
        raise


def lead(place: GroupPlace, config: EngineConfig) -> tuple[Engine | ReplicatedEngine, StartReport]:
    """Rank 0. JaxLLMError with one line when there is no group or no engine."""
    leading = Leading.gather(place, shared(config), lost)
    try:
        leading.compare(join_devices(place), "unequal hosts")
        check_devices(config, place)
        together = Together(lambda point: leading.compare(point, "not together"))
        engine, report = start(config, progress=together)
        leading.compare(_built(engine), "unequal engines")
    except Exception as error:
        leading.refuse(f"rank 0: {_line(error)}")
        if isinstance(error, JaxLLMError):
            raise
        raise GroupError(_line(error)) from error
    for lane, runner in enumerate(_runners(engine)):
        Announcer(runner, leading.call, lane)
    for each in _engines(engine):
        each.runner = AllOrNothing(cast("Runner", each.runner))
    return engine, report


def follow(place: GroupPlace, config: EngineConfig) -> NoReturn:
    """Every other rank: until the leader ends."""
    following = Following.join(place, shared(config), lost, refused)
    try:
        following.compare(join_devices(place))
        check_devices(config, place)
        engine, _ = start(config, progress=Together(following.compare))
        following.compare(_built(engine))
        follower = Follower(_runners(engine))
        del engine
        while True:
            follower.replay(following.next_call())
    except Exception as error:
        following.refuse(_line(error))
        if isinstance(error, JaxLLMError):
            raise
        raise GroupError(_line(error)) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def _engines(engine: Engine | ReplicatedEngine) -> tuple[Engine, ...]:
    """One a lane."""
    return engine.engines if isinstance(engine, ReplicatedEngine) else (engine,)


def _runners(engine: Engine | ReplicatedEngine) -> list[Runner]:
    found = [each.runner for each in _engines(engine)]
    assert all(isinstance(runner, Runner) for runner in found)
    return cast("list[Runner]", found)


def _built(engine: Engine | ReplicatedEngine) -> Built:
    runner, *_ = _runners(engine)
    names = sorted(map(repr, runner.executables.table))
    return Built(sum(each.scheduler.pool.num_pages for each in _engines(engine)), digest("\n".join(names)))
