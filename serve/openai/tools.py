"""Tools and reasoning of one chat: what the prompt offers, what the answer must match, how its text is read.

In: tools and choice as chat completions have them, the tokenizer, names of parsers. Out: a ToolPlan, which makes each
choice's parser. No JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.core import GrammarSpec, RequestError
from jaxllm.engine.decoding.grammars import after_thinking
from serve.errors import ApiError, from_request_error, unsupported
from serve.openai.parsers.events import Event, Parsed, openai_delta
from serve.openai.parsers.output import (
    ALIASES,
    REASONING_PARSERS,
    TOOL_PARSERS,
    OutputParser,
    guess_parsers,
    starts_in_reasoning,
)
from serve.openai.parsers.tool_grammar import check_tools, choose, tool_grammar
from serve.settings import FrontSettings


@dataclass(frozen=True)
class ToolPlan:
    offered: list[dict[str, Any]] | None = None  # what the template shows the model
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    names: frozenset[str] = frozenset()
    grammar: GrammarSpec | None = None  # tool_choice required or named
    parallel: bool = True  # False: of several calls the first is the answer's

    @property
    def parses(self) -> bool:
        return self.tool_parser is not None or self.reasoning_parser is not None

    @property
    def keeps_special_tokens(self) -> bool:
        return self.tool_parser is not None and TOOL_PARSERS[self.tool_parser].keeps_special_tokens

    @property
    def reasoning_marks(self) -> tuple[str, str]:
        """What stands before and after reasoning; only of a plan that has a parser for it."""
        assert self.reasoning_parser is not None
        marks = REASONING_PARSERS[self.reasoning_parser]
        return marks.start, marks.end

    def past_thinking(self, grammar: GrammarSpec | None, prompt: str) -> GrammarSpec | None:
        """A form that is asked for is the answer's: a model that thinks may think first."""
        if grammar is None or self.reasoning_parser is None:
            return grammar
        inside = starts_in_reasoning(self.reasoning_parser, prompt)
        try:
            return after_thinking(grammar, *self.reasoning_marks, inside=inside)
        except RequestError as error:  # with what leads to it, it may be too long
            raise from_request_error(error, code="invalid_schema") from None

    def parser(self, prompt: str) -> OutputParser:
        inside = starts_in_reasoning(self.reasoning_parser, prompt)
        options = {"inside": inside, "tool_names": self.names or None, "parallel": self.parallel}
        return OutputParser(self.tool_parser, self.reasoning_parser, **options)


def parser_names(settings: FrontSettings, tokenizer: Any) -> tuple[str | None, str | None]:
    """The parsers that the settings name, or that the model's template shows."""
    template = (
        "" if tokenizer is None else tokenizer.templates.get("tool_use") or tokenizer.templates.get("default", "")
    )
    guessed = guess_parsers(template)
    named = (ALIASES.get(name, name) for name in (settings.tool_parser, settings.reasoning_parser))
    named = [None if name == "none" else name for name in named]
    tools, reasoning = (guess if name == "auto" else name for name, guess in zip(named, guessed, strict=True))
    if tools is not None and tools not in TOOL_PARSERS:
        raise ValueError(f"tool_parser = {tools!r}: must be auto, none, {', '.join(TOOL_PARSERS)}")
    if reasoning is not None and reasoning not in REASONING_PARSERS:
        raise ValueError(f"reasoning_parser = {reasoning!r}: must be auto, none, {', '.join(REASONING_PARSERS)}")
    return tools, reasoning


def plan_tools(
    offered: Sequence[Any] | None,
    tool_choice: object,
    parallel: bool | None,
    names: tuple[str | None, str | None],
    tokenizer: Any,
) -> ToolPlan:
    """Raises ApiError naming what is wrong with tools or tool_choice, both as chat completions have them."""
    parser, reasoning = names
    try:
        tools = check_tools(offered) if offered else []
        choice, callable_ = choose(tools, tool_choice)
        if choice == "none":
            return ToolPlan(reasoning_parser=reasoning)
        if parser is None:
            raise unsupported("tools", "are not supported by this model: its chat template shows no format for calls")
        spec, several = None, parallel is not False
        if choice == "required":
            added = {token.content for token in tokenizer.rust.get_added_tokens_decoder().values()}
            spec = tool_grammar(parser, callable_, parallel=several, added_tokens=added)
    except RequestError as error:
        raise from_request_error(error, code="invalid_value") from None
    return ToolPlan(list(offered or ()), parser, reasoning, frozenset(tool.name for tool in callable_), spec, several)


def merge_grammars(asked: GrammarSpec | None, plan: ToolPlan) -> GrammarSpec | None:
    if asked is not None and plan.grammar is not None:
        message = f"{asked.field} and a tool_choice that forces a call exclude each other"
        raise ApiError(400, message, param="tool_choice", code="invalid_value")
    return plan.grammar or asked


def message_of(parsed: Parsed) -> dict[str, Any]:
    """The assistant's message of a whole answer."""
    message: dict[str, Any] = {"role": "assistant", "content": parsed.content, "refusal": None}
    if parsed.reasoning is not None:
        message["reasoning_content"] = parsed.reasoning
    if parsed.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in parsed.tool_calls
        ]
    return message


def deltas_of(events: list[Event]) -> list[dict[str, Any]]:
    return [openai_delta(event) for event in events]
