"""The engine: requests go in, tokens come out. schedule -> run -> commit is all it does.

Composes a scheduler (decides), a runner (computes) and a tokenizer (checks and encodes requests). One thread owns it.
Knows nothing of text assembly, streams, HTTP or meshes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

from jaxllm.config import EngineConfig
from jaxllm.core import Grammar, Request, RequestError, RowResult, SamplingParams, Sequence, StepPlan, TokenOutput
from jaxllm.engine.decoding.mask import check_mask
from jaxllm.engine.decoding.structured import GrammarCompiler
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
    grammars: GrammarCompiler | None = None  # None where there is no tokenizer
    _ids: itertools.count = field(default_factory=itertools.count)
    _seeds: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._seeds = random.Random(self.config.seed)

    def step(self) -> list[TokenOutput]:
        """One turn: decide, compute, account. Returns what each scheduled sequence learned."""
        plan = self.scheduler.schedule()
        results = self.runner.run(plan) if plan is not None else []
        return self.scheduler.commit(plan, results)

    def add(self, request: Request) -> list[Sequence]:
        """Queue the request's n sequences; RequestError if they can never run, and then nothing is queued."""
        grammar = self._grammar(request)
        sequences = [Sequence(request, index, grammar=grammar) for index in range(request.params.n)]
        for sequence in sequences:  # alike in length: if one is refused, the first is
            self.scheduler.add(sequence)
        return sequences

    def abort(self, request_id: str) -> None:
        """Take a request back; unknown and finished ids are ignored, as they cross in flight."""
        self.scheduler.abort(request_id)

    def _grammar(self, request: Request) -> Grammar | None:
        """Compiled before, or now while others wait: see GrammarCompiler.submit."""
        spec = request.params.grammar
        if spec is None:
            return None
        if self.grammars is None:
            raise RequestError(spec.field, spec.source, "needs a tokenizer; the model has none")
        return self.grammars.compile(spec)

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
        params = params or self.default_params
        ids = self._encode(prompt) if isinstance(prompt, str) else self._check_ids("prompt", prompt)
        limit = self.config.model.max_model_len
        if not ids:
            raise RequestError("prompt", prompt, "must hold at least one token (this model has no start token)")
        if len(ids) >= limit:
            allowed = f"must have at most {limit - 1} tokens, to leave room for one in the context of {limit}"
            raise RequestError("prompt", f"{len(ids)} tokens", allowed)
        self._check_ids("logit_bias", list(params.logit_bias or ()))
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise RequestError("stop", (*params.stop, *params.bad_words), "needs a tokenizer; the model has none")
        request = Request(
            id=request_id if request_id is not None else f"request-{next(self._ids)}",
            prompt_token_ids=ids,
            params=params,
            eos_token_ids=self.model_config.eos_token_ids,
            bad_word_ids=self._bad_word_ids(params.bad_words),
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            priority=priority,
            cache_salt=cache_salt,
        )
        check_mask(request, self.model_config.vocab_size)
        return request

    def _encode(self, prompt: str) -> tuple[int, ...]:
        if self.tokenizer is None:
            raise RequestError("prompt", prompt, "must be token ids; the model directory has no tokenizer.json")
        ids = tuple(self.tokenizer.encode(prompt, add_special_tokens=True))
        start = self.model_config.bos_token_id
        return ids if ids or start is None else (start,)

    def _check_ids(self, name: str, ids: SequenceOf[int]) -> tuple[int, ...]:
        vocab = self.model_config.vocab_size
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
                raise RequestError(name, token, f"token ids must be integers in [0, {vocab - 1}]")
        return tuple(ids)

    def _bad_word_ids(self, words: SequenceOf[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as it stands and after a space: a tokenizer spells the two differently."""
        if not words or self.tokenizer is None:
            return ()
        spelled = (text for word in words for text in (word, " " + word.lstrip()))
        ids = (tuple(self.tokenizer.encode(text, add_special_tokens=False)) for text in spelled)
        return tuple(dict.fromkeys(found for found in ids if found))
