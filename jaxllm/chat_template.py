"""Chat templates: messages and tools go in, the text of a prompt comes out, as Hugging Face's templates define it.

Templates are programs from a model's directory, so they run in Jinja's immutable sandbox with exactly the extras that
Hugging Face gives them (trim_blocks, lstrip_blocks, loop controls, `tojson` without HTML escaping, `raise_exception`,
`strftime_now`, a transparent `{% generation %}` block). The sandbox stops escapes, not long loops. Messages are
checked and brought to one shape first; whatever is wrong is one ChatError. This module knows nothing of token ids.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from jaxllm.core import JaxLLMError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
GUARD_OPEN, GUARD_CLOSE = "\U000f5a5a", "\U000fa5a5"  # private-use characters around a template's special tokens
OWN_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"})

Message = Mapping[str, Any]


class ChatError(JaxLLMError, ValueError):
    """This conversation cannot be made into a prompt; the message says why."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks an answer for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def clock() -> Callable[[str], str]:
    """`strftime_now` for one prompt, however often it is rendered: the time stands still."""
    now = datetime.datetime.now()
    return now.strftime


def compile_template(source: str) -> jinja2.Template:
    """A template ready to render, or ChatError naming the line that does not parse."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ChatError(f"the model's chat template does not parse: line {error.lineno}: {error.message}") from None


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The template's text; ChatError with its own words when it refuses or fails."""
    try:
        return template.render(**variables)
    except jinja2.exceptions.SecurityError as error:
        raise ChatError(f"the model's chat template does something the sandbox forbids: {error}") from None
    except jinja2.TemplateError as error:
        raise ChatError(f"the model's chat template refused the messages: {error}") from None
    except Exception as error:  # templates are programs: they fail in any way programs do
        raise ChatError(f"the model's chat template failed: {type(error).__name__}: {error}") from None


# ---- messages in one shape ----


def _content(where: str, message: Message) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        if message["role"] == "assistant" and message.get("tool_calls"):
            return ""
        raise ChatError(f"{where}.content must be text")
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ChatError(f"{where}.content must be text or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ChatError(f'{where}.content[{i}] must be {{"type": "text", "text": ...}}; this model takes text only')
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """OpenAI sends arguments as JSON text; templates expect the object."""
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise ChatError(f"{where} must be a list")
    shaped = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ChatError(f"{where}[{i}] must hold a function with a name")
        arguments = function.get("arguments")
        if arguments is None or arguments == "":
            arguments = {}
        elif isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
            except (ValueError, RecursionError):
                raise ChatError(f"{where}[{i}].function.arguments must be JSON") from None
            arguments = parsed if isinstance(parsed, dict) else arguments
        shaped.append({**call, "function": {**function, "arguments": arguments}})
    return shaped


def shape_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Check roles and contents; content becomes one string, tool-call arguments become objects."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise ChatError("messages must be a list of at least one message")
    shaped = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise ChatError(f"{where} must be an object with role and content")
        if message.get("role") not in ROLES:
            raise ChatError(f"{where}.role = {message.get('role')!r}: must be one of {', '.join(ROLES)}")
        mine = {**message, "content": _content(where, message)}
        if message.get("tool_calls") is not None:
            mine["tool_calls"] = _tool_calls(f"{where}.tool_calls", message["tool_calls"])
        shaped.append(mine)
    return shaped


def shape_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Tools as OpenAI describes them; None when there are none, as templates expect."""
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ChatError("tools must be a list of objects")
    return [dict(tool) for tool in tools]


# ---- whose special tokens are these ----


class Marks:
    """Tells the special tokens that a template wrote from the same characters in a conversation's strings.

    Two marks are put into the strings before rendering: `owner` before each special token's text, and `cut` at the end
    of a string that ends in the beginning of one and at the start of a string that starts with the end of one, so that
    strings which a template joins do not make one together. What carries no owner mark and no cut is the template's.
    The marks are numbers that occur nowhere else: digits pass unharmed through case changes, trimming and JSON.
    """

    def __init__(self, special_texts: Sequence[str], number: str) -> None:
        self.count = 0  # strings that were marked
        self._owner, self._cut = f"{number}1", f"{number}2"
        self._either = re.compile(f"{number}[12]")
        self._texts = special_texts
        self._beginnings = {text[:i] for text in special_texts for i in range(1, len(text))}
        self._endings = {text[i:] for text in special_texts for i in range(1, len(text))}
        self._longest = max(map(len, special_texts), default=0)
        alternatives = "|".join(map(re.escape, special_texts)) or "(?!)"
        self._special = re.compile(alternatives)
        self._owned_or_not = re.compile(f"({self._owner})?({alternatives})")

    @classmethod
    def for_inputs(cls, special_texts: Sequence[str], inputs: Any) -> Marks:
        everything = "\n".join([*_strings(inputs), *special_texts])
        number = 9137046285
        while str(number) in everything:
            number += 86028121
        return cls(special_texts, str(number))

    def text(self, text: str) -> str:
        found = text
        if any(special in text for special in self._texts):
            found = self._special.sub(lambda match: self._owner + match[0], text)
        sizes = range(1, min(len(text), self._longest) + 1)
        if any(text[:size] in self._endings for size in sizes):
            found = self._cut + found
        if any(text[-size:] in self._beginnings for size in sizes):
            found += self._cut
        self.count += found != text
        return found

    def key(self, key: Any) -> Any:
        """Templates look keys up by name, so a key is touched only when it holds a whole special token."""
        whole = isinstance(key, str) and any(special in key for special in self._texts)
        return self.text(key) if whole else key

    def apply(self, value: Any) -> Any:
        """The same value with its strings marked."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.key(key): self.apply(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.apply(inner) for inner in value]
        return value

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Roles are one of a few known words, and some templates build a special token from them."""
        return {key: inner if key == "role" else self.apply(inner) for key, inner in message.items()}

    def remove(self, text: str) -> str:
        """The text without marks."""
        return self._either.sub("", text)

    def owned_by_template(self, text: str) -> list[str]:
        """The special tokens in a text, in order, without those that carry a mark."""
        return [match[2] for match in self._owned_or_not.finditer(text) if not match[1]]

    def guard(self, text: str) -> str:
        """The text without marks, each special token of the template's between guard characters."""

        def guarded(match: re.Match[str]) -> str:
            return match[2] if match[1] else GUARD_OPEN + match[2] + GUARD_CLOSE

        text = text.replace(GUARD_OPEN, "").replace(GUARD_CLOSE, "")  # nobody else may write these
        return self.remove(self._owned_or_not.sub(guarded, text))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
