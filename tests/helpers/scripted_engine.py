"""A whole engine without a device: the real scheduler and engine, and a runner that says what a test tells it to say.

`say` maps a sequence to all the token ids it will answer with; a string in their place is that row's error.
"""

from __future__ import annotations

from collections.abc import Callable

from helpers.fake_runner import FakeStep

from jaxllm.config import load, resolve
from jaxllm.core import RowResult, SampledToken, SamplingParams, Sequence, StepPlan, TokenLogprobs
from jaxllm.engine.cache.hashed import PrefixCache
from jaxllm.engine.cache.pages import PagePool
from jaxllm.engine.engine import Engine
from jaxllm.engine.limits import Limits
from jaxllm.engine.scheduler import Scheduler
from jaxllm.graph.models.config import ModelConfig
from jaxllm.tokenizer import Tokenizer

PAGE_SIZE, NUM_PAGES, CONTEXT = 4, 256, 256
DEFAULT = SamplingParams(max_tokens=64)
Say = Callable[[Sequence], list[int | str]]


class ScriptedRunner:
    """Log-probabilities are -1, -2 ... by position; alternatives are ids 0 ... 4."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.steps = 0

    def launch(self, plan: StepPlan) -> FakeStep:
        self.steps += 1
        return FakeStep(
            [RowResult(self._sample(row.sequence) if row.sample else None, _prompt_logprobs(row)) for row in plan.rows]
        )

    def choose(self, launched: FakeStep) -> None:
        raise AssertionError("no step of this runner waits")

    def collect(self, launched: FakeStep) -> list[RowResult]:
        return launched.results

    def _sample(self, sequence: Sequence) -> SampledToken:
        answers, place = self.say(sequence), sequence.num_output + sequence.num_pending - 1
        token = answers[min(place, len(answers) - 1)]  # one step ahead: past an end that the host has not seen
        if isinstance(token, str):
            return SampledToken(-1, error=token)
        wanted = sequence.request.params.logprobs is not None
        return SampledToken(token, _logprobs(token, place) if wanted else None)


def _logprobs(token: int, place: int) -> TokenLogprobs:
    return TokenLogprobs(token, -1.0 - place, 1, tuple((i, -float(i)) for i in range(5)))


def _prompt_logprobs(row) -> tuple[TokenLogprobs, ...]:
    if row.sequence.request.params.prompt_logprobs is None:
        return ()
    places = range(row.start + 1, min(row.start + row.count + 1, row.sequence.num_prompt))
    return tuple(_logprobs(row.sequence.tokens[place], place) for place in places)


def scripted_engine(
    tokenizer: Tokenizer, say: Say, *, default_params: SamplingParams = DEFAULT, max_num_seqs: int = 4
) -> Engine:
    model = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=1,
        d_model=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        d_ff=8,
        context_length=CONTEXT,
        eos_token_ids=tokenizer.eos_token_ids,
        bos_token_id=tokenizer.bos_token_id,
    )
    config = resolve(load(environ={}, page_size=PAGE_SIZE), CONTEXT, "cpu")
    pool = PagePool(NUM_PAGES, PAGE_SIZE)
    limits = Limits(token_budget=16, max_num_seqs=max_num_seqs, page_size=PAGE_SIZE, max_model_len=CONTEXT)
    scheduler = Scheduler(limits, pool, PrefixCache(pool))
    return Engine(config, model, scheduler, ScriptedRunner(say), tokenizer, default_params)


def saying(tokenizer: Tokenizer, answers: dict[str, str] | str) -> Say:
    """Answers by what the prompt's text ends in (or one for all), spelled by the tokenizer, then the end token."""

    def say(sequence: Sequence) -> list[int | str]:
        prompt = tokenizer.decode(sequence.request.prompt_token_ids, skip_special_tokens=False)
        if isinstance(answers, str):
            text = answers
        else:
            text = next((answer for ending, answer in answers.items() if prompt.rstrip().endswith(ending)), "?")
        return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_ids[0]]

    return say


def at_rest(engine: Engine) -> bool:
    """Nothing runs, nothing waits, and every page is free or cached."""
    engine.check()
    pool = engine.scheduler.pool
    return not engine.has_work and pool.num_held == 0 and pool.num_free == pool.num_pages - pool.num_cached
