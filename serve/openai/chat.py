"""POST /v1/chat/completions: messages in, one message or a stream of deltas out; logprobs, n, usage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

from jaxllm.core import MAX_N, Request
from serve.errors import invalid, unsupported
from serve.front import Front, collect
from serve.middleware import Call
from serve.openai.logprobs import Namer, chat_logprobs, prompt_logprobs
from serve.openai.messages import check_variables, render
from serve.openai.params import chat_params, check_length, truncate
from serve.openai.protocol import ChatBody, parse
from serve.openai.usage import usage_of
from serve.responses import DONE, PING, Answer, EventStream, as_json, event
from serve.streams import Piece, Stream


def check_tools(body: ChatBody) -> None:
    """The seam of tool parsers: without one, tools are refused unless they are not to be called."""
    choice = body.tool_choice
    if isinstance(choice, str) and choice not in ("none", "auto", "required"):
        raise invalid("tool_choice", "tool_choice must be none, auto, required or a named function")
    if body.tools and choice != "none":
        raise unsupported("tools")
    if choice not in (None, "none", "auto") and not body.tools:
        raise invalid("tool_choice", "tool_choice needs tools")


def prepare(front: Front, call: Call, body: ChatBody) -> Request:
    """In a worker thread: template, tokens, limits."""
    params = chat_params(body, front.sampling_defaults)
    check_tools(body)
    if body.continue_final_message and body.add_generation_prompt and "add_generation_prompt" in body.model_fields_set:
        raise invalid("continue_final_message", "continue_final_message and add_generation_prompt exclude each other")
    variables = check_variables(body.chat_template_kwargs, front.settings.template_variables)
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    ids = render(
        front.tokenizer,
        body.messages,
        tools=body.tools,
        add_generation_prompt=body.add_generation_prompt,
        continue_final=body.continue_final_message,
        variables=variables,
    )
    ids = truncate(ids, body.truncate_prompt_tokens, front.intake.max_model_len)
    named = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    check_length(len(ids), params.max_tokens, front.intake.max_model_len, named)
    return front.make_request(
        ids,
        params=params,
        request_id=body.request_id or f"chatcmpl-{call.request_id}",
        priority=body.priority,
        cache_salt=front.salt(call, body.cache_salt),
    )


class Chat:
    """One call's answer in the making."""

    def __init__(self, front: Front, body: ChatBody, request: Request) -> None:
        self.body, self.request = body, request
        self.head = {
            "id": request.id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": front.check_model(body.model),
        }
        self.namer = Namer(front.tokenizer)

    async def whole(self, stream: Stream) -> Answer:
        body, choices = self.body, []
        pieces = await collect(stream)
        for piece in pieces:
            choice = {
                "index": piece.index,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": chat_logprobs(piece.logprobs, self.namer) if body.logprobs else None,
                "finish_reason": piece.finish_reason,
                "stop_reason": piece.stop_reason,
            }
            if body.return_token_ids:
                choice["token_ids"] = piece.token_ids
            choices.append(choice)
        answer = {**self.head, "choices": choices, "usage": usage_of([stream])}
        if body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(pieces[0].prompt_logprobs, self.namer)
        if body.return_token_ids:
            answer["prompt_token_ids"] = list(self.request.prompt_token_ids)
        return as_json(answer)

    def _delta(self, piece: Piece, first: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant", "content": piece.text} if first else {"content": piece.text}
        found = {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": piece.finish_reason}
        if self.body.logprobs and piece.logprobs:
            found["logprobs"] = chat_logprobs(piece.logprobs, self.namer)
        if piece.finish_reason is not None:
            found["stop_reason"] = piece.stop_reason
        if self.body.return_token_ids:
            found["token_ids"] = piece.token_ids
        return found

    async def events(self, stream: Stream) -> AsyncGenerator[bytes]:
        head, options, begun = {**self.head, "object": "chat.completion.chunk"}, self.body.stream_options, set[int]()
        with_usage = options is not None and options.include_usage
        while (pieces := await stream.next()) != []:
            if pieces is None:
                yield PING
                continue
            chunks = []
            for piece in pieces:
                chunk = {**head, "choices": [self._delta(piece, piece.index not in begun)]}
                if self.body.return_token_ids and not begun:
                    chunk["prompt_token_ids"] = list(self.request.prompt_token_ids)
                begun.add(piece.index)
                if with_usage:
                    continuous = options is not None and options.continuous_usage_stats
                    chunk["usage"] = usage_of([stream]) if continuous else None
                chunks.append(event(chunk))
            yield b"".join(chunks)
        if with_usage:
            yield event({**head, "choices": [], "usage": usage_of([stream])})
        yield DONE


async def create(front: Front, call: Call, raw: dict[str, Any]) -> Answer | EventStream:
    body = parse(ChatBody, raw)
    front.check_model(body.model)
    front.check_open(body.n if 1 <= body.n <= MAX_N else 1)  # n itself is judged with the other numbers
    request = await front.off_loop(prepare, front, call, body)
    chat = Chat(front, body, request)
    if not body.stream:
        async with front.opened(call, [request]) as streams:
            return await chat.whole(streams[0])

    async def events() -> AsyncGenerator[bytes]:
        async with (
            front.opened(call, [request]) as streams,
            contextlib.aclosing(chat.events(streams[0])) as inner,
        ):
            async for chunk in inner:
                yield chunk

    return EventStream(events())
