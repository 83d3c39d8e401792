"""Several engines as one: replicas of a model on devices of their own, or lanes that keep a pipeline's stages busy.

In: requests; each goes, with all its sequences, to the engine with the fewest tokens before it. Out: what all engines
tell. Each keeps its own pages, prefix cache and schedule; they share the tokenizer and the compiled grammars. One
thread turns them all: an engine's step is on the device while the next engine's is launched. Knows nothing of meshes.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.core import FinishReason, Grammar, Request, SamplingParams, Sequence, TokenOutput
from jaxllm.engine.decoding.structured import GrammarCompiler
from jaxllm.engine.engine import Engine
from jaxllm.engine.intake import Intake
from jaxllm.engine.scheduler import Limits, Scheduler
from jaxllm.graph.models.config import ModelConfig
from jaxllm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pools:
    """The pages of all engines, as counts."""

    schedulers: tuple[Scheduler, ...]

    @property
    def page_size(self) -> int:
        return self.schedulers[0].pool.page_size

    @property
    def num_pages(self) -> int:
        return sum(scheduler.pool.num_pages for scheduler in self.schedulers)

    @property
    def num_free(self) -> int:
        return sum(scheduler.pool.num_free for scheduler in self.schedulers)

    @property
    def num_cached(self) -> int:
        return sum(scheduler.pool.num_cached for scheduler in self.schedulers)

    @property
    def num_held(self) -> int:
        return sum(scheduler.pool.num_held for scheduler in self.schedulers)

    def evict(self, count: int) -> None:
        """Of all that are cached."""
        for scheduler in self.schedulers:
            scheduler.cache.evict(min(count, scheduler.pool.num_cached))


@dataclass(frozen=True)
class Counts:
    """What all engines count, summed; of a ratio, the worst."""

    schedulers: tuple[Scheduler, ...]

    def as_dict(self) -> dict[str, float]:
        each = [scheduler.metrics.as_dict() for scheduler in self.schedulers]
        combine = {"expert_imbalance": max}
        return {name: combine.get(name, sum)([counts[name] for counts in each]) for name in each[0]}


@dataclass(frozen=True)
class Schedulers:
    """What whoever drives an engine asks of its schedule, of all of them. Jobs beside it borrow the first's pages."""

    engine: ReplicatedEngine

    @property
    def each(self) -> tuple[Any, ...]:
        return tuple(engine.scheduler for engine in self.engine.engines)

    @property
    def config(self) -> Limits:
        return self.each[0].config

    @property
    def pool(self) -> Pools:
        return Pools(self.each)

    @property
    def cache(self) -> Pools:
        return Pools(self.each)

    @property
    def metrics(self) -> Counts:
        return Counts(self.each)

    @property
    def num_running(self) -> int:
        return sum(scheduler.num_running for scheduler in self.each)

    @property
    def num_waiting(self) -> int:
        return sum(scheduler.num_waiting for scheduler in self.each)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.engine.finish(sequence, reason)

    def check(self, others: Collection[int] = ()) -> None:
        for number, scheduler in enumerate(self.each):
            scheduler.check(others if number == 0 else ())


@dataclass
class ReplicatedEngine:
    engines: tuple[Engine, ...]
    _home: dict[str, int] = field(default_factory=dict)  # request id -> the engine that has it
    _unfinished: list[dict[str, list[Sequence]]] = field(init=False)  # by engine

    def __post_init__(self) -> None:
        self._unfinished = [{} for _ in self.engines]

    @property
    def scheduler(self) -> Schedulers:
        return Schedulers(self)

    # ---- what all engines have in common ----

    @property
    def config(self) -> EngineConfig:
        return self.engines[0].config

    @property
    def model_config(self) -> ModelConfig:
        return self.engines[0].model_config

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.engines[0].tokenizer

    @property
    def default_params(self) -> SamplingParams:
        return self.engines[0].default_params

    @property
    def grammars(self) -> GrammarCompiler | None:
        return self.engines[0].grammars

    @property
    def intake(self) -> Intake:
        return self.engines[0].intake

    def make_request(self, prompt: str | SequenceOf[int], params: SamplingParams | None = None, **more: Any) -> Request:
        """See Engine.make_request. One intake draws the seeds, so they do not depend on the number of engines."""
        return self.engines[0].make_request(prompt, params, **more)

    def prepare(self, request: Request) -> Future[Any] | None:
        return self.engines[0].prepare(request)

    @property
    def residency(self) -> None:
        """Replicas and lanes neither sleep nor take new weights yet."""
        return None

    # ---- requests ----

    def add(self, request: Request, grammar: Grammar | None = None) -> list[Sequence]:
        number = min(range(len(self.engines)), key=self.load_tokens)
        sequences = self.engines[number].add(request, grammar)
        self._home[request.id] = number
        self._unfinished[number][request.id] = sequences
        return sequences

    def load_tokens(self, number: int) -> int:
        """Tokens an engine has still to compute or to sample, at most, for the sequences it has."""
        return sum(
            len(sequence.tokens)
            - sequence.num_computed
            + (sequence.request.params.max_tokens or 0)
            - sequence.num_output
            for sequences in self._unfinished[number].values()
            for sequence in sequences
            if not sequence.finished
        )

    def abort(self, request_id: str) -> None:
        number = self._home.get(request_id)
        if number is not None:
            self.engines[number].abort(request_id)
            self._forget(request_id, number)

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: str | None = None) -> None:
        number = self._home.get(sequence.request.id)
        if number is None:
            return  # it has finished
        self.engines[number].finish(sequence, reason, stop_reason)
        self._forget(sequence.request.id, number)

    def _forget(self, request_id: str, number: int) -> None:
        if all(sequence.finished for sequence in self._unfinished[number].get(request_id, ())):
            self._unfinished[number].pop(request_id, None)
            self._home.pop(request_id, None)

    # ---- steps ----

    def step(self) -> list[TokenOutput]:
        """One turn of every engine that has work: while one waits for its device, the others' devices work."""
        return self._told([output for engine in self.engines if engine.has_work for output in engine.step()])

    def drain(self) -> list[TokenOutput]:
        return self._told([output for engine in self.engines for output in engine.drain()])

    def _told(self, outputs: list[TokenOutput]) -> list[TokenOutput]:
        for output in outputs:
            if output.finish_reason is not None:
                number = self._home.get(output.sequence.request.id)
                if number is not None:
                    self._forget(output.sequence.request.id, number)
        return outputs

    @property
    def has_work(self) -> bool:
        return any(engine.has_work for engine in self.engines)

    def check(self) -> None:
        for engine in self.engines:
            engine.check()
