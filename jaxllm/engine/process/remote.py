"""The engine as LLM knows it, over a link: requests are made and checked here, tokens come from elsewhere.

In: prompts and SamplingParams; the link's events. Out: TokenOutputs of sequences that mirror those of the engine. What
a prompt or a grammar is refused for is said at once, as by an engine of this process. One thread owns it; what is added
between two steps goes out together, with the next or when it is work enough. Knows nothing of processes.
"""

from __future__ import annotations

import itertools
import random
import weakref
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.config import EngineConfig, model_directory
from jaxllm.core import FinishReason, JaxLLMError, Request, RequestError, SamplingParams, Sequence, TokenOutput
from jaxllm.engine.decoding.grammar_trial import open_grammars
from jaxllm.engine.intake import Intake
from jaxllm.engine.messages import Abort, Add, Control, Event, Failed, News, Ready, Reply, Step
from jaxllm.graph.models.config import ModelConfig
from jaxllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jaxllm.engine.process.links import Link

PARCEL_TOKENS = 16384  # of prompts, by replica: two full steps, so that none waits until thousands have been checked
WAIT_S = 0.1  # for news, before it is asked whether the engine lives


class EngineGoneError(JaxLLMError):
    """The engine's processes could not start, or died too often."""


@dataclass(frozen=True)
class RemoteReport:
    """Where start-up went, of the process that took longest."""

    seconds: dict[str, float]  # by phase; phases may overlap
    total_s: float
    device_kind: str
    devices: int  # that a step runs on


@dataclass(frozen=True)
class RemoteCounts:
    """What a benchmark reads of the counts, as they are when it reads."""

    engine: RemoteEngine

    def _now(self, name: str) -> Any:
        return self.engine.control("check")[name]

    @property
    def exposed_host_s(self) -> float:
        return self._now("exposed_host_s")

    @property
    def compiles_after_ready(self) -> int:
        return self._now("compiles_after_ready")

    @property
    def steps(self) -> int:
        return self._now("steps")

    @property
    def dispatches(self) -> int:
        return self._now("dispatches")


class RemoteEngine:
    def __init__(self, link: Link, config: EngineConfig, starting: Callable[[], None] = lambda: None) -> None:
        """Starts the link and waits until the engine is warm, calling `starting` meanwhile. EngineGoneError."""
        self.config, self.link = config, link
        directory = model_directory(config.model.path)
        self.tokenizer = Tokenizer.from_directory(directory) if (directory / "tokenizer.json").exists() else None
        self._directory: Path = directory
        self._live: dict[str, list[Sequence]] = {}
        self._unsent: list[Add] = []
        self._unsent_tokens = 0
        self._kept: list[Event] = []  # came while something else was waited for
        self._numbers = itertools.count()
        link.start()
        self._finalizer = weakref.finalize(self, _end, link)
        self.ready = self._wait_ready(starting)
        self.intake = Intake(
            vocab_size=self.ready.vocab_size,
            max_model_len=self.ready.max_model_len,
            eos_token_ids=self.ready.eos_token_ids,
            bos_token_id=self.ready.bos_token_id,
            tokenizer=self.tokenizer,
            default_params=self.ready.default_params,
            seeds=random.Random(config.seed),
        )
        self.grammars = open_grammars(directory, self.ready.vocab_size, self.ready.eos_token_ids)
        self._parcel_tokens = PARCEL_TOKENS * self.ready.facts.get("replicas", 1)
        self._capacity = self.ready.facts.get("replica_capacity_tokens", self.ready.capacity_tokens)

    def _wait_ready(self, starting: Callable[[], None]) -> Ready:
        why = None
        while True:
            for event in self.link.receive(WAIT_S):
                if isinstance(event, Ready):
                    return event
                if isinstance(event, Failed):
                    why = event.message
            starting()
            dead = self.link.death()
            if why is not None or dead is not None:
                self.close()
                raise EngineGoneError(f"the engine cannot start: {why or dead}")

    def close(self) -> None:
        """Ends the engine."""
        self._finalizer()

    @property
    def default_params(self) -> SamplingParams:
        return self.intake.default_params

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig.from_directory(self._directory)

    @property
    def report(self) -> RemoteReport:
        facts = self.ready.facts
        times = facts.get("seconds", {}), facts.get("total_s", 0.0)
        return RemoteReport(*times, facts.get("device", ""), facts.get("devices", 1))

    @property
    def counts(self) -> RemoteCounts:
        return RemoteCounts(self)

    # ---- requests ----

    def make_request(self, prompt: str | SequenceOf[int], params: SamplingParams | None = None, **more: Any) -> Request:
        return self.intake.make_request(prompt, params, **more)

    def add(self, request: Request) -> list[Sequence]:
        """As of an engine of this process: RequestError for what could never run."""
        self._check_alive()
        if request.id in self._live:
            raise RequestError("id", request.id, "already in use by a running request")
        length = len(request.prompt_token_ids)
        if length + 1 > self._capacity:
            allowed = f"must have at most {self._capacity - 1}: the cache has room for {self._capacity} tokens"
            raise RequestError("prompt_token_ids", f"{length} tokens", allowed)
        spec = request.params.grammar
        if spec is not None and self.grammars is None:
            raise RequestError(spec.field, spec.source, "needs a tokenizer; the model has none")
        if spec is not None and self.grammars is not None:
            self.grammars.compile(spec)  # to refuse it here; the engine compiles its own
        sequences = self._live[request.id] = [Sequence(request, index) for index in range(request.params.n)]
        self._unsent.append(Add(request))
        self._unsent_tokens += length
        if self._unsent_tokens >= self._parcel_tokens:
            self._kept += self._send()
        return sequences

    def abort(self, request_id: str) -> None:
        """Unknown and finished ids are ignored, as they cross in flight."""
        sequences = self._live.pop(request_id, None)
        if sequences is None:
            return
        for sequence in sequences:
            sequence.finish_reason = sequence.finish_reason or FinishReason.ABORT
        left = [add for add in self._unsent if add.request.id != request_id]
        if len(left) == len(self._unsent):
            self.link.send(Abort(request_id))
        self._unsent = left

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: str | None = None) -> None:
        if sequence.finished:
            return
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        self.link.send(Abort(sequence.request.id, sequence.index))
        self._forget_if_done(sequence.request.id)

    def _forget_if_done(self, request_id: str) -> None:
        if all(one.finished for one in self._live.get(request_id, ())):
            self._live.pop(request_id, None)

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    # ---- news ----

    def step(self) -> list[TokenOutput]:
        """What came, after waiting a little for the first of it; maybe nothing."""
        self._check_alive()
        events, self._kept = self._kept, []
        events += self._send()
        if not events:
            events = self.link.receive(WAIT_S)
        outputs: list[TokenOutput] = []
        for event in events:
            if isinstance(event, Step):
                self._tell(event.news, outputs)
        if not events and self.link.death() is not None:
            for sequences in list(self._live.values()):
                self._fail(sequences, f"engine_died: the engine died ({self.link.death()})", outputs)
        return outputs

    def _send(self) -> list[Event]:
        """What was added, once it is known who is left to do it; the events that told it."""
        if not self._unsent:
            return []
        events = self.link.receive(0.0)
        unsent, self._unsent, self._unsent_tokens = self._unsent, [], 0
        self.link.send(*unsent)
        return events

    def _tell(self, news: list[News], outputs: list[TokenOutput]) -> None:
        """The hot path of this process: a call a token would be a quarter of its time."""
        live, tell = self._live, outputs.append
        for one in news:
            sequences = live.get(one.request_id)
            if sequences is None:
                continue
            sequence = sequences[one.index]
            if sequence.finish_reason is not None:
                continue
            if one.error is not None and all(each.num_cached == each.num_output == 0 for each in sequences):
                self._fail(sequences, one.error, outputs)  # refused before any of them ran
                continue
            token = one.token_id
            if token is not None:
                sequence.tokens.append(token)
            sequence.num_cached = one.num_cached
            reason = None
            if one.finish_reason is not None:
                reason = sequence.finish_reason = FinishReason(one.finish_reason)
                sequence.stop_reason = one.stop_reason
                self._forget_if_done(one.request_id)
            tell(TokenOutput(sequence, token, one.logprobs, one.prompt_logprobs, reason, one.error))

    def _fail(self, sequences: list[Sequence], error: str, outputs: list[TokenOutput]) -> None:
        """Every sequence of a request."""
        request_id = sequences[0].request.id
        del self._live[request_id]
        for sequence in sequences:
            if not sequence.finished:
                sequence.finish_reason = FinishReason.ERROR
                outputs.append(TokenOutput(sequence, None, finish_reason=FinishReason.ERROR, error=error))
        if len(sequences) > 1:
            self.link.send(Abort(request_id))  # one of them failed by itself: the others may still run

    # ---- operations ----

    def control(self, operation: str, **arguments: Any) -> Any:
        """One of the engine's operations; JaxLLMError when it refuses or fails."""
        self._check_alive()
        number = next(self._numbers)
        self.link.send(Control(number, operation, arguments))
        while True:
            events = self.link.receive(WAIT_S)
            self._kept += [event for event in events if isinstance(event, Step)]
            for event in events:
                if isinstance(event, Reply) and event.id == number:
                    if event.error is not None:
                        raise JaxLLMError(event.error)
                    return event.value
            if not events and self.link.death() is not None:
                raise EngineGoneError(f"the engine is gone: {self.link.death()}")

    def _check_alive(self) -> None:
        gone = self.link.death()
        if gone is not None and not self._live:
            raise EngineGoneError(f"the engine is gone: {gone}")


def _end(link: Link) -> None:
    link.kill()
    link.close()
