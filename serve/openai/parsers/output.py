"""The parsers by name, and the one object a response uses: reasoning first, then tool calls in what remains.

In: names of parsers, the model's text. Out: events as the text arrives, or the whole at once; both from one path. Knows
nothing of HTTP, templates' rendering or grammars.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Collection
from dataclasses import dataclass

from serve.openai.parsers.events import CallArguments, CallStart, Event, NewId, Parsed, Sink, Text, collect
from serve.openai.parsers.pythonic import pythonic
from serve.openai.parsers.stream import Format, Source, Steps, StreamParser
from serve.openai.parsers.tool_formats import Names, deepseek, hermes, llama3_json, mistral

ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ToolParser:
    form: Callable[[Names], Format]
    keeps_special_tokens: bool = False  # the marks are special tokens: the text must be decoded with them
    id_length: int | None = None  # the family's template accepts only ids of so many letters and digits


@dataclass(frozen=True)
class ReasoningParser:
    start: str
    end: str
    always_inside: bool = False  # the output begins within the block even if the prompt does not open it


TOOL_PARSERS = {
    "hermes": ToolParser(hermes),
    "qwen": ToolParser(hermes),
    "llama3_json": ToolParser(llama3_json, keeps_special_tokens=True),
    "mistral": ToolParser(mistral, keeps_special_tokens=True, id_length=9),
    "deepseek_v3": ToolParser(deepseek, keeps_special_tokens=True),
    "pythonic": ToolParser(pythonic, keeps_special_tokens=True),
}
REASONING_PARSERS = {
    "qwen3": ReasoningParser("<think>", "</think>"),
    "deepseek_r1": ReasoningParser("<think>", "</think>", always_inside=True),
}
ALIASES = {  # SGLang's names
    "qwen25": "qwen",
    "llama3": "llama3_json",
    "deepseekv3": "deepseek_v3",
    "deepseek-r1": "deepseek_r1",
}
# What a chat template says of the model's way with tools; the first that occurs.
TEMPLATE_SIGNS = (
    ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
    ("[TOOL_CALLS]", "mistral"),
    ("<tool_call>", "hermes"),
    ("<|python_start|>", "pythonic"),
    ('"parameters": dictionary of argument name', "llama3_json"),
)


def guess_parsers(chat_template: str) -> tuple[str | None, str | None]:
    """Names of the tool and the reasoning parser that fit a template; None where nothing shows."""
    tools = next((name for sign, name in TEMPLATE_SIGNS if sign in chat_template), None)
    if "</think>" not in chat_template:
        return tools, None
    return tools, "deepseek_r1" if "<｜Assistant｜>" in chat_template else "qwen3"


def starts_in_reasoning(name: str | None, prompt: str) -> bool:
    """Whether the output begins within the block, for a prompt as rendered."""
    if name is None:
        return False
    parser = REASONING_PARSERS[name]
    opened = prompt.rfind(parser.start)
    closed = prompt.rfind(parser.end)
    if prompt.rstrip().endswith(parser.end):  # the template closed the block: thinking is off
        return False
    return parser.always_inside or (opened > closed and prompt.rstrip().endswith(parser.start))


def _reasoning(parser: ReasoningParser, inside: bool) -> Format:
    def form(source: Source, sink: Sink) -> Steps[None]:
        source.record()
        yield from source.space()
        begun = yield from source.skip(parser.start)
        before = source.recorded()
        if not (begun or inside):
            sink.text(before)
            return
        found = yield from source.until((parser.end,), sink.reasoning)
        if found:
            yield from source.space()

    return form


def _plain(source: Source, sink: Sink) -> Steps[None]:
    """Everything is text."""
    yield from ()


class OutputParser:
    """One choice of one response. `tool_parser` None: tools were not offered, so nothing is a call. `parallel` False:
    calls behind the first are dropped, as a model that was not forced may write several all the same."""

    def __init__(
        self,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
        *,
        inside: bool = False,
        tool_names: Collection[str] | None = None,
        new_id: NewId | None = None,
        parallel: bool = True,
    ) -> None:
        tools = TOOL_PARSERS[tool_parser] if tool_parser is not None else None
        new_id = new_id or _ids(tools)
        form = tools.form(frozenset(tool_names) if tool_names is not None else None) if tools is not None else _plain
        self._tools = StreamParser(form, new_id)
        thoughts = REASONING_PARSERS[reasoning_parser] if reasoning_parser is not None else None
        self._parallel = parallel
        self._reasoning = StreamParser(_reasoning(thoughts, inside), new_id) if thoughts is not None else None

    @property
    def num_calls(self) -> int:
        return self._tools.sink.num_calls

    @property
    def num_examined(self) -> int:
        """Characters looked at so far, all looks counted."""
        first = self._reasoning.source.num_examined if self._reasoning is not None else 0
        return first + self._tools.source.num_examined

    def feed(self, text: str) -> list[Event]:
        """What is certain now that this text came too."""
        found = self._tools.feed(text) if self._reasoning is None else self._pass_on(self._reasoning.feed(text))
        return self._wanted(found)

    def finish(self) -> list[Event]:
        """The rest; after this nothing may be fed."""
        rest = [] if self._reasoning is None else self._pass_on(self._reasoning.finish())
        return self._wanted([*rest, *self._tools.finish()])

    def _wanted(self, events: list[Event]) -> list[Event]:
        if self._parallel:
            return events
        return [event for event in events if not (isinstance(event, CallStart | CallArguments) and event.index > 0)]

    def parse(self, text: str) -> Parsed:
        """The whole output at once."""
        return collect([*self.feed(text), *self.finish()])

    def _pass_on(self, events: list[Event]) -> list[Event]:
        passed: list[Event] = []
        for event in events:
            passed += self._tools.feed(event.text) if isinstance(event, Text) else [event]
        return passed


def _ids(parser: ToolParser | None) -> NewId:
    if parser is not None and parser.id_length is not None:
        length = parser.id_length
        return lambda: "".join(secrets.choice(ALPHABET) for _ in range(length))
    return lambda: f"call_{secrets.token_hex(12)}"
