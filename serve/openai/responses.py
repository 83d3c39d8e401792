"""/v1/responses: create, stream, get, delete, cancel; tools and reasoning; a store, each tenant seeing its own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from jaxllm.core import GrammarSpec
from serve.errors import ApiError, invalid, unsupported
from serve.front import Front, collect
from serve.middleware import Call
from serve.openai.logprobs import Namer, chat_logprobs
from serve.openai.params import make_params
from serve.openai.parsers.blocks import Change, message_of_blocks
from serve.openai.protocol import ResponsesBody, parse
from serve.openai.response_items import choice_of, events_of, item_of, messages_of, part_of, tools_of
from serve.openai.store import Stored
from serve.openai.structured import flat_format
from serve.openai.tools import plan_tools
from serve.openai.turn import Turn, take_turn
from serve.openai.usage import usage_of
from serve.responses import PING, Answer, EventStream, as_json, event
from serve.streams import Piece, Stream

BEGINNINGS = ("created", "in_progress")


def grammar_of_text(text: dict[str, Any] | None) -> GrammarSpec | None:
    form = (text or {}).get("format")
    return None if form is None else flat_format(form, "text.format", ("text", "json_object", "json_schema"))


class Response:
    """One response in the making."""

    def __init__(self, front: Front, call: Call, body: ResponsesBody) -> None:
        self.front, self.call, self.body = front, call, body
        self.store = front.stored
        before = self.store.get(body.previous_response_id, call.tenant).messages if body.previous_response_id else []
        self.messages = messages_of(body, before)
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
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": body.reasoning or {"effort": None, "summary": None},
            "temperature": body.temperature,
            "top_p": body.top_p,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "truncation": body.truncation or "disabled",
            "usage": None,
        }

    def prepare(self) -> Turn:
        """In a worker thread."""
        body, front = self.body, self.front
        given = {"temperature": body.temperature, "top_p": body.top_p, "logprobs": body.top_logprobs}
        values = front.sampling_defaults | {name: value for name, value in given.items() if value is not None}
        params = make_params(
            {**values, "max_tokens": body.max_output_tokens, "grammar": grammar_of_text(body.text)},
            {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs"},
        )
        plan = plan_tools(tools_of(body), choice_of(body), body.parallel_tool_calls, front.parsers, front.tokenizer)
        if plan.parses and body.top_logprobs is not None:
            raise unsupported("top_logprobs", "has no place among calls and reasoning; /v1/chat/completions gives them")
        effort = (body.reasoning or {}).get("effort")
        if not isinstance(effort, str | None):
            raise invalid("reasoning", "reasoning.effort must be text")
        self.turn = take_turn(
            front,
            self.messages,
            plan,
            params,
            request_id=self.answer["id"],
            cache_salt=front.salt(self.call, None),
            limit_name="max_output_tokens",
            variables=None if effort is None else {"reasoning_effort": effort},
        )
        self.reader = self.turn.reader()
        self._namer = Namer(front.tokenizer)
        return self.turn

    def _logprobs(self, piece: Piece) -> list[Any] | None:
        return None if self.body.top_logprobs is None else chat_logprobs(piece.logprobs, self._namer)["content"]

    def finished(self, piece: Piece, stream: Stream) -> dict[str, Any]:
        """`piece`: all of the answer, whose blocks have been fed."""
        status = {"stop": "completed", "abort": "cancelled"}.get(piece.finish_reason or "", "incomplete")
        usage, made, scores = usage_of([stream]), self.reader.blocks.made, self._logprobs(piece)
        last = "completed" if status == "completed" else "incomplete"
        request_id = self.call.request_id
        done = [item_of(block, request_id, "completed") for block in made[:-1]]
        parts = None if scores is None else [part_of(made[-1], made[-1].text, scores)]  # then there is one block
        self.answer |= {
            "status": status,
            "output": [*done, item_of(made[-1], request_id, last, parts)],
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": self.turn.reasoning_tokens(piece.token_ids, made)},
                "total_tokens": usage["total_tokens"],
            },
        }
        said = [one for one in self.messages if one["role"] != "system"]
        cut = status == "incomplete" and made[-1].kind == "call"  # half a call, which nobody can answer
        kept = made[:-1] if cut else made
        self.remember([*said, message_of_blocks(kept)])
        return self.answer

    def remember(self, messages: list[dict[str, Any]]) -> None:
        if self.body.store:
            self.store.put(Stored(self.call.tenant, self.answer, messages, self.answer["id"]))

    async def events(self, stream: Stream) -> AsyncGenerator[bytes]:
        number = -1

        def say(value: dict[str, Any]) -> bytes:
            nonlocal number
            number += 1
            return event({"type": value["type"], "sequence_number": number, **value}, value["type"])

        def tell(changes: Iterable[Change], status: str, logprobs: list[Any] | None) -> bytes:
            told = (say(one) for change in changes for one in events_of(change, self.call.request_id, status, logprobs))
            return b"".join(told)

        whole, begun = Piece(0), False
        while (pieces := await stream.next()) != []:
            if not begun:
                begun = True
                yield b"".join(say({"type": f"response.{kind}", "response": self.answer}) for kind in BEGINNINGS)
            if pieces is None:
                yield PING
            for piece in pieces or ():
                whole.join(piece)
                if chunk := tell(self.reader.changes(piece), "completed", self._logprobs(piece)):
                    yield chunk
        last = list(self.reader.blocks.finish())
        answer = self.finished(whole, stream)
        kind = "response.completed" if answer["status"] == "completed" else "response.incomplete"
        ends = tell(last, answer["output"][-1]["status"], self._logprobs(whole))
        yield ends + say({"type": kind, "response": answer})


async def create(front: Front, call: Call, raw: dict[str, Any]) -> Answer | EventStream:
    body = parse(ResponsesBody, raw)
    front.check_model(body.model)
    if body.background:
        raise unsupported("background")
    front.check_open(1)
    response = Response(front, call, body)
    request = (await front.off_loop(response.prepare)).request
    response.remember([])
    if not body.stream:
        async with front.opened(call, [request]) as streams:
            pieces = await collect(streams[0])
            response.reader.whole(pieces[0])
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
