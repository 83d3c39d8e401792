"""Compiled grammars: from a GrammarSpec to a matcher that says, token by token, what one sequence may write next.

In: the model's tokenizer.json and GrammarSpecs. Out: grammars, cached by what they say; of each, as many matchers as
there are sequences. Masks are packed as in `mask`; once the grammar is complete they allow only end-of-sequence. Knows
nothing of logits, devices, requests or scheduling.

Compiling is Rust that holds no interpreter lock and can neither be stopped nor trusted with everything that
people send: some grammars take minutes, some overflow its stack. So a spec first passes the checks of `grammars`, then,
where there is a Trial, a run in a process of its own, and only then compiles here.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import llguidance
import numpy as np
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

from jaxllm.core import GrammarSpec, RequestError
from jaxllm.engine.decoding.grammars import check_spec, spec_key
from jaxllm.engine.decoding.lark import to_grammar

Check = Callable[[GrammarSpec], None]  # raises RequestError
CACHE_SIZE = 128
# A JSON object of a thousand optional properties has two items a property in its first row.
LIMITS = llguidance.LLParserLimits(
    max_items_in_row=10_000,
    step_max_items=100_000,
    max_lexer_states=100_000,
    max_grammar_size=200_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)


class TokenizerBridge:
    """llguidance's view of the model's tokenizer. Takes a second for a large vocabulary: make one."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self.eos_token_ids, self.vocab_size = tuple(eos_token_ids), vocab_size
        if not self.eos_token_ids:
            raise ValueError("this model names no end-of-sequence token, so a grammar could not end")
        self.rust = llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(self.eos_token_ids))
        # Texts that only one token writes, as llguidance sees it: special ones, and added ones that look <so>.
        added = {token["content"]: token["id"] for token in json.loads(tokenizer_json).get("added_tokens") or []}
        self.special = {text: i for text, i in added.items() if text and self.rust.is_special_token(i)}


class GrammarMatcher:
    """One sequence's place in its grammar."""

    def __init__(self, machine: llguidance.LLMatcher, vocab_size: int) -> None:
        self._machine, self._words = machine, -(-vocab_size // 32)

    @property
    def finished(self) -> bool:
        """Nothing but end-of-sequence may follow."""
        return self._machine.is_stopped() and not self._machine.is_error()

    @property
    def accepting(self) -> bool:
        """What was written so far is complete, though more may follow."""
        return self._machine.is_accepting()

    @property
    def error(self) -> str | None:
        """Why the matcher gave up: a token it did not allow, or a step that would take too long."""
        return _first_line(self._machine.get_error()) if self._machine.is_error() else None

    def bits(self) -> NDArray[np.uint32]:
        """The next token's mask; all zero after an error."""
        row = np.zeros((1, self._words), np.int32)
        if not self._machine.is_error():
            fill_next_token_bitmask(self._machine, row)
            if self._machine.is_error():  # then it allows end-of-sequence, as if all were well
                row[:] = 0
        return row[0].view(np.uint32)

    def advance(self, token_id: int) -> bool:
        """False when the grammar does not allow the token; then the matcher stays in error."""
        return not self._machine.is_error() and self._machine.consume_token(token_id)

    def rollback(self, count: int) -> None:
        """Forgets the last tokens; not after an error."""
        if count and not self._machine.rollback(count):
            raise ValueError(f"cannot roll back {count} tokens: {self.error}")


class CompiledGrammar:
    """A grammar at its start; matchers are copies, which cost microseconds."""

    def __init__(self, machine: llguidance.LLMatcher, vocab_size: int) -> None:
        self._machine, self._vocab_size = machine, vocab_size

    def matcher(self) -> GrammarMatcher:
        return GrammarMatcher(self._machine.deep_copy(), self._vocab_size)


def compile_spec(spec: GrammarSpec, bridge: TokenizerBridge) -> CompiledGrammar:
    """Raises RequestError when the grammar is wrong, or no token can begin it. Bounded only by llguidance's limits."""
    machine = llguidance.LLMatcher(bridge.rust, to_grammar(spec, bridge.special), log_level=0, limits=LIMITS)
    if machine.is_error():
        raise _refused(spec, machine.get_error())
    grammar = CompiledGrammar(machine, bridge.vocab_size)
    first = grammar.matcher()
    if not first.bits().any():
        raise _refused(spec, first.error or "no token can begin it")
    return grammar


@dataclass
class GrammarCompiler:
    """Compiles in worker threads, each spec once; the most recently used stay. Safe to call from any thread."""

    bridge: Callable[[], TokenizerBridge]  # called once, in a worker
    trial: Check | None = None  # see grammar_trial; None: specs were tried before they came here
    cache_size: int = CACHE_SIZE
    threads: int = 1
    hits: int = 0
    misses: int = 0
    _known: OrderedDict[str, Future[CompiledGrammar]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _bridge_lock: threading.Lock = field(default_factory=threading.Lock)
    _bridge: TokenizerBridge | None = None
    _pool: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.threads, "grammar")

    def submit(self, spec: GrammarSpec) -> Future[CompiledGrammar]:
        """The grammar, now or later; its exception is a RequestError. Failures are not kept."""
        key = spec_key(spec)
        with self._lock:
            future = self._known.get(key)
            if future is not None and not (future.done() and future.exception() is not None):
                self._known.move_to_end(key)
                self.hits += 1
                return future
            self.misses += 1
            future = self._known[key] = self._pool.submit(self._compile, spec)
            while len(self._known) > self.cache_size:
                self._known.popitem(last=False)
            return future

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """The grammar, waiting for it; RequestError names the spec's field."""
        return self.submit(spec).result()

    def warm_up(self) -> None:
        """Reads the tokenizer, so that the first request does not wait for it."""
        self._pool.submit(self._get_bridge, None)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, spec: GrammarSpec) -> CompiledGrammar:
        check_spec(spec)
        bridge = self._get_bridge(spec)
        if self.trial is not None:
            self.trial(spec)
        return compile_spec(spec, bridge)

    def _get_bridge(self, spec: GrammarSpec | None) -> TokenizerBridge:
        with self._bridge_lock:
            if self._bridge is None:
                try:
                    self._bridge = self.bridge()
                except (ValueError, OSError) as error:
                    name = spec.field if spec is not None else "response_format"
                    why = f"is not available with this model's tokenizer: {_first_line(str(error))}"
                    raise RequestError(name, "structured output", why) from None
            return self._bridge


def _refused(spec: GrammarSpec, why: str) -> RequestError:
    return RequestError(spec.field, spec.source, f"cannot be used as a {spec.kind} grammar: {_first_line(why)}")


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and "<non-verbose/>" not in line]
    return " ".join(lines)[:200]
