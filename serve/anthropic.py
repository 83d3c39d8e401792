"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's shape over the same streams, with tools and thinking.

In: a body as Anthropic's API reference has it (Messages; streaming messages). Out: its message or its events. Thinking
carries no signature: nobody checks one. A budget for it is not kept to.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Iterable, Iterator
from typing import Any

import orjson

from jaxllm.core import GrammarSpec
from serve.errors import ApiError, invalid, unsupported
from serve.front import Front, collect
from serve.middleware import Call
from serve.openai.messages import MAX_TEXT, render
from serve.openai.params import make_params
from serve.openai.parsers.blocks import Block, Blocks, Change, Closed, Grown, Opened, call_of
from serve.openai.protocol import AnthropicBody, AnthropicPrompt, parse
from serve.openai.structured import flat_format
from serve.openai.tools import ToolPlan, plan_tools
from serve.openai.turn import BlockReader, Turn, take_turn
from serve.responses import Answer, EventStream, as_json, event
from serve.streams import Piece, Stream

KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def problem(error: ApiError) -> dict[str, Any]:
    kind = KINDS.get(error.status, "overloaded_error" if error.status == 503 else "api_error")
    return {"type": "error", "error": {**error.body()["error"], "type": kind}}


# ---- in ----


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_of_kind(block, "text", "text", where) for block in _blocks(content, where))


def _blocks(content: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise invalid(where.partition("[")[0], f"{where} must be text or a list of blocks")
    return content


def _of_kind(block: dict[str, Any], kind: str, name: str, where: str) -> str:
    if block.get("type") != kind:
        shown = str(block.get("type"))[:MAX_TEXT]
        raise invalid(where.partition("[")[0], f"{where} has a block of type {shown!r}: this model takes text only")
    if not isinstance(block.get(name), str):
        raise invalid(where.partition("[")[0], f"{where}: a block of type {kind!r} needs {name}, a text")
    return block[name]


def _of_assistant(blocks: list[dict[str, Any]], where: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for block in blocks:
        match block.get("type"):
            case "thinking":
                thoughts.append(_of_kind(block, "thinking", "thinking", where))
            case "redacted_thinking":  # nobody but its maker can read it
                pass
            case "tool_use":
                call_id, name = (_of_kind(block, "tool_use", key, where) for key in ("id", "name"))
                if not isinstance(block.get("input"), dict):
                    raise invalid("messages", f"{where}: a block of type 'tool_use' needs input, an object")
                calls.append(call_of(call_id, name, orjson.dumps(block["input"]).decode()))
            case _:
                texts.append(_of_kind(block, "text", "text", where))
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _of_user(blocks: list[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    """Results of tools are messages of their own."""
    texts = []
    for block in blocks:
        if block.get("type") != "tool_result":
            texts.append(_of_kind(block, "text", "text", where))
            continue
        if texts:
            yield {"role": "user", "content": "\n".join(texts)}
            texts = []
        call_id = _of_kind(block, "tool_result", "tool_use_id", where)
        result = _text(block.get("content") or "", f"{where}.content")
        yield {"role": "tool", "tool_call_id": call_id, "content": result}
    if texts or not blocks:
        yield {"role": "user", "content": "\n".join(texts)}


def _messages(body: AnthropicPrompt) -> list[dict[str, Any]]:
    messages = [] if body.system is None else [{"role": "system", "content": _text(body.system, "system")}]
    for i, message in enumerate(body.messages):
        where = f"messages[{i}].content"
        blocks = _blocks(message.get("content"), where)
        if message.get("role") == "user":
            messages += _of_user(blocks, where)
        elif message.get("role") == "assistant":
            messages.append(_of_assistant(blocks, where))
        else:
            raise invalid("messages", f"messages[{i}].role must be user or assistant")
    return messages


def _plan(front: Front, body: AnthropicPrompt) -> ToolPlan:
    tools, choice = [], body.tool_choice or {"type": "auto"}
    for i, tool in enumerate(body.tools or ()):
        if tool.get("type", "custom") != "custom":
            shown = str(tool.get("type"))[:MAX_TEXT]
            raise unsupported("tools", f"[{i}] of type {shown!r}: only tools with an input_schema can be called")
        function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
        if tool.get("description") is not None:
            function["description"] = tool["description"]
        tools.append({"type": "function", "function": function})
    named = {"type": "function", "function": {"name": choice.get("name")}}
    choices = {"auto": "auto" if tools else None, "any": "required", "none": "none", "tool": named}
    kind = choice.get("type")
    known = kind in choices and (
        kind != "tool" or any(choice.get("name") == tool.get("name") for tool in body.tools or ())
    )
    if not known or (kind == "any" and not tools):
        raise invalid("tool_choice", "tool_choice.type must be auto, any, none or tool, which names one of tools")
    parallel = choice.get("disable_parallel_tool_use") is not True
    return plan_tools(tools, choices[str(kind)], parallel, front.parsers, front.tokenizer)


def _grammar(config: dict[str, Any] | None) -> GrammarSpec | None:
    form = (config or {}).get("format")
    return None if form is None else flat_format(form, "output_config.format", ("json_schema",), strict=True)


def _variables(front: Front, body: AnthropicPrompt) -> dict[str, Any]:
    """Of the template, by the names that families give to a switch for reasoning."""
    effort, thinking = (body.output_config or {}).get("effort"), body.thinking
    if not isinstance(effort, str | None):
        raise invalid("output_config", "output_config.effort must be text")
    found = {} if effort is None else {"reasoning_effort": effort}
    if thinking is None:
        return found
    kind = thinking.get("type")
    if kind not in ("enabled", "adaptive", "disabled"):
        raise invalid("thinking", "thinking.type must be enabled, adaptive or disabled")
    if kind != "disabled" and front.parsers[1] is None:
        raise unsupported("thinking", "is nothing this model does: its chat template shows no reasoning")
    return {**found, "enable_thinking": kind != "disabled", "thinking": kind != "disabled"}


def _prepare(front: Front, call: Call, body: AnthropicBody) -> Turn:
    """In a worker thread."""
    given = {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k}
    values = front.sampling_defaults | {name: value for name, value in given.items() if value is not None}
    values |= {
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences or [],
        "grammar": _grammar(body.output_config),
    }
    params = make_params(values, {"stop": "stop_sequences"})
    goes_on = _goes_on(body)
    return take_turn(
        front,
        _messages(body),
        _plan(front, body),
        params,
        request_id=f"msg_{call.request_id}",
        cache_salt=front.salt(call, None),
        variables=_variables(front, body),
        add_generation_prompt=not goes_on,
        continue_final=goes_on,
    )


def _goes_on(body: AnthropicPrompt) -> bool:
    """An answer goes on where the assistant's last message ends."""
    return bool(body.messages) and body.messages[-1].get("role") == "assistant"


def _count(front: Front, body: AnthropicPrompt) -> int:
    """In a worker thread."""
    goes_on = _goes_on(body)
    prompt = render(
        front.tokenizer,
        _messages(body),
        tools=_plan(front, body).offered,
        add_generation_prompt=not goes_on,
        continue_final=goes_on,
        variables=_variables(front, body),
    )
    return len(prompt.token_ids)


# ---- out ----


def _ending(piece: Piece, blocks: Blocks) -> dict[str, Any]:
    if isinstance(piece.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": piece.stop_reason}
    if piece.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    called = any(block.kind == "call" for block in blocks.made)
    return {"stop_reason": "tool_use" if called else "end_turn", "stop_sequence": None}


def _block(block: Block, text: str) -> dict[str, Any]:
    match block.kind:
        case "text":
            return {"type": "text", "text": text}
        case "reasoning":
            return {"type": "thinking", "thinking": text, "signature": ""}
        case "call":
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _input(text)}


def _input(arguments: str) -> dict[str, Any]:
    """Empty where the answer was cut before they were whole: `stop_reason` says so."""
    try:
        found = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _delta(block: Block, text: str) -> dict[str, Any]:
    match block.kind:
        case "text":
            return {"type": "text_delta", "text": text}
        case "reasoning":
            return {"type": "thinking_delta", "thinking": text}
        case "call":
            return {"type": "input_json_delta", "partial_json": text}


def _told(changes: Iterable[Change]) -> bytes:
    said = []
    for change in changes:
        place: dict[str, Any] = {"index": change.block.index}
        match change:
            case Opened():
                kind, place["content_block"] = "content_block_start", _block(change.block, "")
            case Grown():
                kind, place["delta"] = "content_block_delta", _delta(change.block, change.text)
            case Closed():
                kind = "content_block_stop"
        said.append(event({"type": kind, **place}, kind))
    return b"".join(said)


def _usage(stream: Stream) -> dict[str, int]:
    prompt = len(stream.request.prompt_token_ids)
    return {
        "input_tokens": prompt - stream.num_cached,
        "cache_read_input_tokens": stream.num_cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": stream.num_tokens,
    }


def _message(name: str, stream: Stream, content: list[dict[str, Any]], ending: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": stream.id,
        "type": "message",
        "role": "assistant",
        "model": name,
        "content": content,
        **ending,
        "usage": _usage(stream),
    }


async def _events(name: str, stream: Stream, reader: BlockReader) -> AsyncGenerator[bytes]:
    begun, last = False, Piece(0)
    while (pieces := await stream.next()) != []:
        if not begun:
            begun = True
            start = _message(name, stream, [], {"stop_reason": None, "stop_sequence": None})
            start["usage"]["output_tokens"] = 0
            yield event({"type": "message_start", "message": start}, "message_start")
        if pieces is None:
            yield event({"type": "ping"}, "ping")
        for last in pieces or ():
            if chunk := _told(reader.changes(last)):
                yield chunk
    ending = {"type": "message_delta", "delta": _ending(last, reader.blocks), "usage": _usage(stream)}
    rest = _told(reader.blocks.finish()) + event(ending, "message_delta")
    yield rest + event({"type": "message_stop"}, "message_stop")


async def create(front: Front, call: Call, raw: dict[str, Any]) -> Answer | EventStream:
    return await _in_its_shape(_create(front, call, raw))


async def count_tokens(front: Front, call: Call, raw: dict[str, Any]) -> Answer | EventStream:
    async def counted() -> Answer:
        body = parse(AnthropicPrompt, raw)
        front.check_model(body.model)
        return as_json({"input_tokens": await front.off_loop(_count, front, body)})

    return await _in_its_shape(counted())


async def _in_its_shape(answer: Awaitable[Answer | EventStream]) -> Answer | EventStream:
    try:
        return await answer
    except ApiError as error:
        if error.retry_after_s is not None or error.close:
            raise  # its headers matter more than its shape
        return Answer(orjson.dumps(problem(error)), error.status)


async def _create(front: Front, call: Call, raw: dict[str, Any]) -> Answer | EventStream:
    body = parse(AnthropicBody, raw)
    name = front.check_model(body.model)
    front.check_open(1)
    turn = await front.off_loop(_prepare, front, call, body)
    request, reader = turn.request, turn.reader()
    if not body.stream:
        async with front.opened(call, [request]) as streams:
            piece = (await collect(streams[0]))[0]
            content = [_block(block, block.text) for block in reader.whole(piece)]
            return as_json(_message(name, streams[0], content, _ending(piece, reader.blocks)))

    async def events() -> AsyncGenerator[bytes]:
        async with (
            front.opened(call, [request]) as streams,
            contextlib.aclosing(_events(name, streams[0], reader)) as inner,
        ):
            async for chunk in inner:
                yield chunk

    return EventStream(events(), lambda error: event(problem(error), "error"))
