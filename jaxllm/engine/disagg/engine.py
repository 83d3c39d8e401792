"""Two sides as one engine: prompts are computed on the prefill side, tokens on the decode side, pages move over.

In: requests. Out: what an engine tells. A sequence lives in the decode side's schedule from the beginning: there it
gets its row and pages, and only then is its prompt begun elsewhere, so what is on its way always has a place to go. It
goes on here once its pages are filled and its first token is known, which is told then and never again. What the decode
side preempts it computes again by itself. One thread turns both sides;
where both are in this process another gives the prefill device its work. Knows nothing of devices, sockets or meshes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from jaxllm.config import ConfigError, EngineConfig
from jaxllm.core import FinishReason, Grammar, Request, SamplingParams, Sequence, TokenOutput
from jaxllm.engine.cache.pages import PagePool
from jaxllm.engine.decoding.structured import GrammarCompiler
from jaxllm.engine.disagg.handoff import FirstToken, Item, Key, PageBlock, PrefillFailed, Prefills
from jaxllm.engine.engine import Engine
from jaxllm.engine.intake import Intake
from jaxllm.engine.limits import Limits
from jaxllm.engine.scheduler import Scheduler
from jaxllm.engine.sharded import ShardedScheduler
from jaxllm.graph.models.config import ModelConfig
from jaxllm.tokenizer import Tokenizer

log = logging.getLogger(__name__)
Put = Callable[[range, Any, list[int | None]], None]  # a block's layers, its pages, where each goes


@dataclass(eq=False)
class _Handoff:
    """An arriving sequence: what has come of it."""

    sequence: Sequence
    first_page: int
    missing: int  # parts that have not come: one for each page and group of layers
    first: FirstToken | None = None


def schedule_of(engine: Engine) -> Scheduler:
    """The engine's one schedule. ConfigError where its attention has shards with schedules of their own."""
    if isinstance(engine.scheduler, ShardedScheduler):
        raise ConfigError("disaggregation: a side with mesh.attention_data cannot hand pages over; set it to false")
    return engine.scheduler


@dataclass(frozen=True)
class Sides:
    """What whoever drives an engine asks of its schedule: the decode side's, and the books of both."""

    engine: DisaggregatedEngine

    @property
    def config(self) -> Limits:
        return self.engine.decode.scheduler.config

    @property
    def pool(self) -> PagePool:
        return schedule_of(self.engine.decode).pool

    @property
    def cache(self) -> Sides:
        return self

    @property
    def metrics(self) -> Sides:
        return self

    @property
    def num_running(self) -> int:
        return self.engine.decode.scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self.engine.decode.scheduler.num_waiting

    def evict(self, count: int) -> None:
        """Of the decode side's cached pages; the prefill side forgets what it can."""
        self.engine.decode.scheduler.cache.evict(count)
        self.engine.prefill.forget_cached()

    def as_dict(self) -> dict[str, float]:
        return self.engine.decode.scheduler.metrics.as_dict() | self.engine.prefill.stats()

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.engine.finish(sequence, reason)

    def check(self, others: Collection[int] = ()) -> None:
        self.engine.check(others)


@dataclass
class DisaggregatedEngine:
    decode: Engine
    prefill: Prefills
    put: Put
    num_groups: int  # of layers: blocks a page comes in
    _handoffs: dict[Key, _Handoff] = field(default_factory=dict)
    _fault: Exception | None = None  # of the prefill side, in a turn in which the decode side had something to tell

    @property
    def scheduler(self) -> Sides:
        return Sides(self)

    # ---- what the decode side answers for both ----

    @property
    def config(self) -> EngineConfig:
        return self.decode.config

    @property
    def model_config(self) -> ModelConfig:
        return self.decode.model_config

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.decode.tokenizer

    @property
    def default_params(self) -> SamplingParams:
        return self.decode.default_params

    @property
    def grammars(self) -> GrammarCompiler | None:
        return self.decode.grammars

    @property
    def intake(self) -> Intake:
        return self.decode.intake

    @property
    def residency(self) -> None:
        """Two sides neither sleep nor take new weights yet."""
        return None

    def make_request(self, prompt: str | SequenceOf[int], params: SamplingParams | None = None, **more: Any) -> Request:
        return self.decode.make_request(prompt, params, **more)

    def prepare(self, request: Request) -> Future[Any] | None:
        return self.decode.prepare(request)

    # ---- requests ----

    def add(self, request: Request, grammar: Grammar | None = None) -> list[Sequence]:
        self.prefill.check_fits(request)
        return self.decode.add(request, grammar, remote=True)

    def abort(self, request_id: str) -> None:
        self.decode.abort(request_id)
        self._take_back()

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: str | None = None) -> None:
        self.decode.finish(sequence, reason, stop_reason)
        self._take_back()

    # ---- steps ----

    def step(self) -> list[TokenOutput]:
        """One turn of both sides. The decode side is waited for, the prefill side only when nothing decodes.

        Raises what either side raises. What the decode side has told by then is returned first: a sequence may have
        ended with it, and nobody would hear of that.
        """
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault
        outputs = self.decode.step()
        self._take_back()
        for sequence in schedule_of(self.decode).arriving:
            self._begin(sequence)
        try:
            items = self.prefill.turn(wait=self.decode.resting)
        except Exception as error:
            if not outputs:
                raise
            self._fault = error
            return outputs
        return outputs + self._receive(items)

    def drain(self) -> list[TokenOutput]:
        """Account for the decode step in flight and launch none; what has been computed of prompts waits."""
        return self.decode.drain()

    @property
    def has_work(self) -> bool:
        return self.decode.has_work or self.prefill.moving or self._fault is not None

    def check(self, others: Collection[int] = ()) -> None:
        self.decode.scheduler.check(others)
        self.prefill.check()
        assert all(self._awaited(key) for key in self._handoffs), "a sequence that has gone is waited for"

    # ---- handing over ----

    def _begin(self, sequence: Sequence) -> None:
        key = Key(*sequence.id, sequence.num_preempted)
        if key in self._handoffs:
            return
        handoff = self._handoff(sequence)
        self._handoffs[key] = handoff
        self.prefill.begin(key, sequence, handoff.first_page)

    def _handoff(self, sequence: Sequence) -> _Handoff:
        first = sequence.num_computed // self.decode.scheduler.pool.page_size
        return _Handoff(sequence, first, (len(sequence.pages) - first) * self.num_groups)

    def _awaited(self, key: Key) -> bool:
        sequence = self._handoffs[key].sequence
        return sequence in schedule_of(self.decode).arriving and sequence.num_preempted == key.turn

    def _take_back(self) -> None:
        """Prompts of sequences that have ended, or lost their pages, on the decode side."""
        if self._handoffs:
            for key in [key for key in self._handoffs if not self._awaited(key)]:
                del self._handoffs[key]
                self.prefill.cancel(key)

    def _receive(self, items: list[Item]) -> list[TokenOutput]:
        outputs: list[TokenOutput] = []
        for item in items:
            if isinstance(item, PageBlock):
                outputs += self._fill(item)
            elif item.key not in self._handoffs:
                continue
            elif isinstance(item, FirstToken):
                self._handoffs[item.key].first = item
                outputs += self._arrive(item.key)
            elif isinstance(item, PrefillFailed):
                sequence = self._handoffs.pop(item.key).sequence
                self.decode.scheduler.finish(sequence, FinishReason.ERROR)
                outputs.append(TokenOutput(sequence, None, finish_reason=FinishReason.ERROR, error=item.error))
            else:
                self._handoffs[item.key] = self._handoff(self._handoffs[item.key].sequence)
        return outputs

    def _fill(self, block: PageBlock) -> list[TokenOutput]:
        places: list[int | None] = []
        touched: dict[Key, None] = {}
        for key, number in block.entries:
            handoff = self._handoffs.get(key)
            places.append(None if handoff is None else handoff.sequence.pages[number])
            if handoff is not None:
                handoff.missing -= 1
                touched[key] = None
        if touched:
            self.put(block.layers, block.pages, places)
        self.prefill.landed(block)
        return [output for key in touched for output in self._arrive(key)]

    def _arrive(self, key: Key) -> list[TokenOutput]:
        """The sequence goes on here if all of it has come."""
        handoff = self._handoffs[key]
        if handoff.missing or handoff.first is None:
            return []
        del self._handoffs[key]
        self.prefill.cancel(key)
        output = schedule_of(self.decode).arrive(handoff.sequence, handoff.first.result, handoff.first.num_cached)
        return [] if output is None else [output]
