"""Tokens of one sequence to pieces of text: never half a character, stop strings cut, special tokens left out.

In: token ids in order. Out: text that is final, and the stop string that ended it. Linear in the text: what is held
back is at most one stop string and three bytes. Knows nothing of sequences, logprobs or HTTP.
"""

from __future__ import annotations

import codecs
from typing import Protocol

from jaxllm.core import SamplingParams


class TokenText(Protocol):
    """What this needs of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def leading_bytes(self, token_id: int) -> bytes: ...


class StopString:
    """Finds one string in a text that comes in pieces; Knuth, Morris and Pratt's automaton, so linear."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0  # how much of it the text so far ends with
        self._fallback = [0] * len(text)
        matched = 0
        for i in range(1, len(text)):
            while matched and text[i] != text[matched]:
                matched = self._fallback[matched - 1]
            matched += text[i] == text[matched]
            self._fallback[i] = matched

    def feed(self, character: str) -> bool:
        """Whether the string is complete with this character."""
        matched, text = self.matched, self.text
        while matched and character != text[matched]:
            matched = self._fallback[matched - 1]
        self.matched = matched + (character == text[matched])
        return self.matched == len(text)


class TextAssembler:
    def __init__(self, tokenizer: TokenText | None, params: SamplingParams) -> None:
        self._tokenizer = tokenizer if params.detokenize else None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [StopString(text) for text in params.stop]
        self._keep_stop, self._skip = params.include_stop_str_in_output, params.skip_special_tokens
        self._min_tokens, self._count = params.min_tokens, 0
        self._held, self._started = "", False
        self.stopped_by: str | None = None

    def push(self, token_id: int) -> str:
        """The text that became final with this token; "" once a stop string was found."""
        self._count += 1
        if self._tokenizer is None or self.stopped_by is not None:
            return ""
        if self._skip and token_id in self._tokenizer.special_ids:
            return ""
        raw = self._tokenizer.token_bytes(token_id) if self._started else self._tokenizer.leading_bytes(token_id)
        self._started = self._started or bool(raw)
        return self._release(self._decoder.decode(raw))

    def finish(self) -> str:
        """What was held back; the sequence has ended."""
        if self._tokenizer is None or self.stopped_by is not None:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        if self.stopped_by is None:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if not self._stops or self._count <= self._min_tokens:
            return text
        text, at = self._held + text, len(self._held)
        for place in range(at, len(text)):
            complete = [stop.text for stop in self._stops if stop.feed(text[place])]
            if complete:
                self.stopped_by = max(complete, key=len)
                self._held = ""
                return text[: place + 1 if self._keep_stop else place + 1 - len(self.stopped_by)]
        keep = max(stop.matched for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
