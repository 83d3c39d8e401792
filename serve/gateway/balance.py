"""Which worker gets a request: the one that knows its prompt's beginning, unless that one has too much to do.

In: a chain of block hashes and a cost. Out: a worker, or None when none may be asked. Knows nothing of HTTP.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Collection, Sequence

from serve.gateway.affinity import Memory, Ring
from serve.gateway.settings import GatewaySettings
from serve.gateway.worker import Worker

KNOWN_SHARE = 0.5  # of a prompt's blocks that a worker must have seen to be worth going to


class Balancer:
    def __init__(self, settings: GatewaySettings, workers: Sequence[Worker]) -> None:
        self.settings = settings
        self.memory = Memory(settings.memory_blocks)
        self.choices: Counter[str] = Counter()  # why workers were chosen
        self.set_workers(workers)

    def set_workers(self, workers: Sequence[Worker]) -> None:
        """Those there are now; what is known of the others is forgotten."""
        self.workers = {worker.name: worker for worker in workers}
        for name in set(self.memory.blocks) - set(self.workers):
            self.memory.forget(name)
        self._ring = Ring(list(self.workers))
        self._turn = itertools.cycle(list(self.workers))
        for worker in workers:
            worker.on_restart = lambda name=worker.name: self.memory.forget(name)

    def usable(self, exclude: Collection[str] = ()) -> list[Worker]:
        now = time.monotonic()
        return [w for w in self.workers.values() if w.name not in exclude and w.usable(now)]

    def choose(self, chain: Sequence[int], cost: float, exclude: Collection[str] = ()) -> Worker | None:
        found = self.usable(exclude)
        if not found:
            return None
        worker, why = self._choose(found, chain, cost)
        self.choices[why] += 1
        if chain:
            self.memory.remember(chain, worker.name)
        return worker

    def _choose(self, found: list[Worker], chain: Sequence[int], cost: float) -> tuple[Worker, str]:
        if self.settings.policy == "round_robin":
            names = {worker.name for worker in found}
            return self.workers[next(name for name in self._turn if name in names)], "turn"
        if self.settings.policy == "prefix" and chain:
            open_to = {w.name: w for w in found if self._within_bound(w, found, cost)}
            owner, known = self.memory.owner(chain)
            if owner in open_to and known >= KNOWN_SHARE * len(chain):
                return open_to[owner], "known"
            if known < KNOWN_SHARE * len(chain):
                new = len(chain) - known
                for name in self._ring.order(chain[known]):
                    if name in open_to and self._has_room(name, found, new):
                        return open_to[name], "new"
        blocks = self.memory.blocks
        return min(found, key=lambda worker: (worker.burden, blocks[worker.name])), "least_loaded"

    def _within_bound(self, worker: Worker, found: list[Worker], cost: float) -> bool:
        share = (sum(other.burden for other in found) + cost) / len(found)
        return worker.burden + cost <= share * self.settings.load_bound + self.settings.slack

    def _has_room(self, name: str, found: list[Worker], new: int) -> bool:
        """Prompts are spread over caches as load is over engines."""
        blocks = self.memory.blocks
        share = (sum(blocks[other.name] for other in found) + new) / len(found)
        return blocks[name] + new <= share * self.settings.load_bound
