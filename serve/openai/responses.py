"""/v1/responses: create, stream, get, delete, cancel; a bounded store, each tenant seeing its own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

from jaxllm.core import GrammarSpec, Request, RequestError
from serve.errors import ApiError, invalid, unsupported
from serve.front import Front, collect
from serve.middleware import Call
from serve.openai.logprobs import Namer, chat_logprobs
from serve.openai.messages import render
from serve.openai.params import check_length, make_params
from serve.openai.protocol import ResponsesBody, parse
from serve.openai.store import Stored
from serve.openai.structured import grammar_of
from serve.openai.usage import usage_of
from serve.responses import PING, Answer, EventStream, as_json, event
from serve.streams import Piece, Stream


def _text_of(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid("input", f"{where}.content must be text or a list of text parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text") or not isinstance(part.get("text"), str):
            raise invalid("input", f"{where}.content of type {str(kind)[:80]!r}: this model takes text only")
        texts.append(part["text"])
    return "\n".join(texts)


def messages_of(body: ResponsesBody, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = (
        [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    )
    messages += before
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for i, item in enumerate(body.input):
        if item.get("type", "message") != "message":
            raise invalid("input", f"input[{i}] of type {str(item.get('type'))[:80]!r} is not supported")
        messages.append({"role": item.get("role"), "content": _text_of(item.get("content"), f"input[{i}]")})
    return messages


def _check(body: ResponsesBody) -> None:
    if body.tools:
        raise unsupported("tools")
    if body.background:
        raise unsupported("background")


def grammar_of_text(text: dict[str, Any] | None) -> GrammarSpec | None:
    """Of `text.format`, which is chat's response_format with the schema one step up."""
    form = (text or {}).get("format")
    if form is None:
        return None
    if not isinstance(form, dict):
        raise invalid("text", "text.format must be an object")
    if form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": form}
    elif form.get("type") not in ("text", "json_object"):
        raise invalid("text", "text.format must be of type text, json_object or json_schema")
    try:
        return grammar_of({"response_format": form})
    except RequestError as error:
        raise ApiError(400, f"text.format: {error.allowed}", param="text", code="invalid_schema") from None


class Response:
    """One response in the making."""

    def __init__(self, front: Front, call: Call, body: ResponsesBody) -> None:
        self.front, self.call, self.body = front, call, body
        self.store = front.stored
        before = self.store.get(body.previous_response_id, call.tenant).messages if body.previous_response_id else []
        self.messages = messages_of(body, before)
        self.item_id = f"msg_{call.request_id}"
        self.answer: dict[str, Any] = {
            "id": f"resp_{call.request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": front.check_model(body.model),
            "output": [],
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": False,
            "previous_response_id": body.previous_response_id,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "truncation": body.truncation or "disabled",
            "usage": None,
        }

    def prepare(self) -> Request:
        """In a worker thread."""
        body, front = self.body, self.front
        given = {"temperature": body.temperature, "top_p": body.top_p, "logprobs": body.top_logprobs}
        values = front.sampling_defaults | {name: value for name, value in given.items() if value is not None}
        params = make_params(
            {**values, "max_tokens": body.max_output_tokens, "grammar": grammar_of_text(body.text)},
            {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs"},
        )
        ids = render(front.tokenizer, self.messages).token_ids
        check_length(len(ids), params.max_tokens, front.intake.max_model_len, "max_output_tokens")
        salt = front.salt(self.call, None)
        return front.make_request(ids, params=params, request_id=self.answer["id"], cache_salt=salt)

    def _part(self, piece: Piece) -> dict[str, Any]:
        part: dict[str, Any] = {"type": "output_text", "text": piece.text, "annotations": []}
        if self.body.top_logprobs is not None:
            part["logprobs"] = chat_logprobs(piece.logprobs, Namer(self.front.tokenizer))["content"]
        return part

    def _item(self, piece: Piece, status: str) -> dict[str, Any]:
        return {
            "type": "message",
            "id": self.item_id,
            "role": "assistant",
            "status": status,
            "content": [self._part(piece)],
        }

    def finished(self, piece: Piece, stream: Stream) -> dict[str, Any]:
        status = {"stop": "completed", "abort": "cancelled"}.get(piece.finish_reason or "", "incomplete")
        usage = usage_of([stream])
        self.answer |= {
            "status": status,
            "output": [self._item(piece, "completed" if status == "completed" else "incomplete")],
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }
        said = [one for one in self.messages if one["role"] != "system"]
        self.remember([*said, {"role": "assistant", "content": piece.text}])
        return self.answer

    def remember(self, messages: list[dict[str, Any]]) -> None:
        if self.body.store:
            self.store.put(Stored(self.call.tenant, self.answer, messages, self.answer["id"]))

    async def events(self, stream: Stream) -> AsyncGenerator[bytes]:
        number = -1

        def say(kind: str, **values: Any) -> bytes:
            nonlocal number
            number += 1
            return event({"type": kind, "sequence_number": number, **values}, kind)

        place = {"item_id": self.item_id, "output_index": 0, "content_index": 0}
        whole, begun = Piece(0), False
        while (pieces := await stream.next()) != []:
            if not begun:
                begun = True
                item = {**self._item(Piece(0), "in_progress"), "content": []}
                yield (
                    say("response.created", response=self.answer)
                    + say("response.in_progress", response=self.answer)
                    + say("response.output_item.added", output_index=0, item=item)
                    + say("response.content_part.added", **place, part=self._part(Piece(0)))
                )
            if pieces is None:
                yield PING
            for piece in pieces or ():
                whole.join(piece)
                if piece.text:
                    yield say("response.output_text.delta", **place, delta=piece.text, logprobs=[])
        answer = self.finished(whole, stream)
        kind = "response.completed" if answer["status"] == "completed" else "response.incomplete"
        yield (
            say("response.output_text.done", **place, text=whole.text, logprobs=[])
            + say("response.content_part.done", **place, part=self._part(whole))
            + say("response.output_item.done", output_index=0, item=answer["output"][0])
            + say(kind, response=answer)
        )


async def create(front: Front, call: Call, raw: dict[str, Any]) -> Answer | EventStream:
    body = parse(ResponsesBody, raw)
    front.check_model(body.model)
    _check(body)
    front.check_open(1)
    response = Response(front, call, body)
    request = await front.off_loop(response.prepare)
    response.remember([])
    if not body.stream:
        async with front.opened(call, [request]) as streams:
            pieces = await collect(streams[0])
            return as_json(response.finished(pieces[0], streams[0]))

    async def events() -> AsyncGenerator[bytes]:
        async with (
            front.opened(call, [request]) as streams,
            contextlib.aclosing(response.events(streams[0])) as inner,
        ):
            async for chunk in inner:
                yield chunk

    return EventStream(events(), _failed)


def _failed(error: ApiError) -> bytes:
    body = error.body()["error"]
    return event({"type": "error", **body, "sequence_number": 0}, "error")


def _id(call: Call) -> str:
    return (call.path_params or {}).get("response_id", "")


async def get(front: Front, call: Call) -> Answer:
    return as_json(front.stored.get(_id(call), call.tenant).answer)


async def delete(front: Front, call: Call) -> Answer:
    stored = front.stored.get(_id(call), call.tenant)
    del front.stored.items[stored.answer["id"]]
    return as_json({"id": stored.answer["id"], "object": "response", "deleted": True})


async def cancel(front: Front, call: Call, raw: dict[str, Any]) -> Answer:
    """Ends a response that is being streamed; a finished one stays as it is."""
    stored = front.stored.get(_id(call), call.tenant)
    if front.client.abort(stored.request_id):
        stored.answer["status"] = "cancelled"
    return as_json(stored.answer)
