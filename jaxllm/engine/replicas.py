"""Several engines as one: replicas of a model on devices of their own, or lanes that keep a pipeline's stages busy.

In: requests; each goes, with all its sequences, to the engine with the fewest tokens before it. Out: what all engines
tell. Each keeps its own pages, prefix cache and schedule; they share the tokenizer and the compiled grammars. One
thread turns them all: an engine's step is on the device while the next engine's is launched. Knows nothing of meshes.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.core import FinishReason, Request, SamplingParams, Sequence, TokenOutput
from jaxllm.engine.decoding.structured import GrammarCompiler
from jaxllm.engine.engine import Engine
from jaxllm.engine.intake import Intake
from jaxllm.graph.models.config import ModelConfig
from jaxllm.tokenizer import Tokenizer


@dataclass
class ReplicatedEngine:
    engines: tuple[Engine, ...]
    _home: dict[str, int] = field(default_factory=dict)  # request id -> the engine that has it
    _unfinished: list[dict[str, list[Sequence]]] = field(init=False)  # by engine

    def __post_init__(self) -> None:
        self._unfinished = [{} for _ in self.engines]

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

    def add(self, request: Request) -> list[Sequence]:
        number = min(range(len(self.engines)), key=self.load_tokens)
        sequences = self.engines[number].add(request)
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
        number = self._home[sequence.request.id]
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
