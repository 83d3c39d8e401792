"""JSON as models write it, piece by piece: values passed on raw, strings decoded, call objects understood.

In: a Source that stands at a value. Out: its text through a Put while it arrives. Values are followed by their brackets
and strings alone, not validated: arguments reach the client as the model wrote them. Nothing recurses.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from serve.openai.parsers.events import Sink
from serve.openai.parsers.stream import Put, Source, Steps, ignore

IN_STRING = re.compile(r'[^"\\]*')
IN_CONTAINER = re.compile(r'[^"{}\[\]]*')
IN_SCALAR = re.compile(r"[^\s,\]}]*")
HEX = re.compile(r"[0-9a-fA-F]{4}")
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
ARGUMENT_KEYS = ("arguments", "parameters")


def raw_value(source: Source, put: Put) -> Steps[bool]:
    """Any value, as it stands. False when the text ends within it."""
    first = yield from source.peek()
    if first == '"':
        return (yield from _raw_string(source, put))
    if first not in ("{", "["):
        yield from source.run(IN_SCALAR, put)
        return True
    depth = 0
    while True:
        yield from source.run(IN_CONTAINER, put)
        character = yield from source.peek()
        if not character:
            return False
        if character == '"':
            if not (yield from _raw_string(source, put)):
                return False
            continue
        put(source.take(1))
        depth += 1 if character in "{[" else -1
        if depth == 0:
            return True


def _raw_string(source: Source, put: Put) -> Steps[bool]:
    put(source.take(1))
    while True:
        yield from source.run(IN_STRING, put)
        character = yield from source.peek()
        if not character:
            return False
        put(source.take(1))
        if character == '"':
            return True
        if not (yield from source.peek()):
            return False
        put(source.take(1))


def string_value(source: Source, put: Put) -> Steps[bool]:
    """A string, decoded: what stands between its quotes. False when the text ends within it."""
    source.take(1)
    high = ""  # the first half of a character that JSON writes as two escapes

    def put_all(text: str) -> None:
        nonlocal high
        put("\ufffd" + text if high else text)
        high = ""

    while True:
        yield from source.run(IN_STRING, put_all)
        character = yield from source.peek()
        if character != "\\":
            source.take(len(character))
            if high:
                put_all("")
            return bool(character)
        source.take(1)
        escape = yield from source.peek()
        source.take(len(escape))
        if escape != "u":
            put_all(ESCAPES.get(escape, escape))
            continue
        code = yield from _four_hex(source)
        if code is None:
            put_all("\\u")
        elif 0xDC00 <= code < 0xE000 and high:
            put(chr(0x10000 + ((ord(high) - 0xD800) << 10) + code - 0xDC00))
            high = ""
        else:
            if high:
                put_all("")
            if 0xD800 <= code < 0xDC00:
                high = chr(code)
            else:
                put_all("\ufffd" if 0xDC00 <= code < 0xE000 else chr(code))


def _four_hex(source: Source) -> Steps[int | None]:
    digits = ""
    while len(digits) < 4:
        character = yield from source.peek()
        if not character or character not in "0123456789abcdefABCDEF":
            return None
        digits += source.take(1)
    return int(digits, 16)


def arguments_value(source: Source, put: Put) -> Steps[bool]:
    """A call's arguments: an object raw; a string decoded, as some models encode them twice; null as {}."""
    first = yield from source.peek()
    if first == '"':
        return (yield from string_value(source, put))
    if first in ("{", "["):
        return (yield from raw_value(source, put))
    scalar = yield from source.word(IN_SCALAR)
    put("{}" if scalar in ("", "null", "None") else scalar)
    return True


@dataclass
class _Call:
    """A call object being read. It is a call once its name and, where needed, its arguments have begun."""

    sink: Sink
    names: Collection[str] | None
    name: str | None = None
    opened: bool = False
    seen_arguments: bool = False
    early: list[str] = field(default_factory=list)  # arguments that came before the name

    def try_open(self, source: Source) -> bool:
        if not self.opened and self.name and (self.names is None or self.name in self.names):
            source.recorded()
            self.sink.open_call(self.name)
            self.opened = True
            for piece in self.early:
                self.sink.arguments(piece)
        return self.opened


def call_object(
    source: Source, sink: Sink, *, needs_arguments: bool = False, names: Collection[str] | None = None
) -> Steps[bool]:
    """`{"name": ..., "arguments": {...}}`, keys in any order. True when it was a call, which then is in the sink.

    `needs_arguments`: without that key it is none. `names`: a call of anything else is none. When False, what was
    taken is in the source's recording.
    """
    call = _Call(sink, names)
    if not (yield from source.skip("{")):
        return False
    while True:
        yield from source.space()
        character = yield from source.peek()
        if character == ",":
            source.take(1)
        elif character == '"':
            if not (yield from _member(source, call)):
                return call.opened
        elif character == "}":
            source.take(1)
            if not call.opened and not call.seen_arguments and needs_arguments:
                return False
            if call.try_open(source) and not call.seen_arguments:
                sink.arguments("{}")
            return call.opened
        else:
            return call.opened


def _member(source: Source, call: _Call) -> Steps[bool]:
    """One key and its value. False: the object cannot be followed further."""
    key = yield from _string(source)
    yield from source.space()
    if key is None or not (yield from source.skip(":")):
        return False
    yield from source.space()
    if key == "name" and call.name is None:
        if (yield from source.peek()) != '"':
            return False
        call.name = yield from _string(source)
        if call.seen_arguments:
            call.try_open(source)
        return call.name is not None
    if key in ARGUMENT_KEYS and not call.seen_arguments:
        call.seen_arguments = True
        put = call.sink.arguments if call.try_open(source) else call.early.append
        return (yield from arguments_value(source, put))
    return (yield from raw_value(source, ignore))


def _string(source: Source) -> Steps[str | None]:
    pieces: list[str] = []
    whole = yield from string_value(source, pieces.append)
    return "".join(pieces) if whole else None
