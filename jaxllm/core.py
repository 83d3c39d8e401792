"""The nouns every layer shares: what a user asks, what the engine tracks, what comes back.

In: plain Python values. Out: validated, typed records. This module knows nothing of JAX, devices, pages'
contents, tokenizers or HTTP; every number a user can send has its range checked here, before anything is
allocated for it.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import math
import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

MAX_N = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_BAD_WORDS = 128


def shown(value: object) -> str:
    """A value fit for a message: long ones lose their middle, so that a path keeps its file name."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:58]}...{text[-59:]}"


class JaxLLMError(Exception):
    """Base of every error a user can cause or see."""


class RequestError(JaxLLMError, ValueError):
    """One request is wrong; others go on. Names the field, the value sent and what is allowed."""

    def __init__(self, field_name: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field_name, value, allowed
        super().__init__(f"{field_name} = {shown(value)}: {allowed}")


class GrammarKind(enum.StrEnum):
    JSON_SCHEMA = "json_schema"  # the source is a JSON schema
    REGEX = "regex"  # Rust's syntax: no look-around, no back-references
    LARK = "lark"  # llguidance's dialect of Lark
    TAGS = "structural_tag"  # the source is JSON: constrained stretches within free text


@dataclass(frozen=True)
class GrammarSpec:
    """What a completion must match, as text. Made by engine.decoding.grammars, which checks it."""

    kind: GrammarKind
    source: str
    field: str = "response_format"  # what to name when it cannot be used
    lenient: bool = False  # of a schema: keywords that cannot be enforced are ignored instead of refused


class Matcher(Protocol):
    """Follows one sequence through its grammar. `bits` are those of engine.decoding.mask."""

    @property
    def finished(self) -> bool: ...
    @property
    def error(self) -> str | None: ...
    def bits(self) -> Any: ...
    def advance(self, token_id: int) -> bool: ...
    def rollback(self, count: int) -> None: ...


class Grammar(Protocol):
    """A compiled GrammarSpec, shared by every sequence that must match it."""

    def matcher(self) -> Matcher: ...


class FinishReason(enum.StrEnum):
    STOP = "stop"  # end-of-sequence, stop token or stop string
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"  # the caller took it back
    ERROR = "error"  # this sequence failed; see RequestOutput.error


def _number(
    name: str, value: object, low: float, high: float, *, integer: bool = False, open_low: bool = False
) -> None:
    bounds = f"{low}, {high}" if integer else f"{low:g}, {high:g}"
    wanted = f"must be {'an integer' if integer else 'a number'} in {'(' if open_low else '['}{bounds}]"
    if isinstance(value, bool) or not isinstance(value, int if integer else int | float) or not math.isfinite(value):
        raise RequestError(name, value, wanted)
    if value < low or value > high or (open_low and value == low):
        raise RequestError(name, value, wanted)


def _token_ids(name: str, ids: object) -> tuple[int, ...]:
    if isinstance(ids, str | bytes) or not isinstance(ids, SequenceOf | frozenset | set):
        raise RequestError(name, ids, "must be a list of token ids (integers >= 0)")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise RequestError(name, token, "every entry must be a token id (an integer >= 0)")
    return tuple(ids)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. Names and meanings are vLLM's and OpenAI's.

    Raises RequestError naming field, value and allowed range. Token ids are checked against the vocabulary
    when the request is added, where the vocabulary is known.
    """

    n: int = 1
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1 = off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | SequenceOf[str] = ()
    stop_token_ids: SequenceOf[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16  # None = up to the context length
    logprobs: int | None = None  # how many alternatives beside the chosen token
    prompt_logprobs: int | None = None
    allowed_token_ids: SequenceOf[int] | None = None
    bad_words: SequenceOf[str] = ()
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    grammar: GrammarSpec | None = None

    def __post_init__(self) -> None:
        _number("n", self.n, 1, MAX_N, integer=True)
        _number("temperature", self.temperature, 0, 2)
        _number("top_p", self.top_p, 0, 1)
        _number("top_k", self.top_k, -1, 2**31 - 1, integer=True)
        _number("min_p", self.min_p, 0, 1)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _number("repetition_penalty", self.repetition_penalty, 0, 10, open_low=True)
        _number("min_tokens", self.min_tokens, 0, 2**31 - 1, integer=True)
        if self.seed is not None:
            _number("seed", self.seed, -(2**63), 2**63 - 1, integer=True)
        if self.max_tokens is not None:
            _number("max_tokens", self.max_tokens, 1, 2**31 - 1, integer=True)
            if self.min_tokens > self.max_tokens:
                raise RequestError("min_tokens", self.min_tokens, f"must be <= max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), 0, MAX_LOGPROBS, integer=True)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(name, getattr(self, name), "must be true or false")
        if self.grammar is not None and not isinstance(self.grammar, GrammarSpec):
            raise RequestError("grammar", self.grammar, "must be a GrammarSpec")
        self._check_lists()

    def _check_lists(self) -> None:
        put = object.__setattr__  # frozen: the only writes are these normalisations
        put(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError("stop", len(self.stop), f"at most {MAX_STOP_STRINGS} stop strings")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
                raise RequestError("stop", text, f"every stop string must have 1 to {MAX_STOP_CHARS} characters")
        if self.stop and not self.detokenize:
            raise RequestError("detokenize", False, "must be true when stop strings are given")
        put(self, "bad_words", tuple(self.bad_words))
        if isinstance(self.bad_words, str) or len(self.bad_words) > MAX_BAD_WORDS:
            raise RequestError("bad_words", self.bad_words, f"must be a list of at most {MAX_BAD_WORDS} strings")
        for text in self.bad_words:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
                raise RequestError("bad_words", text, f"every bad word must have 1 to {MAX_STOP_CHARS} characters")
        put(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            put(self, "allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids", [], "must hold at least one token id")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_LOGIT_BIAS:
                raise RequestError(
                    "logit_bias", self.logit_bias, f"must map at most {MAX_LOGIT_BIAS} token ids to biases"
                )
            _token_ids("logit_bias", list(self.logit_bias))
            for token, bias in self.logit_bias.items():
                _number(f"logit_bias[{token}]", bias, -100, 100)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def replace(self, **changes: object) -> SamplingParams:
        return dataclasses.replace(self, **changes)


def stream_seed(seed: int, index: int) -> tuple[int, int]:
    """Two 32-bit words that key sequence `index` of a request: the same whatever else is in the batch."""
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user sent, validated and tokenised. Lower priority values run first; ties go by arrival."""

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()  # params.bad_words, tokenised
    seed: int = 0  # params.seed, or one drawn by the engine
    priority: int = 0
    cache_salt: str = ""  # requests share prefix-cache pages only within one salt
    arrival_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the token there, and of the most likely ones, best first."""

    token_id: int
    logprob: float
    rank: int  # 1 = the most likely token
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Sequence:
    """One token stream. `tokens` is the truth; pages hold the keys and values of the first `num_computed`.

    The scheduler moves `num_computed` toward `len(tokens)`; when they meet, one more token is sampled. That one
    rule is prefill, chunked prefill, decode, recompute after preemption and verification alike. Steps on their way to
    the device and back count ahead of it: `num_scheduled` tokens will be computed, `num_pending` more will be known.
    """

    request: Request
    index: int = 0  # which of the request's n
    tokens: list[int] = field(default_factory=list)  # prompt, then everything generated
    num_computed: int = 0
    num_scheduled: int = 0  # tokens computed once every step in flight has come back
    num_pending: int = 0  # tokens that steps in flight sample: on the device already, unknown here
    num_cached: int = 0  # prompt tokens found in the prefix cache at first admission
    pages: list[int] = field(default_factory=list)
    row: int | None = None  # place in the runner's per-row state while admitted
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it
    num_preempted: int = 0
    grammar: Grammar | None = None  # request.params.grammar, compiled
    remote: bool = False  # another engine computes its prompt: its pages wait to be filled, see Scheduler.arrive

    def __post_init__(self) -> None:
        self.tokens = self.tokens or list(self.request.prompt_token_ids)

    @property
    def id(self) -> tuple[str, int]:
        return self.request.id, self.index

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def tokens_left(self) -> int:
        """Still to compute or to sample, at most."""
        most = self.request.params.max_tokens or 0
        return 0 if self.finished else len(self.tokens) - self.num_computed + most - self.num_output

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


# The records made once a row and step are named tuples: a frozen dataclass takes three times as long to make.


class ScheduledRow(NamedTuple):
    """One sequence's share of a step: compute tokens [start, start + count); sample if that reaches the end.

    A token at or beyond len(sequence.tokens) was sampled by the step before: the device knows it, the host does not.
    """

    sequence: Sequence
    start: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]  # tuple.count, which nobody wants of a row
    sample: bool
    turn: int = 0  # the sequence's num_preempted when this was decided: a later one voids what the row computed


@dataclass(frozen=True)
class StepPlan:
    """The scheduler's decision for one dispatch. `admitted` rows need their per-row device state initialised.

    With `steps` > 1 every row needs one token, and that many steps follow each other on the device: each computes the
    token that the one before sampled. `rows` are those of the first.
    """

    rows: tuple[ScheduledRow, ...]
    admitted: tuple[Sequence, ...] = ()
    preempted: tuple[Sequence, ...] = ()
    steps: int = 1

    @property
    def parts(self) -> tuple[StepPlan, ...]:
        """By shard."""
        return (self,)

    @property
    def num_tokens(self) -> int:
        """Of one step."""
        return sum([row[2] for row in self.rows])  # asked several times a step: half the time of a generator and a name

    @property
    def decode_only(self) -> bool:
        return self.num_tokens == len(self.rows)


@dataclass(frozen=True)
class ShardedPlan:
    """One step of several shards, each with rows and pages of its own. One without work has an empty plan."""

    parts: tuple[StepPlan, ...]

    @property
    def steps(self) -> int:
        """Shards decide apart, and agree on one."""
        return 1

    @property
    def rows(self) -> tuple[ScheduledRow, ...]:
        """Shard after shard."""
        return tuple(row for part in self.parts for row in part.rows)

    @property
    def decode_only(self) -> bool:
        return all(part.decode_only for part in self.parts)


class SampledToken(NamedTuple):
    """What the runner returns for one scheduled row with `sample`; `error` instead of a token fails the row alone."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


class RowResult(NamedTuple):
    """What the runner returns for one ScheduledRow, in plan order. `later`: the tokens of the steps after the first."""

    sampled: SampledToken | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of prompt tokens start+1 .. start+count, when asked for
    later: tuple[SampledToken, ...] = ()


class TokenOutput(NamedTuple):
    """One sequence's news after a step, in the order of the stream."""

    sequence: Sequence
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass
class RequestTimings:
    """Monotonic seconds. TTFT = first_token_s - arrival_s; TPOT = (finished_s - first_token_s) / (outputs - 1)."""

    arrival_s: float
    first_token_s: float | None = None
    finished_s: float | None = None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s


@dataclass
class CompletionOutput:
    """One of a request's n completions; fields named as vLLM's."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it


@dataclass
class RequestOutput:
    """A request's state or final result; fields named as vLLM's."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # entry 0 is None: nothing precedes it
    num_cached_tokens: int = 0
    timings: RequestTimings | None = None
    error: str | None = None
