"""tool_choice required or named as a grammar: the calls a model must write, in the format its parser reads.

In: OpenAI's tools and the name of a tool parser. Out: checked tools, and a GrammarSpec whose every sentence that parser
turns into valid calls of those tools. Knows nothing of tokens or matchers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.core import GrammarSpec, RequestError
from jaxllm.engine.decoding.grammars import check_schema, structural_tag

MAX_TOOLS = 128
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
PYTHON_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
Form = dict[str, Any]  # a structural tag's format, see engine.decoding.grammars


@dataclass(frozen=True)
class Tool:
    name: str
    parameters: Mapping[str, Any]
    strict: bool = False


def check_tools(tools: object) -> list[Tool]:
    """The request's `tools`; RequestError names the entry that is wrong."""
    if not isinstance(tools, Sequence) or isinstance(tools, str) or not 1 <= len(tools) <= MAX_TOOLS:
        raise RequestError("tools", tools, f"must be a list of 1 to {MAX_TOOLS} tools")
    found: dict[str, Tool] = {}
    for i, tool in enumerate(tools):
        where = f"tools[{i}].function"
        function = (
            tool.get("function") if isinstance(tool, Mapping) and tool.get("type", "function") == "function" else None
        )
        if not isinstance(function, Mapping):
            raise RequestError(f"tools[{i}]", tool, 'must be {"type": "function", "function": {...}}')
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise RequestError(f"{where}.name", name, "must be 1 to 64 letters, digits, '_', '-' or '.'")
        if name in found:
            raise RequestError(f"{where}.name", name, "is the name of another tool too")
        if parameters is not None:
            if not isinstance(parameters, Mapping):
                raise RequestError(f"{where}.parameters", parameters, "must be a JSON schema")
            check_schema(parameters, f"{where}.parameters")
        found[name] = Tool(name, parameters or NO_PARAMETERS, function.get("strict") is True)
    return list(found.values())


def choose(tools: Sequence[Tool], tool_choice: object) -> tuple[str, list[Tool]]:
    """("none" | "auto" | "required", the tools that may be called) of a request's tool_choice."""
    if tool_choice is None or tool_choice in ("none", "auto", "required"):
        choice = tool_choice if isinstance(tool_choice, str) else "auto" if tools else "none"
        if choice == "required" and not tools:
            raise RequestError("tool_choice", tool_choice, "needs tools")
        return choice, [] if choice == "none" else list(tools)
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    named = [tool for tool in tools if tool.name == name]
    if not named:
        allowed = 'must be "none", "auto", "required" or {"type": "function", "function": {"name": one of tools}}'
        raise RequestError("tool_choice", tool_choice, allowed)
    return "required", named


def tool_grammar(
    parser: str, tools: Sequence[Tool], *, parallel: bool = True, added_tokens: Collection[str] = ()
) -> GrammarSpec:
    """One call or, when `parallel`, several, of any of the tools and of nothing else.

    `added_tokens` of the tokenizer tell a family's generations apart.
    """
    return structural_tag({"format": FORMS[parser](tools, parallel, added_tokens)}, "tools")


def strict_grammar(
    parser: str, tools: Sequence[Tool], *, parallel: bool = True, added_tokens: Collection[str] = ()
) -> GrammarSpec | None:
    """tool_choice auto with tools that say `strict`: free text, in which every call that begins is a valid one.

    None where no tool is strict, or the family marks no beginning of a call.
    """
    trigger = TRIGGERS.get(parser)
    if trigger is None or not any(tool.strict for tool in tools):
        return None
    form = FORMS[parser](tools, parallel, added_tokens)
    if form["type"] == "sequence":
        begin, calls, end = form["elements"]
        tags = [{"type": "tag", "begin": begin["value"], "content": calls, "end": end["value"]}]
    else:
        tags = form["tags"]
    free = {"type": "triggered_tags", "triggers": [trigger], "tags": tags, "stop_after_first": not parallel}
    return structural_tag({"format": free}, "tools")


def _tag(begin: str, tool: Tool, end: str) -> Form:
    content = {"type": "json_schema", "json_schema": dict(tool.parameters), "lenient": not tool.strict}
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def _calls(tags: list[Form], separator: str, parallel: bool) -> Form:
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": not parallel,
    }


def _between(begin: str, calls: Form, end: str) -> Form:
    return {"type": "sequence", "elements": [_const(begin), calls, _const(end)]}


def _const(text: str) -> Form:
    return {"type": "const_string", "value": text}


def _hermes(tools: Sequence[Tool], parallel: bool, added: Collection[str]) -> Form:
    begin = '<tool_call>\n{{"name": "{}", "arguments": '
    return _calls([_tag(begin.format(tool.name), tool, "}\n</tool_call>") for tool in tools], "\n", parallel)


def _llama3_json(tools: Sequence[Tool], parallel: bool, added: Collection[str]) -> Form:
    begin = '{{"name": "{}", "parameters": '
    return _calls([_tag(begin.format(tool.name), tool, "}") for tool in tools], "; ", parallel)


def _mistral(tools: Sequence[Tool], parallel: bool, added: Collection[str]) -> Form:
    if "[ARGS]" in added:
        return _calls([_tag(f"[TOOL_CALLS]{tool.name}[ARGS]", tool, "") for tool in tools], "", parallel)
    begin = '{{"name": "{}", "arguments": '
    tags = [_tag(begin.format(tool.name), tool, "}") for tool in tools]
    return _between("[TOOL_CALLS][", _calls(tags, ", ", parallel), "]")


def _deepseek(tools: Sequence[Tool], parallel: bool, added: Collection[str]) -> Form:
    begin, end = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n", "\n```<｜tool▁call▁end｜>"
    tags = [_tag(begin.format(tool.name), tool, end) for tool in tools]
    return _between("<｜tool▁calls▁begin｜>", _calls(tags, "\n", parallel), "<｜tool▁calls▁end｜>")


def _pythonic(tools: Sequence[Tool], parallel: bool, added: Collection[str]) -> Form:
    """Keyword arguments in the schema's order, required first; values as JSON, whose words the parser reads."""
    return _between("[", _calls([_python_call(tool) for tool in tools], ", ", parallel), "]")


def _python_call(tool: Tool) -> Form:
    schema = tool.parameters
    properties = schema.get("properties") or {}
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}

    def given(name: str, separator: str) -> Form:
        if not PYTHON_NAME.fullmatch(name):
            raise RequestError(
                f"tools.{tool.name}", name, "cannot be an argument's name in this model's way of calling"
            )
        inner = properties[name]
        inner = {**shared, **inner} if isinstance(inner, Mapping) else inner
        value = {"type": "json_schema", "json_schema": inner, "lenient": not tool.strict}
        return {"type": "sequence", "elements": [_const(f"{separator}{name}="), value]}

    def run(first: str, needed: Collection[str], maybe: Sequence[str]) -> Form:
        more = [given(name, ", ") for name in needed]
        return {
            "type": "sequence",
            "elements": [given(first, ""), *more, *(_or_nothing(given(n, ", ")) for n in maybe)],
        }

    required = [name for name in schema.get("required") or () if name in properties]
    optional = [name for name in properties if name not in required]
    if required:
        content = run(required[0], required[1:], optional)
    else:  # the one that comes first has no comma before it
        runs = [run(name, (), optional[i + 1 :]) for i, name in enumerate(optional)]
        content = {"type": "or", "elements": [*runs, _const("")]}
    return {"type": "tag", "begin": f"{tool.name}(", "content": content, "end": ")"}


def _or_nothing(form: Form) -> Form:
    return {"type": "or", "elements": [form, _const("")]}


FORMS: dict[str, Callable[[Sequence[Tool], bool, Collection[str]], Form]] = {
    "hermes": _hermes,
    "qwen": _hermes,
    "llama3_json": _llama3_json,
    "mistral": _mistral,
    "deepseek_v3": _deepseek,
    "pythonic": _pythonic,
}
TRIGGERS = {
    "hermes": "<tool_call>",
    "qwen": "<tool_call>",
    "mistral": "[TOOL_CALLS]",
    "deepseek_v3": "<｜tool▁calls▁begin｜>",
}
