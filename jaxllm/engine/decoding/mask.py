"""Which tokens one sequence may sample next, as packed bits: bit t % 32 of word t // 32 is set when t is allowed.

In: a sequence, whose request names allowed_token_ids, bad words, min_tokens and a grammar. Out: before each sampled
token a row uint32[ceil(V / 32)], or None when every token is allowed. Knows nothing of logits or devices, and of a
grammar only that its matcher says which tokens it allows.

What does not depend on the generated tokens is made once and returned again as the same read-only array, so that
whoever uploads rows can see by identity that nothing changed.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from jaxllm.core import Matcher, Request, RequestError, Sequence

Row = NDArray[np.uint32]
NOTHING_ALLOWED = "allowed_token_ids, bad_words and the grammar leave no token that may be generated next"


def allow_all(vocab_size: int) -> Row:
    """Every token of the vocabulary; the bits beyond it are 0."""
    row = np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32)
    if vocab_size % 32:
        row[-1] = (1 << vocab_size % 32) - 1
    return row


def check_mask(request: Request, vocab_size: int) -> None:
    """Raises RequestError when the request names tokens outside the vocabulary, or allows none to begin with."""
    params = request.params
    words = [token for word in request.bad_word_ids for token in word]
    named = {
        "allowed_token_ids": params.allowed_token_ids or (),
        "stop_token_ids": params.stop_token_ids,
        "eos_token_ids": request.eos_token_ids,
        "bad_words": words,
    }
    for name, ids in named.items():
        for token in ids:
            if not 0 <= token < vocab_size:
                raise RequestError(name, token, f"every token id must be in [0, {vocab_size - 1}], the vocabulary")
    if not all(request.bad_word_ids):
        raise RequestError("bad_words", list(params.bad_words), "every bad word must have at least one token")
    base, early = _static_rows(request, vocab_size)
    for name, row in (("bad_words", base), ("min_tokens", early)):
        if row is not None and not row.any():
            shown = params.bad_words if name == "bad_words" else params.min_tokens
            raise RequestError(name, shown, "together with allowed_token_ids must leave a token that may be generated")


class TokenMask:
    """The mask of one sequence whose request has passed check_mask.

    Its only state is the grammar's matcher, which is brought up to the sequence's tokens when a mask is asked for: a
    new TokenMask of a resumed sequence is right.
    """

    def __init__(self, sequence: Sequence, vocab_size: int) -> None:
        request = sequence.request
        self._sequence, self._vocab_size = sequence, vocab_size
        self._min_tokens = request.params.min_tokens
        self._base, self._early = _static_rows(request, vocab_size)
        self._matcher = sequence.grammar.matcher() if sequence.grammar is not None else None
        self._num_matched = 0  # output tokens the matcher has seen
        # Longer bad words by the token before their last: a step looks only at words that may be complete next.
        self._words: dict[int, list[tuple[int, ...]]] = {}
        for word in request.bad_word_ids:
            if len(word) > 1:
                self._words.setdefault(word[-2], []).append(word)

    def bits(self) -> Row | None:
        """The mask of the sequence's next token; not to be written to.

        All zero when longer bad words ban what little the request allows, or the grammar failed: only this sequence
        fails, and `why_nothing` says why.
        """
        early = self._sequence.num_output < self._min_tokens
        row = self._without_grammar(self._early if early else self._base)
        if self._matcher is None:
            return row
        allowed = self._grammar_bits(self._matcher)
        if row is None:
            return allowed
        both = row & allowed
        if early and not both.any():  # the grammar is complete before min_tokens: it cannot go on
            row = self._without_grammar(self._base)
            both = allowed if row is None else row & allowed
        return both

    @property
    def restricts(self) -> bool:
        """Whether this mask can ever forbid a token."""
        return self._early is not None or self._base is not None or self.follows_tokens

    @property
    def follows_tokens(self) -> bool:
        """Whether the next token's mask depends on tokens generated before it, or on how many there are."""
        early = self._early is not self._base and self._sequence.num_output < self._min_tokens
        return early or self._matcher is not None or bool(self._words)

    @property
    def why_nothing(self) -> str:
        """What to tell the user when no token is allowed."""
        failed = self._matcher.error if self._matcher is not None else None
        return NOTHING_ALLOWED if failed is None else f"the grammar could not be followed further: {failed}"

    def _grammar_bits(self, matcher: Matcher) -> Row:
        sequence = self._sequence
        for token in sequence.tokens[sequence.num_prompt + self._num_matched :]:
            self._num_matched += 1
            if not matcher.advance(token):
                break
        return matcher.bits()

    def _without_grammar(self, static: Row | None) -> Row | None:
        banned = self._completions() if self._words else []
        if not banned:
            return static
        row = allow_all(self._vocab_size) if static is None else static.copy()
        _ban(row, banned)
        return row

    def _completions(self) -> list[int]:
        """Tokens that would complete a bad word. As in vLLM, a word counts only when all of it is generated."""
        tokens, output = self._sequence.tokens, self._sequence.num_output
        banned: list[int] = []
        for word in self._words.get(tokens[-1], ()):
            before = len(word) - 1
            if before <= output and tuple(tokens[-before:]) == word[:-1]:
                banned.append(word[-1])
        return banned


def _static_rows(request: Request, vocab_size: int) -> tuple[Row | None, Row | None]:
    """What is allowed whatever was generated: once min_tokens are there, and before. None = everything."""
    params = request.params
    single = [word[0] for word in request.bad_word_ids if len(word) == 1]
    base = None
    if params.allowed_token_ids is not None:
        base = np.zeros(-(-vocab_size // 32), np.uint32)
        _allow(base, params.allowed_token_ids)
    if single:
        base = allow_all(vocab_size) if base is None else base
        _ban(base, single)
    endings = [*params.stop_token_ids, *request.eos_token_ids]
    early = base
    if params.min_tokens and endings:
        early = allow_all(vocab_size) if base is None else base.copy()
        _ban(early, endings)
    for row in (base, early):
        if row is not None:
            row.flags.writeable = False
    return base, early


def _words_and_bits(ids: Iterable[int]) -> tuple[NDArray[np.int64], Row]:
    tokens = np.fromiter(ids, np.int64)
    return tokens // 32, np.uint32(1) << (tokens % 32).astype(np.uint32)


# `at` because several tokens may share a word.


def _allow(row: Row, ids: Iterable[int]) -> None:
    words, bits = _words_and_bits(ids)
    np.bitwise_or.at(row, words, bits)


def _ban(row: Row, ids: Iterable[int]) -> None:
    words, bits = _words_and_bits(ids)
    np.bitwise_and.at(row, words, ~bits)
