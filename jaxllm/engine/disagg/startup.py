"""From a config with a role to an engine that is ready: one engine, or both sides, each on devices of its own.

In: an EngineConfig. Out: an engine that is warm, and where the seconds of its starts went. Of both sides in one process
the prefill side has the first devices, the decode side those behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax

from jaxllm.config import EngineConfig
from jaxllm.engine.disagg.engine import DisaggregatedEngine
from jaxllm.engine.disagg.prefill import PrefillSide
from jaxllm.engine.disagg.sides import decode_side, prefill_side
from jaxllm.engine.engine import Engine
from jaxllm.engine.replicas import ReplicatedEngine
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
    return start_both(config, progress) if config.disaggregation.role == "both" else start(config, progress=progress)


def start_both(config: EngineConfig, progress: Progress | None = None) -> tuple[DisaggregatedEngine, StartReport]:
    first, second = prefill_side(config), decode_side(config)
    devices, need = jax.devices(), first.mesh.size + second.mesh.size
    if len(devices) < need:
        raise MeshError(
            f"disaggregation: the prefill side needs {first.mesh.size} devices ({first.mesh}) and the decode side "
            f"{second.mesh.size} ({second.mesh}), {need} in all; there are {len(devices)} ({devices[0].platform})"
        )
    decoding, report = start(second, devices=devices[first.mesh.size : need], progress=progress)
    filling, other = start(first, devices=devices[: first.mesh.size], progress=progress)
    for phase, seconds in other.seconds.items():
        report.seconds[f"prefill {phase}"] = seconds
    report.executables += other.executables
    assert isinstance(decoding, Engine)
    assert isinstance(filling, Engine)
    if filling.grammars is not None:  # those of the decode side serve both
        filling.grammars.close()
    return connect(decoding, filling, config), report


def connect(decoding: Engine, filling: Engine, config: EngineConfig) -> DisaggregatedEngine:
    """Two engines of one model as two sides: their pages move from device to device."""
    source, target = cast("Runner", filling.runner), cast("Runner", decoding.runner)
    heads, at_once = decoding.model_config.num_kv_heads, config.disaggregation.transfer_layers
    layouts = [Layout.of(cast("KVCache", runner.kv), heads) for runner in (source, target)]
    most = min(BLOCK_PAGES, source.ladder.width)
    taker = PageTaker.compiled(cast("KVCache", source.kv), heads, layouts[1], at_once, most)
    putter = PagePutter.compiled(cast("KVCache", target.kv), heads, layouts[0], at_once, most)
    take, put = taking(source, taker), putting(target, putter)
    for layers in taker.groups:  # a first run of each, on pages that nobody uses
        for size in taker.sizes:
            put(layers, jax.device_put(take(layers, [0] * size), putter.block), [None] * size)
    side = PrefillSide(
        filling.scheduler,
        source,
        take,
        taker.groups,
        taker.sizes[-1],
        lambda block: jax.device_put(block, putter.block),
        config.disaggregation.transfer_bytes,
    )
    for runner in (source, target):
        runner.count_compiles()
    return DisaggregatedEngine(decoding, side, put, len(taker.groups))


def taking(runner: Runner, taker: PageTaker) -> Callable[[range, list[int]], jax.Array]:
    return lambda layers, pages: taker(cast("KVCache", runner.kv), layers, pages)


def putting(runner: Runner, putter: PagePutter) -> Callable[[range, Any, list[int | None]], None]:
    def put(layers: range, block: Any, pages: list[int | None]) -> None:
        runner.kv = putter(cast("KVCache", runner.kv), layers, block, pages)

    return put
