"""The engine: requests go in, tokens come out. schedule -> run -> commit is all it does.

Composes a scheduler (decides), a runner (computes) and a tokenizer (checks and encodes requests). One thread owns it.
Knows nothing of text assembly, streams, HTTP or meshes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

from jaxllm.config import EngineConfig
from jaxllm.core import Request, RowResult, SamplingParams, Sequence, StepPlan, TokenOutput
from jaxllm.engine.intake import Intake
from jaxllm.engine.scheduler import Scheduler
from jaxllm.graph.models.config import ModelConfig
from jaxllm.tokenizer import Tokenizer


class StepRunner(Protocol):
    """What the engine needs of a runner; tests give it one without a device."""

    def run(self, plan: StepPlan) -> list[RowResult]: ...


@dataclass
class Engine:
    config: EngineConfig
    model_config: ModelConfig
    scheduler: Scheduler
    runner: StepRunner
    tokenizer: Tokenizer | None = None  # None: token ids in, token ids out
    default_params: SamplingParams = field(default_factory=SamplingParams)  # from generation_config.json
    intake: Intake = field(init=False)

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
        """One turn: decide, compute, account. Returns what each scheduled sequence learned."""
        plan = self.scheduler.schedule()
        results = self.runner.run(plan) if plan is not None else []
        return self.scheduler.commit(plan, results)

    def add(self, request: Request) -> list[Sequence]:
        """Queue the request's n sequences; RequestError if they can never run, and then nothing is queued."""
        sequences = [Sequence(request, index) for index in range(request.params.n)]
        for sequence in sequences:  # alike in length: if one is refused, the first is
            self.scheduler.add(sequence)
        return sequences

    def abort(self, request_id: str) -> None:
        """Take a request back; unknown and finished ids are ignored, as they cross in flight."""
        self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

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
