"""One engine in several processes: the leader's start, and a follower's whole life.

In: a GroupPlace and the config that all share. Out: the leader's Engine, whose steps the followers repeat; a follower
never returns. Every process has loaded, compiled and warmed up the same before the first call is sent.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import NoReturn

import jax

from jaxllm.config import EngineConfig, show
from jaxllm.engine.engine import Engine
from jaxllm.engine.group import LOST, Built, Following, GroupError, GroupPlace, Leading, digest, join_devices
from jaxllm.engine.replay import Announcer, Follower
from jaxllm.engine.runner import Runner
from jaxllm.engine.startup import StartReport, start

log = logging.getLogger(__name__)


def shared(config: EngineConfig) -> str:
    """A digest of what must be alike in all processes."""
    compile_config = dataclasses.replace(config.compile, cache_dir="", threads=0)
    return digest(show(dataclasses.replace(config, compile=compile_config, log_level="warning", fault="")))


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


def lead(place: GroupPlace, config: EngineConfig) -> tuple[Engine, StartReport]:
    """Rank 0. JaxLLMError with one line when there is no group or no engine."""
    leading = Leading.gather(place, shared(config), lost)
    try:
        leading.compare(join_devices(place), "unequal hosts")
        check_devices(config, place)
        engine, report = start(config, device=jax.local_devices()[0])
        leading.compare(_built(engine), "unequal engines")
    except Exception as error:
        leading.refuse(f"rank 0: {error}")
        raise
    assert isinstance(engine.runner, Runner)
    Announcer(engine.runner, leading.call)
    return engine, report


def follow(place: GroupPlace, config: EngineConfig) -> NoReturn:
    """Every other rank: until the leader ends."""
    following = Following.join(place, shared(config), lost)
    try:
        following.compare(join_devices(place))
        check_devices(config, place)
        engine, _ = start(config, device=jax.local_devices()[0])
        following.compare(_built(engine))
        assert isinstance(engine.runner, Runner)
        follower = Follower(engine.runner)
        del engine
        while True:
            follower.replay(following.next_call())
    except Exception as error:
        following.refuse(str(error) or type(error).__name__)
        raise


def _built(engine: Engine) -> Built:
    runner = engine.runner
    assert isinstance(runner, Runner)
    return Built(engine.scheduler.pool.num_pages, digest("\n".join(sorted(map(repr, runner.executables.table)))))
