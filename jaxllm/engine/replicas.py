"""Several engines as one: replicas of a model on devices of their own, or lanes that keep a pipeline's stages busy.

In: requests; each goes, with all its sequences, to the engine with the fewest tokens before it. Out: what all engines
tell. Each keeps its own pages, prefix cache and schedule; they share the tokenizer and the compiled grammars. One
thread turns them all: every engine has a step on its devices and one behind it, and whoever has finished comes first,
so that a long prefill of one holds up nobody else. Replicas on GPUs are processes instead (jaxllm.engine.process): one
interpreter cannot do the host's work of four. Knows nothing of meshes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.core import FinishReason, Grammar, Request, RequestError, SamplingParams, Sequence, TokenOutput
from jaxllm.engine.buckets import UNPADDED
from jaxllm.engine.decoding.structured import GrammarCompiler
from jaxllm.engine.engine import Engine, Residency
from jaxllm.engine.intake import Intake
from jaxllm.engine.limits import Limits
from jaxllm.engine.scheduler import Scheduler
from jaxllm.graph.models.config import ModelConfig
from jaxllm.tokenizer import Tokenizer

LOOK_S = 5e-5  # between looks at the devices while all of them work
WORST = ("compiles_after_ready", "expert_imbalance")  # of the process, so the same everywhere; a ratio


class ReplicaFailedError(RuntimeError):
    """A step of one engine raised, which is the cause; what others told in the same turn comes with it."""

    def __init__(self, number: int, requests: frozenset[str], in_a_row: int, outputs: list[TokenOutput]) -> None:
        super().__init__(f"a step of engine {number} failed")
        self.number, self.requests, self.in_a_row, self.outputs = number, requests, in_a_row, outputs


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
    """What all engines count, summed where it is counted by engine; of a ratio, the worst."""

    schedulers: tuple[Scheduler, ...]

    @property
    def exposed_host_s(self) -> float:
        return sum(scheduler.metrics.exposed_host_s for scheduler in self.schedulers)

    @property
    def steps(self) -> int:
        return sum(scheduler.metrics.steps for scheduler in self.schedulers)

    @property
    def dispatches(self) -> int:
        return sum(scheduler.metrics.dispatches for scheduler in self.schedulers)

    @property
    def compiles_after_ready(self) -> int:
        return max(scheduler.metrics.compiles_after_ready for scheduler in self.schedulers)

    def as_dict(self) -> dict[str, float]:
        each = [scheduler.metrics.as_dict() for scheduler in self.schedulers]
        return {name: (max if name in WORST else sum)(counts[name] for counts in each) for name in each[0]}


@dataclass(frozen=True)
class Schedulers:
    """What whoever drives an engine asks of its schedule, of all of them. Jobs beside it borrow the first's pages."""

    engine: ReplicatedEngine

    @property
    def each(self) -> tuple[Any, ...]:
        return tuple(engine.scheduler for engine in self.engine.engines)

    @property
    def config(self) -> Limits:
        """Of a sequence, those of any engine; of a step, of all of them together."""
        one, count = self.each[0].config, len(self.each)
        most = {"max_num_seqs": one.max_num_seqs * count, "token_budget": one.token_budget * count}
        return dataclasses.replace(one, **most, padding=UNPADDED)  # each pads its own steps

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
    residency: Residency | None = None  # None where their devices are not all of this process
    _requests: list[dict[str, list[Sequence]]] = field(init=False)  # by engine; those that ended go when others come
    _failures: list[int] = field(init=False)  # in a row, by engine

    def __post_init__(self) -> None:
        self._requests = [{} for _ in self.engines]
        self._failures = [0 for _ in self.engines]

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

    # ---- requests ----

    def add(self, request: Request, grammar: Grammar | None = None) -> list[Sequence]:
        for requests in self._requests:
            for ended in [id for id, found in requests.items() if all(one.finished for one in found)]:
                del requests[ended]
        if self._home(request.id) is not None:  # another engine would not know
            raise RequestError("id", request.id, "already in use by a running request")
        number = min(range(len(self.engines)), key=self.load_tokens)
        sequences = self._requests[number][request.id] = self.engines[number].add(request, grammar)
        return sequences

    def load_tokens(self, number: int) -> int:
        """Tokens an engine has still to compute or to sample, at most, for the sequences it has."""
        return sum(one.tokens_left for sequences in self._requests[number].values() for one in sequences)

    def abort(self, request_id: str) -> None:
        number = self._home(request_id)
        if number is not None:
            self.engines[number].abort(request_id)

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: str | None = None) -> None:
        number = self._home(sequence.request.id)
        if number is not None:
            self.engines[number].finish(sequence, reason, stop_reason)

    def _home(self, request_id: str) -> int | None:
        """The engine that has it; None when it has ended."""
        return next((number for number, requests in enumerate(self._requests) if request_id in requests), None)

    # ---- steps ----

    def step(self) -> list[TokenOutput]:
        """One turn of every engine that has work and whose devices have finished a step; at least one's."""
        working = [number for number, engine in enumerate(self.engines) if engine.has_work or engine.begun]
        outputs: list[TokenOutput] = []
        for number in working:
            self._guarded(number, outputs, self.engines[number].begin)
        while not (settled := [number for number in working if self.engines[number].settled]):
            if len(working) == 1:
                settled = working  # it waits for its own device
                break
            time.sleep(LOOK_S)
        for number in settled:
            outputs += self._guarded(number, outputs, self.engines[number].end)
            self._failures[number] = 0
        return outputs

    def drain(self) -> list[TokenOutput]:
        outputs: list[TokenOutput] = []
        for number, engine in enumerate(self.engines):
            outputs += self._guarded(number, outputs, engine.drain)
        return outputs

    def _guarded[T](self, number: int, outputs: list[TokenOutput], act: Callable[[], T]) -> T:
        try:
            return act()
        except Exception as error:
            self._failures[number] += 1
            requests = frozenset(self._requests[number])
            raise ReplicaFailedError(number, requests, self._failures[number], outputs) from error

    @property
    def has_work(self) -> bool:
        return any(engine.has_work or engine.begun for engine in self.engines)

    def check(self) -> None:
        for engine in self.engines:
            engine.check()
