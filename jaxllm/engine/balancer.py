"""Moves routed experts between devices when the load that was measured lies unevenly.

In: a runner, whose steps count the tokens of each expert. Out: the same runner with experts elsewhere, one layer before
a step, so that no step waits long; and what was found, for metrics. What a model says does not change: weights are
copied bit for bit, and only the devices among which a token's sums are formed differ. Knows nothing of requests.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from jaxllm.engine.metrics import Metrics
from jaxllm.graph.experts import LEAVES, TABLE, sparse_layers
from sharding import balance
from sharding.axes import MeshConfig

READINGS = 64  # of the load in an interval: each costs a small copy to the host
WORTH = 0.95  # a layer is moved when its fullest device is to have less than this of what it has


class Measured(Protocol):
    """What is moved: of a Runner."""

    params: Any
    executables: Any
    metrics: Metrics
    load: Any  # of the last step, on the device; None before the first


@dataclass
class Balancer:
    runner: Measured
    config: MeshConfig
    whole: jax.sharding.Sharding
    layers: list[int] = field(init=False)
    slots: list[balance.Slots] = field(init=False)  # by sparse layer: the expert in each slot
    pending: deque[tuple[int, balance.Slots]] = field(default_factory=deque)
    _experts: int = 0
    _load: np.ndarray = field(init=False)  # of this one
    known: np.ndarray = field(init=False)  # f64[layers, experts], of the last whole interval
    _read: deque[Any] = field(default_factory=deque)  # arrays on their way to the host; jax's type leaves is_ready out
    _seen: Any = None  # the last step's
    _steps: int = 0

    def __post_init__(self) -> None:
        self.layers = sparse_layers(self.runner.params)
        tables = [np.asarray(self._layer(place)[TABLE]) for place in range(len(self.layers))]
        self.slots = [balance.slots_of(table) for table in tables]
        self._experts = tables[0].shape[0]
        self._load = np.zeros((len(self.layers), self._experts))
        self.known = np.zeros_like(self._load)

    def _layer(self, place: int) -> dict[str, Any]:
        return self.runner.params["layers"][self.layers[place]]["mlp"]

    def warm_up(self) -> None:
        """The move's first launch, and its memory, before there are requests."""
        leaves = {name: self._layer(0)[name] for name in LEAVES}
        stay = jax.device_put(np.arange(self.slots[0].size, dtype=np.int32), self.whole)
        jax.block_until_ready(self.runner.executables.move_experts(leaves, stay))

    def turn(self) -> None:
        """Before a step: look at the load now and then, and move one layer if any is to move."""
        if self.pending:
            self.move_one()
        load = self.runner.load
        if load is None or load is self._seen:  # no step since the last turn
            return
        self._seen = load
        self._steps += 1
        if self._steps % max(1, self.config.rebalance_interval // READINGS) == 0:
            load.copy_to_host_async()
            self._read.append(load)
        while self._read and self._read[0].is_ready():
            self._load += np.asarray(self._read.popleft())
        if self._steps >= self.config.rebalance_interval:
            self._end_interval()

    def _end_interval(self) -> None:
        self.known, self._load, self._steps = self._load, np.zeros_like(self._load), 0
        found = self.runner.metrics.expert_imbalance = self.imbalance()
        if self.config.rebalance_threshold and found > self.config.rebalance_threshold and not self.pending:
            self.plan()

    def imbalance(self) -> float:
        """The fullest device's load over the mean, on average over layers."""
        load = self._measured()
        pairs = zip(self.slots, load, strict=True)
        return float(np.mean([balance.imbalance(slots, each, self.config.expert) for slots, each in pairs]))

    def _measured(self) -> np.ndarray:
        """Of the last whole interval; until there is one, of the one that runs."""
        while self._read:
            self._load += np.asarray(self._read.popleft())
        return self.known if self.known.any() else self._load

    def plan(self) -> float:
        """Queue what is worth moving; returns the imbalance to be expected then."""
        self.pending.clear()
        load, devices, expected = self._measured(), self.config.expert, []
        for place, (slots, each) in enumerate(zip(self.slots, load, strict=True)):
            before, wanted = balance.imbalance(slots, each, devices), slots
            if each.any():
                wanted = balance.rebalanced(slots, each, devices)
            after = balance.imbalance(wanted, each, devices)
            if after < WORTH * before:
                self.pending.append((place, wanted))
            expected.append(min(before, after))
        self.runner.metrics.expert_rebalances += bool(self.pending)
        return float(np.mean(expected))

    def move_one(self) -> None:
        """One layer. The steps on the device keep the old arrays until they are done."""
        place, wanted = self.pending.popleft()
        layer, slots = self._layer(place), self.slots[place]
        source = balance.sources(slots, wanted, self.config.expert)
        leaves = {name: layer[name] for name in LEAVES}
        layer |= self.runner.executables.move_experts(leaves, jax.device_put(source, self.whole))
        table = balance.table_of(wanted, self._experts, layer[TABLE].shape[1] - 1)
        layer[TABLE] = jax.device_put(table, self.whole)
        jax.block_until_ready([layer[name] for name in LEAVES])  # the old ones are free before the next layer's turn
        self.slots[place] = wanted
        self.runner.metrics.moved_experts += int((slots != wanted).sum())
