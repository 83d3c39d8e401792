"""How model families write tool calls: hermes/qwen, llama3_json, mistral, deepseek.

In: a Source of the model's text. Out: text and calls into a Sink. What looks like a call and is none stays text. (The
pythonic format has a module of its own.)
"""

from __future__ import annotations

import re
from collections.abc import Collection

from serve.openai.parsers.events import Sink
from serve.openai.parsers.json_calls import call_object, raw_value
from serve.openai.parsers.stream import Format, Source, Steps, ignore

Names = Collection[str] | None
NAME = re.compile(r"[A-Za-z0-9_.-]*")
LINE = re.compile(r"[^\n]*")


def hermes(names: Names) -> Format:
    """`<tool_call>{"name": ..., "arguments": ...}</tool_call>`: Hermes, Qwen 2.5 and 3."""
    begin, end = "<tool_call>", "</tool_call>"

    def form(source: Source, sink: Sink) -> Steps[None]:
        found = yield from source.until((begin,), sink.text)
        while found:
            source.record(begin)
            yield from source.space()
            if (yield from call_object(source, sink)):
                found = yield from source.until((end, begin), ignore)  # a next call may come without an end
                if found == begin:
                    continue
            else:
                sink.text(source.recorded())
            found = yield from source.until((begin,), sink.text)

    return form


def llama3_json(names: Names) -> Format:
    """`{"name": ..., "parameters": ...}` as the whole output or after <|python_tag|>, several parted by `;`.

    Nothing marks a call, so only an object of a known tool's name with its parameters is one.
    """
    tag = "<|python_tag|>"

    def calls(source: Source, sink: Sink) -> Steps[None]:
        while True:
            yield from source.space()
            if (yield from source.peek()) != "{":
                break
            if not (yield from call_object(source, sink, needs_arguments=True, names=names)):
                break
            source.record()
            yield from source.space()
            yield from source.skip(";")
        sink.text(source.recorded())

    def form(source: Source, sink: Sink) -> Steps[None]:
        source.record()
        yield from calls(source, sink)
        while (yield from source.until((tag,), sink.text)):
            source.record(tag)
            yield from calls(source, sink)

    return form


def mistral(names: Names) -> Format:
    """`[TOOL_CALLS][{"name": ..., "arguments": ...}, ...]`, or `[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}`."""
    tag = "[TOOL_CALLS]"

    def array(source: Source, sink: Sink) -> Steps[None]:
        source.take(1)
        before = sink.num_calls
        while True:
            yield from source.space()
            if (yield from source.skip("]")):
                rest = source.recorded()
                if sink.num_calls == before:
                    sink.text(rest)
                return
            if not (yield from call_object(source, sink)):
                sink.text(source.recorded())
                return
            source.record()
            yield from source.space()
            yield from source.skip(",")

    def named(source: Source, sink: Sink) -> Steps[None]:
        name = yield from source.word(NAME)
        pieces: list[str] = []
        if name and (yield from source.skip("[CALL_ID]")):
            yield from source.run(NAME, pieces.append)
        if name:
            yield from source.skip("[ARGS]")
            yield from source.space()
        if name and (yield from source.peek()) == "{":
            source.recorded()
            sink.open_call(name, "".join(pieces) or None)
            yield from raw_value(source, sink.arguments)
        else:
            sink.text(source.recorded())

    def form(source: Source, sink: Sink) -> Steps[None]:
        while (yield from source.until((tag,), sink.text)):
            source.record(tag)
            yield from source.space()
            first = yield from source.peek()
            if first == "[":
                yield from array(source, sink)
            elif first == "{":
                if not (yield from call_object(source, sink)):
                    sink.text(source.recorded())
            else:
                yield from named(source, sink)

    return form


def deepseek(names: Names) -> Format:
    """DeepSeek V3 (function, name, fenced JSON) and V3.1 (name, JSON) between their own marks."""
    marks = {
        name: f"<｜tool▁{name.replace('_', '▁')}｜>" for name in ("calls_begin", "calls_end", "call_begin", "call_end")
    }
    separator = "<｜tool▁sep｜>"

    def call(source: Source, sink: Sink) -> Steps[None]:
        pieces: list[str] = []
        found = yield from source.until((separator, marks["call_end"]), pieces.append)
        name = "".join(pieces).strip()
        yield from source.space()
        if found == separator and (yield from source.peek()) != "{":
            name = (yield from source.word(LINE)).strip()
            yield from source.space()
            if (yield from source.skip("```")):
                yield from source.word(LINE)
                yield from source.space()
        if found == separator and name and (yield from source.peek()) == "{":
            source.recorded()
            sink.open_call(name)
            yield from raw_value(source, sink.arguments)
            yield from source.until((marks["call_end"],), ignore)
        else:
            sink.text(source.recorded())

    def form(source: Source, sink: Sink) -> Steps[None]:
        while (yield from source.until((marks["calls_begin"],), sink.text)):
            source.record(marks["calls_begin"])
            before = sink.num_calls
            while True:
                yield from source.space()
                if not (yield from source.skip(marks["call_begin"])):
                    break
                yield from call(source, sink)
                source.record()
            ended = yield from source.skip(marks["calls_end"])
            rest = source.recorded()
            if not ended or sink.num_calls == before:
                sink.text(rest)

    return form
