"""Schedulers of shards whose steps are one: each with rows, pages and a prefix cache of its own (attention data).

In and out: as one Scheduler, but plans are ShardedPlans. A request goes, with all its sequences, to the shard with the
fewest tokens before it and stays there. Knows nothing of models, devices or why there are shards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field

from jaxllm.core import FinishReason, RowResult, Sequence, ShardedPlan, StepPlan, TokenOutput
from jaxllm.engine.limits import Limits
from jaxllm.engine.metrics import Metrics
from jaxllm.engine.replicas import Pools
from jaxllm.engine.scheduler import Scheduler

NOTHING = StepPlan(())
OURS = ("steps", "dispatches", "compiles_after_ready", "exposed_host_s")  # of the metrics: not what schedulers count


@dataclass
class ShardedScheduler:
    each: tuple[Scheduler, ...]
    counted: Metrics  # of all shards, and what the engine and the runner count
    _home: dict[str, int] = field(default_factory=dict)  # request id -> its shard
    _live: dict[str, list[Sequence]] = field(default_factory=dict)  # request id -> its sequences

    @property
    def config(self) -> Limits:
        """Of one shard."""
        return self.each[0].config

    @property
    def pool(self) -> Pools:
        return Pools(self.each)

    @property
    def cache(self) -> Pools:
        return Pools(self.each)

    @property
    def metrics(self) -> Metrics:
        for spec in dataclasses.fields(Metrics):
            values = [getattr(shard.metrics, spec.name) for shard in self.each]
            if spec.name == "finished":
                self.counted.finished = {reason: sum(value[reason] for value in values) for reason in FinishReason}
            elif spec.name not in OURS and not spec.name.startswith(("expert", "moved")):
                setattr(self.counted, spec.name, sum(values))
        return self.counted

    @property
    def has_work(self) -> bool:
        return any(shard.has_work for shard in self.each)

    @property
    def num_running(self) -> int:
        return sum(shard.num_running for shard in self.each)

    @property
    def num_waiting(self) -> int:
        return sum(shard.num_waiting for shard in self.each)

    def add(self, sequence: Sequence) -> None:
        """To the shard of its request. Raises RequestError when it could never run."""
        name = sequence.request.id
        home = self._home.get(name)
        home = min(range(len(self.each)), key=self.load_tokens) if home is None else home
        self.each[home].add(sequence)
        self._home[name] = home
        self._live.setdefault(name, []).append(sequence)

    def load_tokens(self, shard: int) -> int:
        """Tokens a shard has still to compute or to sample, at most, for the sequences it has."""
        return sum(
            one.tokens_left for name, sequences in self._live.items() if self._home[name] == shard for one in sequences
        )

    def abort(self, request_id: str) -> list[Sequence]:
        home = self._home.get(request_id)
        ended = [] if home is None else self.each[home].abort(request_id)
        self._forget(request_id)
        return ended

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        home = self._home.get(sequence.request.id)
        if home is not None:
            self.each[home].finish(sequence, reason, stop_reason)
            self._forget(sequence.request.id)

    def _forget(self, request_id: str) -> None:
        if all(sequence.finished for sequence in self._live.get(request_id, ())):
            self._live.pop(request_id, None)
            self._home.pop(request_id, None)

    def schedule(self) -> ShardedPlan | None:
        parts = tuple(shard.schedule() or NOTHING for shard in self.each)
        return ShardedPlan(parts) if any(part.rows for part in parts) else None

    def commit(self, plan: ShardedPlan | None, results: list[RowResult]) -> list[TokenOutput]:
        parts = (NOTHING,) * len(self.each) if plan is None else plan.parts
        if len(results) != sum(len(part.rows) for part in parts):
            raise ValueError(f"{len(results)} results for {sum(len(part.rows) for part in parts)} scheduled rows")
        outputs, start = [], 0
        for shard, part in zip(self.each, parts, strict=True):
            end = start + len(part.rows)
            outputs += shard.commit(part if part.rows else None, results[start:end])
            start = end
        self.counted.steps += plan is not None
        self.counted.dispatches += plan is not None
        for output in outputs:
            if output.finish_reason is not None:
                self._forget(output.sequence.request.id)
        return outputs

    def check(self, others: Collection[int] = ()) -> None:
        """`others`: pages of the first shard that somebody else holds."""
        for number, shard in enumerate(self.each):
            shard.check(others if number == 0 else ())
        unfinished = {name for name, sequences in self._live.items() if not all(one.finished for one in sequences)}
        assert unfinished == set(self._home) == set(self._live), "a request is known that has ended"
