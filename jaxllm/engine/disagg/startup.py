"""From a config with a role to an engine that is ready: one engine, or both sides, each on devices of its own.

In: an EngineConfig. Out: an engine that is warm, and where the seconds of its starts went. Of both sides in one process
the prefill side has the first devices, the decode side those behind them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np

from jaxllm.config import ConfigError, EngineConfig
from jaxllm.engine.disagg.engine import DisaggregatedEngine, schedule_of
from jaxllm.engine.disagg.feeder import FedPages, Feeder
from jaxllm.engine.disagg.handoff import Prefills
from jaxllm.engine.disagg.prefill import PrefillSide
from jaxllm.engine.disagg.sides import decode_side, prefill_side
from jaxllm.engine.engine import Engine
from jaxllm.engine.replicas import ReplicatedEngine
from jaxllm.engine.retry import ShrinkingRunner
from jaxllm.engine.runner import Runner
from jaxllm.engine.startup import Progress, StartReport, start
from jaxllm.graph.kv_cache import KVCache
from jaxllm.graph.page_move import Layout, PagePutter, PageTaker
from sharding.axes import MeshError

BLOCK_PAGES = 64


def start_role(
    config: EngineConfig, progress: Progress | None = None
) -> tuple[Engine | ReplicatedEngine | DisaggregatedEngine, StartReport]:
    """What engine.startup.start says of errors holds here too."""
    role = config.disaggregation.role
    if role == "both":
        return start_both(config, progress)
    if role != "none":
        raise ConfigError(
            f"disaggregation.role = {role!r}: one of several processes; use jaxllm serve or jaxllm launch"
        )
    return start(config, progress=progress)


def start_both(config: EngineConfig, progress: Progress | None = None) -> tuple[DisaggregatedEngine, StartReport]:
    first, second = prefill_side(config), decode_side(config)
    devices, need = jax.devices(), first.mesh.size + second.mesh.size
    if len(devices) < need:
        raise MeshError(
            f"disaggregation: the prefill side needs {first.mesh.size} devices ({first.mesh}) and the decode side "
            f"{second.mesh.size} ({second.mesh}), {need} in all; there are {len(devices)} ({devices[0].platform})"
        )
    decoding, report = _one(start(second, devices=devices[first.mesh.size : need], progress=progress))
    filling, other = _one(start(first, devices=devices[: first.mesh.size], progress=progress))
    for phase, seconds in other.seconds.items():
        report.seconds[f"prefill {phase}"] = seconds
    report.executables += other.executables
    report.total_s += other.total_s
    if filling.grammars is not None:  # those of the decode side serve both
        filling.grammars.close()
    put = PagePutter.compiled(*_cache(decoding, config), _layout(filling), most=_most(decoding))
    side = filler(filling, config, _layout(decoding), lambda block: jax.device_put(block, put.block))
    for layers in put.groups:  # a first run of each, on pages that nobody uses
        for size in put.sizes:
            _putting(decoding, put)(layers, side.send(layers, [0] * size), [None] * size)
    for engine in (decoding, filling):
        _runner(engine).all_compiled()
    return DisaggregatedEngine(decoding, _fed(side, filling, put), _put_fed(decoding, put), len(put.groups)), report


def _fed(side: PrefillSide, filling: Engine, put: PagePutter) -> PrefillSide:
    """The same side with a thread of its own for what its device is given."""
    page_bytes = 2 * filling.model_config.num_kv_heads * math.prod(_pages(filling).shape[2:]) * _pages(filling).itemsize
    size_of = lambda count: next(size for size in put.sizes if size >= count)  # noqa: E731
    feeder = Feeder(side.runner, side.send, lambda layers, count: len(layers) * size_of(count) * page_bytes)
    return dataclasses.replace(side, runner=feeder, send=feeder.send, feeder=feeder)


def start_prefill(config: EngineConfig, progress: Progress | None = None) -> tuple[Engine, PrefillSide, StartReport]:
    """Of a process of its own: blocks go to this host's memory."""
    filling, report = _one(start(prefill_side(config), progress=progress))
    side = filler(filling, config, None, _to_host)
    for layers in side.groups:
        np.asarray(side.send(layers, [0] * side.block_pages))
    _runner(filling).all_compiled()
    return filling, side, report


def start_decode(
    config: EngineConfig, prefills: Callable[[Engine, PagePutter], Prefills], progress: Progress | None = None
) -> tuple[DisaggregatedEngine, StartReport]:
    """Of a process of its own: `prefills` brings blocks from this host's memory to where `block` of the putter says."""
    decoding, report = _one(start(decode_side(config), progress=progress))
    put = PagePutter.compiled(*_cache(decoding, config), None, most=_most(decoding))
    pages = _pages(decoding)
    shape = pages.shape[2:]
    for layers in put.groups:
        for size in put.sizes:
            heads = decoding.model_config.num_kv_heads
            block = np.zeros((len(layers), 2, size, heads, *shape), pages.dtype)
            _putting(decoding, put)(layers, jax.device_put(block, put.block), [None] * size)
    _runner(decoding).all_compiled()
    return DisaggregatedEngine(decoding, prefills(decoding, put), _putting(decoding, put), len(put.groups)), report


def filler(
    engine: Engine, config: EngineConfig, target: Layout | None, carry: Callable[[jax.Array], Any]
) -> PrefillSide:
    """An engine's schedule and runner as a prefill side."""
    taker = PageTaker.compiled(*_cache(engine, config), target, most=_most(engine))
    runner = _runner(engine)
    return PrefillSide(
        schedule_of(engine),
        ShrinkingRunner(runner),
        lambda layers, pages: carry(taker(cast("KVCache", runner.kv), layers, pages)),
        taker.groups,
        taker.sizes[-1],
        config.disaggregation.transfer_bytes,
    )


def _one(started: tuple[Engine | ReplicatedEngine, StartReport]) -> tuple[Engine, StartReport]:
    engine, report = started
    assert isinstance(engine, Engine)
    return engine, report


def _runner(engine: Engine) -> Runner:
    return cast("Runner", engine.runner)


def _pages(engine: Engine) -> jax.Array:
    return cast("KVCache", _runner(engine).kv)[0][0]


def _cache(engine: Engine, config: EngineConfig) -> tuple[KVCache, int, int]:
    kv = cast("KVCache", _runner(engine).kv)
    return kv, engine.model_config.num_kv_heads, config.disaggregation.transfer_layers


def _layout(engine: Engine) -> Layout:
    return Layout.of(cast("KVCache", _runner(engine).kv), engine.model_config.num_kv_heads)


def _most(engine: Engine) -> int:
    """Pages of a block: both sides must come to the same."""
    return min(BLOCK_PAGES, _runner(engine).ladder.width)


def _to_host(block: jax.Array) -> jax.Array:
    block.copy_to_host_async()
    return block


def _putting(engine: Engine, putter: PagePutter) -> Callable[[range, Any, list[int | None]], None]:
    runner = _runner(engine)

    def put(layers: range, block: Any, pages: list[int | None]) -> None:
        runner.kv = putter(cast("KVCache", runner.kv), layers, block, pages)

    return put


def _put_fed(engine: Engine, putter: PagePutter) -> Callable[[range, FedPages, list[int | None]], None]:
    put = _putting(engine, putter)
    return lambda layers, pages, places: put(layers, pages.block.result(), places)
