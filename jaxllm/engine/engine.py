"""The engine: requests go in, tokens come out. schedule -> launch -> collect -> commit is all it does.

It runs one step ahead: while a step is on the device, the next one is scheduled and launched behind it, and only then
is the first one's result read. So the host's work costs the device nothing, and news come one step late.

Composes a scheduler (decides), a runner (computes) and a tokenizer (checks and encodes requests). One thread owns it.
Knows nothing of text assembly, streams, HTTP or meshes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxllm.config import EngineConfig
from jaxllm.core import (
    FinishReason,
    Grammar,
    Request,
    RequestError,
    RowResult,
    SamplingParams,
    Sequence,
    TokenOutput,
)
from jaxllm.engine.decoding.structured import CompiledGrammar, GrammarCompiler
from jaxllm.engine.intake import Intake
from jaxllm.engine.scheduler import Scheduler
from jaxllm.engine.utilisation import StepMeter
from jaxllm.graph.models.config import ModelConfig
from jaxllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jaxllm.engine.sharded import ShardedScheduler


class StepOnDevice(Protocol):
    """A step that was launched."""

    @property
    def waits(self) -> bool:
        """For `choose`: a token mask follows from the step before."""
        ...

    @property
    def ready(self) -> bool: ...


# The plan is what the scheduler gave and gets back; the last is when the launch began.
InFlight = tuple[Any, StepOnDevice, float]


class StepRunner(Protocol):
    """What the engine needs of a runner; tests give it one without a device."""

    def launch(self, plan: Any) -> StepOnDevice: ...  # a StepPlan, or a ShardedPlan where there are shards

    def choose(self, launched: Any) -> None: ...

    def collect(self, launched: Any) -> list[RowResult]: ...

    def hidden_states(self, token_ids: SequenceOf[int], start: int, pages: SequenceOf[int]) -> NDArray[np.float32]: ...


class Residency(Protocol):
    """Where weights and pages are; see jaxllm.engine.residency."""

    version: str
    updates: int
    asleep: int

    def sleep(self, level: int) -> None: ...

    def wake_up(self) -> None: ...

    def check(self, directory: Path, /) -> object: ...

    def update(self, directory: Path, version: str | None) -> None: ...

    def start_trace(self) -> Path: ...

    def stop_trace(self) -> Path: ...


class Balancer(Protocol):
    """Moves routed experts between steps; see jaxllm.engine.balancer."""

    pending: Any  # what is still to be moved

    def turn(self) -> None: ...

    def imbalance(self) -> float: ...

    def plan(self) -> float: ...

    def move_one(self) -> None: ...


@dataclass
class Engine:
    config: EngineConfig
    model_config: ModelConfig
    scheduler: Scheduler | ShardedScheduler
    runner: StepRunner
    tokenizer: Tokenizer | None = None  # None: token ids in, token ids out
    default_params: SamplingParams = field(default_factory=SamplingParams)  # from generation_config.json
    grammars: GrammarCompiler | None = None  # None where there is no tokenizer
    residency: Residency | None = None  # None where there is no device
    meter: StepMeter | None = None  # likewise
    balancer: Balancer | None = None  # None where no experts can be moved
    intake: Intake = field(init=False)
    _in_flight: InFlight | None = None
    _turn: tuple[InFlight | None, InFlight | None] | None = None  # begun: the step before, and the one behind it
    _busy_s: float | None = None  # when the device was last seen to work, while there is work for it

    def __post_init__(self) -> None:
        self.intake = Intake(
            vocab_size=self.model_config.vocab_size,
            max_model_len=self.config.model.max_model_len,
            eos_token_ids=self.model_config.eos_token_ids,
            bos_token_id=self.model_config.bos_token_id,
            tokenizer=self.tokenizer,
            default_params=self.default_params,
            seeds=random.Random(self.config.seed),
        )

    def step(self) -> list[TokenOutput]:
        """One turn: launch the next step, then account for the one before. Returns what its sequences learned."""
        self.begin()
        return self.end()

    def begin(self) -> None:
        """The first half of a turn, unless it is done: launch the next step behind the one on the device."""
        if self._turn is not None:
            return
        before, self._in_flight = self._in_flight, None  # a step that raises takes the one before with it
        self._look(before)
        if self.balancer is not None:
            self.balancer.turn()
        plan = self.scheduler.schedule()
        after = None
        if plan is not None:
            began = time.perf_counter()
            after = plan, self.runner.launch(plan), began
            self._measure_gap(before)
        self._turn = before, after

    @property
    def begun(self) -> bool:
        """Whether a turn waits for its second half."""
        return self._turn is not None

    @property
    def settled(self) -> bool:
        """Whether the device has finished the step that `end` will account for."""
        before = None if self._turn is None else self._turn[0]
        return before is None or before[1].ready

    def end(self) -> list[TokenOutput]:
        """The second half: account for the step before."""
        (before, after), self._turn = self._turn or (None, None), None
        outputs = self._account(before)
        if after is not None and after[1].waits:
            self.runner.choose(after[1])
        self._in_flight = after
        if after is not None and not self.config.scheduler.overlap:
            outputs += self.drain()
        self._look(self._in_flight)
        self._busy_s = self._busy_s if self.has_work else None
        return outputs

    def drain(self) -> list[TokenOutput]:
        """Account for the step in flight and launch none: before anything that must find the engine at rest."""
        outputs = [] if self._turn is None else self.end()
        before, self._in_flight = self._in_flight, None
        return outputs + (self._account(before) if before is not None else [])

    def _account(self, step: InFlight | None) -> list[TokenOutput]:
        if step is None:
            return self.scheduler.commit(None, [])
        plan, launched, began = step
        results = self.runner.collect(launched)
        self._busy_s = time.perf_counter()
        if self.meter is not None:
            self.meter.collected(plan, began, self._busy_s)
        return self.scheduler.commit(plan, results)

    def _look(self, step: InFlight | None) -> None:
        if step is not None and not step[1].ready:
            self._busy_s = time.perf_counter()

    def _measure_gap(self, before: InFlight | None) -> None:
        """The device has waited for the host since, at the earliest, it was last seen to work."""
        now = time.perf_counter()
        if self._busy_s is not None and (before is None or before[1].ready):
            self.scheduler.metrics.exposed_host_s += now - self._busy_s
        self._busy_s = now

    def add(self, request: Request, grammar: Grammar | None = None, *, remote: bool = False) -> list[Sequence]:
        """Queue the request's n sequences; RequestError if they can never run, and then nothing is queued.

        `grammar` is what `prepare` gave; without it, this waits for the request's grammar. `remote`: the prompt is
        computed elsewhere.
        """
        grammar = grammar or self._grammar(request)
        sequences = [Sequence(request, index, grammar=grammar, remote=remote) for index in range(request.params.n)]
        for sequence in sequences:  # alike in length: if one is refused, the first is
            self.scheduler.add(sequence)
        return sequences

    def abort(self, request_id: str) -> None:
        """Take a request back; unknown and finished ids are ignored, as they cross in flight."""
        self.scheduler.abort(request_id)

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: str | None = None) -> None:
        """End a sequence for a reason that only its text shows, such as a stop string."""
        self.scheduler.finish(sequence, reason, stop_reason)

    def prepare(self, request: Request) -> Future[CompiledGrammar] | None:
        """The request's grammar, being compiled or ready. None: it asks for none, and `add` is immediate."""
        spec = request.params.grammar
        return None if spec is None or self.grammars is None else self.grammars.submit(spec)

    def _grammar(self, request: Request) -> Grammar | None:
        spec = request.params.grammar
        if spec is None:
            return None
        if self.grammars is None:
            raise RequestError(spec.field, spec.source, "needs a tokenizer; the model has none")
        return self.grammars.compile(spec)

    @property
    def resting(self) -> bool:
        """No step is on the device."""
        return self._in_flight is None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work  # a step in flight that nobody is left to hear of is no work

    def check(self) -> None:
        """Every page and row is accounted for."""
        self.scheduler.check()

    # ---- requests ----

    def make_request(
        self,
        prompt: str | SequenceOf[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Request:
        """Check and encode what a user sent. Raises RequestError naming field, value and allowed range."""
        return self.intake.make_request(prompt, params, request_id=request_id, priority=priority, cache_salt=cache_salt)
