"""What a model's output consists of, as it arrives: text, reasoning, tool calls.

In: pieces from a parser. Out: events in order, and the whole they add up to. Knows nothing of models or formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class CallStart:
    """A tool call begins; its arguments follow as CallArguments of the same index."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    index: int
    text: str  # a piece of JSON text


Event = Text | Reasoning | CallStart | CallArguments
NewId = Callable[[], str]


@dataclass
class ToolCall:
    id: str
    name: str
    arguments: str = ""


@dataclass
class Parsed:
    """A whole output. None where there is none of it, as OpenAI's message has it."""

    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)


def collect(events: Iterable[Event]) -> Parsed:
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[tuple[CallStart, list[str]]] = []
    for event in events:
        match event:
            case Text():
                content.append(event.text)
            case Reasoning():
                reasoning.append(event.text)
            case CallStart():
                calls.append((event, []))
            case CallArguments():
                calls[event.index][1].append(event.text)
    made = [ToolCall(start.id, start.name, "".join(pieces)) for start, pieces in calls]
    return Parsed("".join(content) or None, "".join(reasoning) or None, made)


def openai_delta(event: Event) -> dict[str, Any]:
    """The event as `delta` of a chat completion chunk."""
    match event:
        case Text():
            return {"content": event.text}
        case Reasoning():
            return {"reasoning_content": event.text}
        case CallStart():
            function = {"name": event.name, "arguments": ""}
            return {"tool_calls": [{"index": event.index, "id": event.id, "type": "function", "function": function}]}
        case CallArguments():
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}


class Sink:
    """Where a parser puts what it finds; neighbours of one kind become one event.

    Whitespace is held until what follows is known: between and around tool calls, and at the end of reasoning, it only
    separates, and is dropped.
    """

    def __init__(self, new_id: NewId) -> None:
        self._new_id = new_id
        self._events: list[Event] = []
        self._pieces: list[str] = []  # of the event being put together
        self._kind: type[Text] | type[Reasoning] | type[CallArguments] = Text
        self._spaces: dict[type, list[str]] = {Text: [], Reasoning: []}
        self._reasoned = False
        self.num_calls = 0

    def text(self, text: str) -> None:
        self._put_trimmed(Text, text)

    def reasoning(self, text: str) -> None:
        if not self._reasoned:
            text = text.lstrip()
            self._reasoned = bool(text)
        self._put_trimmed(Reasoning, text)

    def open_call(self, name: str, call_id: str | None = None) -> None:
        self._flush()
        self._spaces[Text].clear()
        self._events.append(CallStart(self.num_calls, call_id or self._new_id(), name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        self._put(CallArguments, text)

    def end(self) -> None:
        if not self.num_calls and self._spaces[Text]:
            self._put(Text, "".join(self._spaces[Text]))
        self._spaces[Text].clear()

    def drain(self) -> list[Event]:
        self._flush()
        events, self._events = self._events, []
        return events

    def _put_trimmed(self, kind: type[Text] | type[Reasoning], text: str) -> None:
        body = text.rstrip()
        if body:
            self._put(kind, "".join([*self._spaces[kind], body]))
            self._spaces[kind].clear()
        if len(body) < len(text):
            self._spaces[kind].append(text[len(body) :])

    def _put(self, kind: type[Text] | type[Reasoning] | type[CallArguments], text: str) -> None:
        if kind is not self._kind:
            self._flush()
            self._kind = kind
        if text:
            self._pieces.append(text)

    def _flush(self) -> None:
        text, self._pieces = "".join(self._pieces), []
        if not text:
            return
        if self._kind is CallArguments:
            self._events.append(CallArguments(self.num_calls - 1, text))
        else:
            self._events.append(Text(text) if self._kind is Text else Reasoning(text))
