"""An answer as a row of blocks, text, reasoning and calls one after the other: what Responses and Messages are made of.

In: a parser's events. Out: changes of blocks as they happen; the blocks of a whole answer come the same way, so that
streamed and whole answers agree. Knows nothing of HTTP or of either protocol.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from serve.openai.parsers.events import CallArguments, CallStart, Event, Reasoning, Text

Kind = Literal["text", "reasoning", "call"]


@dataclass
class Block:
    index: int
    kind: Kind
    text: str = ""  # of a call: its arguments, JSON
    call_id: str = ""
    name: str = ""


@dataclass(frozen=True)
class Opened:
    block: Block


@dataclass(frozen=True)
class Grown:
    block: Block
    text: str


@dataclass(frozen=True)
class Closed:
    block: Block


Change = Opened | Grown | Closed


@dataclass
class Blocks:
    made: list[Block] = field(default_factory=list)

    def feed(self, events: Iterable[Event]) -> Iterator[Change]:
        for event in events:
            match event:
                case CallStart():
                    yield from self._open(Block(len(self.made), "call", call_id=event.id, name=event.name))
                case CallArguments():
                    yield self._grow(event.text)
                case Text() | Reasoning():
                    kind: Kind = "text" if isinstance(event, Text) else "reasoning"
                    if not self.made or self.made[-1].kind != kind:
                        yield from self._open(Block(len(self.made), kind))
                    yield self._grow(event.text)

    def finish(self) -> Iterator[Change]:
        """An answer of nothing is one text without a character."""
        if not self.made:
            yield from self._open(Block(0, "text"))
        yield Closed(self.made[-1])

    def _open(self, block: Block) -> Iterator[Change]:
        if self.made:
            yield Closed(self.made[-1])
        self.made.append(block)
        yield Opened(block)

    def _grow(self, text: str) -> Change:
        self.made[-1].text += text
        return Grown(self.made[-1], text)


def message_of_blocks(blocks: Iterable[Block]) -> dict[str, Any]:
    """The assistant's message, as a template reads it in the next turn."""
    texts: dict[Kind, list[str]] = {"text": [], "reasoning": [], "call": []}
    calls = []
    for block in blocks:
        texts[block.kind].append(block.text)
        if block.kind == "call":
            calls.append(call_of(block.call_id, block.name, block.text))
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts["text"])}
    if texts["reasoning"]:
        message["reasoning_content"] = "".join(texts["reasoning"])
    if calls:
        message["tool_calls"] = calls
    return message


def call_of(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
