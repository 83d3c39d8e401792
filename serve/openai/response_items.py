"""Items of the Responses API: what a client gives becomes messages, what a model says becomes items and events.

In: `input`, `tools` and `tool_choice` as OpenAI's Responses have them; blocks of an answer. Out: the same in the words
of chat completions; items, and the events that tell of them (OpenAI API reference, Responses, streaming events).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from serve.errors import invalid, unsupported
from serve.openai.messages import MAX_TEXT
from serve.openai.parsers.blocks import Block, Change, Closed, Grown, Opened, call_of
from serve.openai.protocol import ResponsesBody

PREFIX = {"text": "msg", "reasoning": "rs", "call": "fc"}
TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


# ---- in ----


def _text_of(content: Any, where: str, name: str = "content") -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid("input", f"{where}.{name} must be text or a list of text parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in (*TEXT_PARTS, "refusal") or not isinstance(text, str):
            raise invalid("input", f"{where}.{name} of type {str(kind)[:MAX_TEXT]!r}: this model takes text only")
        texts.append(text)
    return "\n".join(texts)


def _named(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise invalid("input", f"{where}.{name} must be text")
    return value


class _Conversation:
    """Items in a row; what the assistant thought, said and called before others spoke is one message of its."""

    def __init__(self, before: list[dict[str, Any]]) -> None:
        self.messages = before
        self._open: dict[str, Any] | None = None  # the assistant's message that may still grow

    def add(self, item: dict[str, Any], where: str) -> None:
        match item.get("type", "message"):
            case "message" if item.get("role") == "assistant":
                text, open_ = _text_of(item.get("content"), where), self._assistant()
                if open_["content"] or "tool_calls" in open_:
                    self._open = None
                    open_ = self._assistant()
                open_["content"] = text
            case "message":
                self._say({"role": item.get("role"), "content": _text_of(item.get("content"), where)})
            case "reasoning":
                self._open = None
                part = "content" if item.get("content") else "summary"
                if text := _text_of(item.get(part) or [], where, part):
                    self._assistant()["reasoning_content"] = text
            case "function_call":
                names = ("call_id", "name", "arguments")
                call = call_of(*(_named(item, name, where) for name in names))
                self._assistant().setdefault("tool_calls", []).append(call)
            case "function_call_output":
                output = _text_of(item.get("output"), where, "output")
                self._say({"role": "tool", "tool_call_id": _named(item, "call_id", where), "content": output})
            case kind:
                raise invalid("input", f"{where} of type {str(kind)[:MAX_TEXT]!r} is not supported")

    def _say(self, message: dict[str, Any]) -> None:
        self._open = None
        self.messages.append(message)

    def _assistant(self) -> dict[str, Any]:
        if self._open is None:
            self._open = {"role": "assistant", "content": ""}
            self.messages.append(self._open)
        return self._open


def messages_of(body: ResponsesBody, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`before`: the conversation that `previous_response_id` names; it is not changed."""
    head = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    conversation = _Conversation([*head, *before])
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    for i, item in enumerate(items):
        conversation.add(item, f"input[{i}]")
    return conversation.messages


def tools_of(body: ResponsesBody) -> list[dict[str, Any]]:
    """Functions as chat completions have them, one object deeper."""
    found = []
    for i, tool in enumerate(body.tools or ()):
        if tool.get("type") != "function":
            raise unsupported(
                "tools", f"[{i}] of type {str(tool.get('type'))[:MAX_TEXT]!r}: only functions can be called"
            )
        function = {name: value for name, value in tool.items() if name != "type" and value is not None}
        found.append({"type": "function", "function": function})
    return found


def choice_of(body: ResponsesBody) -> str | dict[str, Any] | None:
    choice = body.tool_choice
    if not isinstance(choice, dict):
        return choice
    name = choice.get("name")
    if choice.get("type") != "function" or all(tool.get("name") != name for tool in body.tools or ()):
        allowed = '"none", "auto", "required" or {"type": "function", "name": one of tools}'
        raise invalid("tool_choice", f"tool_choice must be {allowed}")
    return {"type": "function", "function": {"name": name}}


# ---- out ----


def item_id(block: Block, request_id: str) -> str:
    return f"{PREFIX[block.kind]}_{request_id}_{block.index}"


def part_of(block: Block, text: str, logprobs: list[Any] | None = None) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": []}
    return part if logprobs is None else {**part, "logprobs": logprobs}


def item_of(block: Block, request_id: str, status: str, parts: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """`parts`: what of its content there is; None: all of it."""
    item: dict[str, Any] = {"id": item_id(block, request_id), "status": status}
    if block.kind == "call":
        arguments = block.text if parts is None else ""
        return {"type": "function_call", **item, "call_id": block.call_id, "name": block.name, "arguments": arguments}
    item["content"] = [part_of(block, block.text)] if parts is None else parts
    if block.kind == "reasoning":
        return {"type": "reasoning", **item, "summary": []}
    return {"type": "message", **item, "role": "assistant"}


def events_of(change: Change, request_id: str, status: str, logprobs: list[Any] | None) -> Iterator[dict[str, Any]]:
    """`status`: of an item that closes. `logprobs`: of the text that is new, or of all of it when it closes."""
    block = change.block
    place = {"item_id": item_id(block, request_id), "output_index": block.index}
    part_place = place if block.kind == "call" else {**place, "content_index": 0}
    name = {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}[block.kind]
    scores = {"logprobs": logprobs or []} if block.kind == "text" else {}
    match change:
        case Opened():
            item = item_of(block, request_id, "in_progress", [])
            yield {"type": "response.output_item.added", "output_index": block.index, "item": item}
            if block.kind != "call":
                yield {"type": "response.content_part.added", **part_place, "part": part_of(block, "")}
        case Grown():
            yield {"type": f"response.{name}.delta", **part_place, "delta": change.text, **scores}
        case Closed() if block.kind == "call":
            yield {"type": f"response.{name}.done", **place, "name": block.name, "arguments": block.text}
            yield _item_done(block, item_of(block, request_id, status))
        case Closed():
            part = part_of(block, block.text, logprobs)
            yield {"type": f"response.{name}.done", **part_place, "text": block.text, **scores}
            yield {"type": "response.content_part.done", **part_place, "part": part}
            yield _item_done(block, item_of(block, request_id, status, [part]))


def _item_done(block: Block, item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "response.output_item.done", "output_index": block.index, "item": item}
