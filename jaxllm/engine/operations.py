"""What an operator can ask of a running engine, each a function of (loop, arguments): a value, or a generator that the
loop advances once a turn and whose value is the answer.

In: an EngineLoop and the arguments of a Control. Out: plain values for the Reply; Refused says why not. Knows nothing
of sockets or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.core import JaxLLMError
from jaxllm.engine.disagg.engine import DisaggregatedEngine
from jaxllm.engine.embedding import embed
from jaxllm.engine.engine import Balancer, Residency
from jaxllm.engine.replicas import ReplicatedEngine
from jaxllm.engine.sharded import ShardedScheduler

if TYPE_CHECKING:
    from jaxllm.engine.loop import EngineLoop

Operation = Callable[["EngineLoop", dict[str, Any]], Any]
MODES = ("wait", "abort")  # what becomes of the requests in flight: they are finished, or ended


class Refused(Exception):
    """The operation cannot be done now; `code` is for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def pause(loop: EngineLoop, arguments: dict[str, Any]) -> dict[str, Any]:
    loop.progress.paused = True
    return {"paused": True}


def resume(loop: EngineLoop, arguments: dict[str, Any]) -> dict[str, Any]:
    loop.progress.paused = False
    return {"paused": False}


def reset_prefix_cache(loop: EngineLoop, arguments: dict[str, Any]) -> dict[str, Any]:
    """Forgets every cached page that no running sequence holds."""
    scheduler = loop.engine.scheduler
    count = scheduler.pool.num_cached
    if count:
        scheduler.cache.evict(count)
    return {"evicted_pages": count}


def rebalance_experts(loop: EngineLoop, arguments: dict[str, Any]) -> Generator[None, None, dict[str, Any]]:
    """Experts lie by the load measured so far, one layer a turn; requests go on meanwhile."""
    engines = loop.engine.engines if isinstance(loop.engine, ReplicatedEngine) else (loop.engine,)
    each = (engine.decode if isinstance(engine, DisaggregatedEngine) else engine for engine in engines)
    balancers = [engine.balancer for engine in each if engine.balancer is not None]
    if not balancers:
        needs = "mesh.expert > 1 and mesh.redundant_experts or mesh.rebalance_threshold"
        raise Refused("not_supported", f"this engine's experts stay where they are: that needs {needs}")
    return _rebalance(balancers)


def _rebalance(balancers: list[Balancer]) -> Generator[None, None, dict[str, Any]]:
    before = max(balancer.imbalance() for balancer in balancers)
    expected = max(balancer.plan() for balancer in balancers)
    layers = sum(len(balancer.pending) for balancer in balancers)
    for balancer in balancers:
        while balancer.pending:
            balancer.move_one()
            yield
    return {"imbalance": before, "expected": expected, "layers": layers}


def check(loop: EngineLoop, arguments: dict[str, Any]) -> dict[str, float]:
    """The books balance; what they say now."""
    loop.engine.scheduler.check(loop.borrowed)
    loop.measure()
    return loop.progress.stats


def embedding(loop: EngineLoop, arguments: dict[str, Any]) -> Generator[None, None, list[float]]:
    engine = loop.engine
    if loop.progress.asleep:
        raise Refused("asleep", "the engine is asleep; wake it up first")
    engine = engine.engines[0] if isinstance(engine, ReplicatedEngine) else engine
    engine = engine.decode if isinstance(engine, DisaggregatedEngine) else engine
    scheduler = engine.scheduler.each[0] if isinstance(engine.scheduler, ShardedScheduler) else engine.scheduler
    return embed(engine.runner, scheduler, loop.borrowed, arguments["token_ids"], arguments["pooling"])


# ---- weights and pages ----


def _residency(loop: EngineLoop) -> Residency:
    if loop.engine.residency is None:
        why = "the devices are not this process's own: an engine of several processes takes new weights by a restart"
        raise Refused("not_supported", why)
    return loop.engine.residency


def _alone[T](loop: EngineLoop, mode: str, act: Callable[[], T]) -> Generator[None, None, T]:
    """Acts when nothing runs and nothing is on the device; new requests are held outside meanwhile."""
    if loop.holding:
        raise Refused("invalid_state", "another operation waits for the engine to be quiet")
    loop.holding = True
    try:
        if mode == "abort":
            loop.end_all()
        while loop.engine.has_work or loop.borrowed:
            if loop.progress.paused:
                message = "requests are in flight and the engine is paused: resume it, or use mode abort"
                raise Refused("invalid_state", message)
            yield
        loop.engine.drain()
        reset_prefix_cache(loop, {})
        loop.progress.turn_began_s = None  # what follows takes as long as it takes, and is no hung step
        return act()
    finally:
        loop.release()


def _mode(arguments: dict[str, Any]) -> str:
    mode = arguments.get("mode") or "wait"
    if mode not in MODES:
        raise Refused("invalid_request/mode", f"mode = {str(mode)[:40]!r}: must be one of {', '.join(MODES)}")
    return mode


def sleep(loop: EngineLoop, arguments: dict[str, Any]) -> Generator[None, None, dict[str, Any]]:
    """The device's memory is freed. Level 1 keeps the weights in host memory, level 2 reads them again."""
    keeper, mode, level = _residency(loop), _mode(arguments), arguments.get("level", 1)
    if keeper.asleep:
        raise Refused("invalid_state", "the engine is asleep already")
    if level not in (1, 2) or isinstance(level, bool):
        raise Refused("invalid_request/level", f"level = {str(level)[:40]}: must be 1 or 2")

    def act() -> dict[str, Any]:
        keeper.sleep(level)
        loop.progress.asleep = True
        return {"asleep": True, "level": level}

    return _alone(loop, mode, act)


def wake_up(loop: EngineLoop, arguments: dict[str, Any]) -> dict[str, Any]:
    keeper = _residency(loop)
    if not keeper.asleep:
        raise Refused("invalid_state", "the engine is awake")
    loop.progress.turn_began_s = None
    keeper.wake_up()
    loop.progress.asleep = False
    return {"asleep": False, "weights_version": keeper.version}


def update_weights(loop: EngineLoop, arguments: dict[str, Any]) -> Generator[None, None, dict[str, Any]]:
    """Other weights of the same shapes, from a directory; asleep or awake. Nothing is compiled."""
    keeper, mode = _residency(loop), _mode(arguments)
    directory, version = Path(arguments["path"]), arguments.get("version")
    try:
        keeper.check(directory)  # before anybody is made to wait
    except (OSError, ValueError) as error:  # a name that cannot be one; what is wrong with weights is a ValueError too
        raise Refused("invalid_request/path", str(error)) from None

    def act() -> dict[str, Any]:
        from jaxllm.engine.loop import EngineBroken

        try:
            keeper.update(directory, version)
        except (JaxLLMError, OSError) as error:  # the old weights are gone by now: the files changed since the check
            raise EngineBroken(f"the weights could not be replaced: {error}") from error
        return {"weights_version": keeper.version}

    return _alone(loop, mode, act)


def start_profile(loop: EngineLoop, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"directory": str(_traced(_residency(loop).start_trace))}


def stop_profile(loop: EngineLoop, arguments: dict[str, Any]) -> dict[str, Any]:
    loop.progress.turn_began_s = None
    return {"directory": str(_traced(_residency(loop).stop_trace))}


def _traced(act: Callable[[], Path]) -> Path:
    try:
        return act()
    except JaxLLMError as error:
        raise Refused("invalid_state", str(error)) from None


OPERATIONS: dict[str, Operation] = {
    "pause": pause,
    "resume": resume,
    "reset_prefix_cache": reset_prefix_cache,
    "rebalance_experts": rebalance_experts,
    "check": check,
    "embed": embedding,
    "sleep": sleep,
    "wake_up": wake_up,
    "update_weights": update_weights,
    "start_profile": start_profile,
    "stop_profile": stop_profile,
}
