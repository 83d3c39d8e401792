"""Streaming text: token ids go in one by one, text that will never change comes out, until a stop string ends it.

IncrementalDetokenizer turns tokens into characters and never emits half a one. StopChecker passes characters on, holds
back what may still become a stop string, and says which one was completed. Both take time linear in the text and give
the same result however the text is cut into pieces. Knows nothing of sequences, requests or sampling.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class TokenPieces(Protocol):
    """What detokenising needs of a tokenizer."""

    @property
    def special_ids(self) -> Collection[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def leading_bytes(self, token_id: int) -> bytes: ...


class IncrementalDetokenizer:
    """The text of a growing token list, a piece at a time; the pieces join to what decoding it whole would give.

    After a prompt that has text, the first token is read as a continuation of it: a space before a word is kept.
    """

    def __init__(
        self, tokenizer: TokenPieces, *, prompt_token_ids: Iterable[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped: Collection[int] = tokenizer.special_ids if skip_special_tokens else ()
        self._started = any(tokenizer.token_bytes(i) for i in prompt_token_ids if i not in self._skipped)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        if token_id in self._skipped:
            return ""
        piece = self._tokenizer.token_bytes(token_id)
        if not self._started and piece:
            self._started = True
            piece = self._tokenizer.leading_bytes(token_id)
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What is left when no more tokens come: U+FFFD for the beginning of a character, else nothing."""
        return self._decoder.decode(b"", final=True)


@dataclass(slots=True)
class _Node:
    """A beginning of some stop strings. `longest` is the longest stop string that ends here."""

    depth: int
    longest: str = ""
    fallback: _Node | None = None  # the longest proper suffix that is also such a beginning
    children: dict[str, _Node] = field(default_factory=dict)


def _build(stops: Sequence[str]) -> _Node:
    """Aho-Corasick: one walk along a text finds every stop string in it."""
    root = _Node(0)
    for stop in stops:
        node = root
        for character in stop:
            node = node.children.setdefault(character, _Node(node.depth + 1))
        node.longest = stop
    queue = deque(root.children.values())
    for node in queue:
        node.fallback = root
    while queue:
        node = queue.popleft()
        for character, child in node.children.items():
            child.fallback = _next(node.fallback, character) if node.fallback else root
            child.longest = child.longest or child.fallback.longest
            queue.append(child)
    return root


def _next(node: _Node, character: str) -> _Node:
    while True:
        child = node.children.get(character)
        if child is not None:
            return child
        if node.fallback is None:
            return node
        node = node.fallback


class StopChecker:
    """Passes text on up to the stop string that is completed first; of several completed at once, the longest.

    `matched` is that stop string, once there is one; nothing passes after it.
    """

    def __init__(self, stops: Sequence[str] = (), *, include_stop_str: bool = False) -> None:
        self.matched: str | None = None
        self._include = include_stop_str
        self._node = self._root = _build(stops)
        self._held = ""  # the end of the text so far, as far as it is the beginning of a stop string

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """The characters that can be shown now. A stop string counts only where `may_stop` holds at its end."""
        if self.matched is not None:
            return ""
        if not self._root.children:
            return text
        node = self._node
        for i, character in enumerate(text):
            node = _next(node, character)
            if node.longest and may_stop:
                self.matched = node.longest
                end = len(self._held) + i + 1
                seen, self._held = self._held + text, ""
                return seen[: end if self._include else end - len(node.longest)]
        self._node = node
        seen = self._held + text
        shown = len(seen) - node.depth
        self._held = seen[shown:]
        return seen[:shown]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held, self._node = self._held, "", self._root
        return held
