"""Tool calls written as Python: `[get_weather(city="Oslo", days=3), now()]` (Llama 3.2 and 4, and others).

In: a Source of the model's text. Out: calls whose arguments are JSON, translated literal by literal as they arrive.
Nothing is evaluated: what is no literal ends the call, and the rest is text. Nothing recurses, whatever nests.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

from serve.openai.parsers.events import Sink
from serve.openai.parsers.stream import Format, Put, Source, Steps
from serve.openai.parsers.tool_formats import Names

NAME = re.compile(r"[A-Za-z0-9_.]*")
NUMBER = re.compile(r"[-+0-9.eE_]*")
JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
PLAIN = {'"': re.compile(r'[^"\\]*'), "'": re.compile(r"[^'\\]*")}
WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0", "\n": ""}
HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}
CLOSERS = {"[": "]", "(": ")", "{": "}"}
MAX_NUMBER_CHARS = 400


def pythonic(names: Names) -> Format:
    def calls(source: Source, sink: Sink) -> Steps[None]:
        """From after the opening bracket to the closing one; the recording holds what is not certain yet."""
        while True:
            yield from source.space()
            if (yield from source.skip("]")):
                if sink.num_calls:
                    source.recorded()
                return
            name = yield from source.word(NAME)
            yield from source.space()
            known = bool(name) and (names is None or name in names)
            if not known or not (yield from source.skip("(")):
                return
            source.recorded()
            sink.open_call(name)
            if not (yield from _arguments(source, sink.arguments)):
                return
            source.record()
            yield from source.space()
            yield from source.skip(",")

    def form(source: Source, sink: Sink) -> Steps[None]:
        source.record()
        yield from source.space()
        marked = yield from source.skip("<|python_start|>")
        yield from source.space()
        if (yield from source.skip("[")):
            yield from calls(source, sink)
        if marked and sink.num_calls:
            yield from source.space()
            yield from source.skip("<|python_end|>")
        sink.text(source.recorded())

    return form


def _arguments(source: Source, put: Put) -> Steps[bool]:
    """`name=value, ...)` as a JSON object. False when it is something else; then the object stays open."""
    between = "{"
    while True:
        yield from source.space()
        if (yield from source.skip(")")):
            put("{}" if between == "{" else "}")
            return True
        key = yield from source.word(NAME)
        yield from source.space()
        if not key or not (yield from source.skip("=")):
            return False
        yield from source.space()
        put(f"{between}{json.dumps(key)}: ")
        between = ", "
        if not (yield from literal(source, put)):
            return False
        yield from source.space()
        if not (yield from source.skip(",")) and (yield from source.peek()) != ")":
            return False


def literal(source: Source, put: Put) -> Steps[bool]:
    """One Python literal as JSON. False when it is none, or the text ends within it."""
    stack: list[str] = []  # the closing bracket of every container that is open, innermost last
    fresh = True  # nothing stands in the innermost container yet
    while True:
        yield from source.space()
        character = yield from source.peek()
        if stack and character == stack[-1]:
            source.take(1)
            put("}" if stack.pop() == "}" else "]")
        else:
            if stack and not fresh:
                put(", ")
            if stack and stack[-1] == "}" and not (yield from _key(source, put)):
                return False
            character = yield from source.peek()
            if character and character in CLOSERS:
                source.take(1)
                put("{" if character == "{" else "[")
                stack.append(CLOSERS[character])
                fresh = True
                continue
            if not (yield from _scalar(source, put)):
                return False
        fresh = False
        if not stack:
            return True
        yield from source.space()
        if not (yield from source.skip(",")) and (yield from source.peek()) != stack[-1]:
            return False


def _key(source: Source, put: Put) -> Steps[bool]:
    """A dict's key, which JSON wants as a string, and its colon."""
    if (yield from source.peek()) in ('"', "'"):
        if not (yield from _string(source, put)):
            return False
    else:
        pieces: list[str] = []
        if not (yield from _scalar(source, pieces.append)):
            return False
        put(json.dumps("".join(pieces)))
    yield from source.space()
    if not (yield from source.skip(":")):
        return False
    yield from source.space()
    put(": ")
    return True


def _scalar(source: Source, put: Put) -> Steps[bool]:
    character = yield from source.peek()
    if character in ('"', "'"):
        return (yield from _string(source, put))
    if character and character in "+-.0123456789":
        text = _json_number((yield from source.word(NUMBER)))
    else:
        text = WORDS.get((yield from source.word(NAME)))
    if text is None:
        return False
    put(text)
    return True


def _json_number(written: str) -> str | None:
    plain = written.replace("_", "").removeprefix("+")
    if JSON_NUMBER.fullmatch(plain):
        return plain
    try:
        value = float(plain[:MAX_NUMBER_CHARS])
    except ValueError:
        return None
    return json.dumps(value) if math.isfinite(value) else None


def _string(source: Source, put: Put) -> Steps[bool]:
    """A quoted string, escapes and all, as a JSON string."""
    quote = source.take(1)
    put('"')
    put_decoded: Callable[[str], None] = lambda text: put(_inside_json(text))  # noqa: E731
    while True:
        yield from source.run(PLAIN[quote], put_decoded)
        character = yield from source.peek()
        source.take(len(character))
        if character == quote:
            put('"')
            return True
        if not character:
            return False
        escape = yield from source.peek()
        source.take(len(escape))
        if escape in HEX_ESCAPES:
            put_decoded((yield from _hex_escape(source, escape)))
        elif escape in ("\\", "'", '"'):
            put_decoded(escape)
        else:
            put_decoded(ESCAPES.get(escape, "\\" + escape))


def _hex_escape(source: Source, kind: str) -> Steps[str]:
    digits = ""
    while len(digits) < HEX_ESCAPES[kind]:
        character = yield from source.peek()
        if not character or character not in "0123456789abcdefABCDEF":
            return f"\\{kind}{digits}"
        digits += source.take(1)
    code = int(digits, 16)
    return chr(code) if code < 0x110000 else "\ufffd"


def _inside_json(text: str) -> str:
    """The text as it stands between a JSON string's quotes. Half characters stay escaped: they are no Unicode."""
    lone = any("\ud800" <= character <= "\udfff" for character in text)
    return json.dumps(text, ensure_ascii=lone)[1:-1]
