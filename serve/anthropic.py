"""POST /v1/messages: Anthropic's shape over the same streams; text only."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import orjson

from jaxllm.core import Request
from serve.errors import ApiError, invalid, unsupported
from serve.front import Front, collect
from serve.middleware import Call
from serve.openai.messages import render
from serve.openai.params import check_length, make_params
from serve.openai.protocol import AnthropicBody, parse
from serve.responses import Answer, EventStream, as_json, event
from serve.streams import Piece, Stream

KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def problem(error: ApiError) -> dict[str, Any]:
    kind = KINDS.get(error.status, "overloaded_error" if error.status == 503 else "api_error")
    return {"type": "error", "error": {**error.body()["error"], "type": kind}}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for block in content if isinstance(content, list) else (None,):
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise invalid(where.partition("[")[0], f"{where} must be text or a list of text blocks")
        texts.append(block["text"])
    return "\n".join(texts)


def _prepare(front: Front, call: Call, body: AnthropicBody) -> Request:
    given = {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k}
    values = front.sampling_defaults | {name: value for name, value in given.items() if value is not None}
    stop = body.stop_sequences or []
    params = make_params({**values, "max_tokens": body.max_tokens, "stop": stop}, {"stop": "stop_sequences"})
    messages = [] if body.system is None else [{"role": "system", "content": _text(body.system, "system")}]
    for i, message in enumerate(body.messages):
        if message.get("role") not in ("user", "assistant"):
            raise invalid("messages", f"messages[{i}].role must be user or assistant")
        messages.append({"role": message["role"], "content": _text(message.get("content"), f"messages[{i}].content")})
    ids = render(front.tokenizer, messages).token_ids
    check_length(len(ids), body.max_tokens, front.intake.max_model_len)
    salt = front.salt(call, None)
    return front.make_request(ids, params=params, request_id=f"msg_{call.request_id}", cache_salt=salt)


def _ending(piece: Piece) -> dict[str, Any]:
    if isinstance(piece.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": piece.stop_reason}
    return {"stop_reason": "max_tokens" if piece.finish_reason == "length" else "end_turn", "stop_sequence": None}


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


async def _events(name: str, stream: Stream) -> AsyncGenerator[bytes]:
    begun, last = False, Piece(0)
    while (pieces := await stream.next()) != []:
        if not begun:
            begun = True
            start = _message(name, stream, [], {"stop_reason": None, "stop_sequence": None})
            start["usage"]["output_tokens"] = 0
            block = {"type": "text", "text": ""}
            yield event({"type": "message_start", "message": start}, "message_start") + event(
                {"type": "content_block_start", "index": 0, "content_block": block}, "content_block_start"
            )
        if pieces is None:
            yield event({"type": "ping"}, "ping")
        for last in pieces or ():
            if last.text:
                delta = {"type": "text_delta", "text": last.text}
                yield event({"type": "content_block_delta", "index": 0, "delta": delta}, "content_block_delta")
    yield (
        event({"type": "content_block_stop", "index": 0}, "content_block_stop")
        + event({"type": "message_delta", "delta": _ending(last), "usage": _usage(stream)}, "message_delta")
        + event({"type": "message_stop"}, "message_stop")
    )


async def create(front: Front, call: Call, raw: dict[str, Any]) -> Answer | EventStream:
    try:
        return await _create(front, call, raw)
    except ApiError as error:
        if error.retry_after_s is not None or error.close:
            raise  # its headers matter more than its shape
        return Answer(orjson.dumps(problem(error)), error.status)


async def _create(front: Front, call: Call, raw: dict[str, Any]) -> Answer | EventStream:
    body = parse(AnthropicBody, raw)
    name = front.check_model(body.model)
    if body.tools:
        raise unsupported("tools")
    if body.thinking is not None and body.thinking.get("type") != "disabled":
        raise unsupported("thinking")
    front.check_open(1)
    request = await front.off_loop(_prepare, front, call, body)
    if not body.stream:
        async with front.opened(call, [request]) as streams:
            piece = (await collect(streams[0]))[0]
            content = [{"type": "text", "text": piece.text}]
            return as_json(_message(name, streams[0], content, _ending(piece)))

    async def events() -> AsyncGenerator[bytes]:
        async with front.opened(call, [request]) as streams, contextlib.aclosing(_events(name, streams[0])) as inner:
            async for chunk in inner:
                yield chunk

    return EventStream(events(), lambda error: event(problem(error), "error"))
