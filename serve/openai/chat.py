"""POST /v1/chat/completions: messages in, one message or a stream of deltas out; logprobs, n, usage."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from jaxllm.core import MAX_N, TokenLogprobs
from serve.errors import invalid
from serve.front import Front, collect
from serve.middleware import Call
from serve.openai.logprobs import Namer, chat_logprobs, prompt_logprobs
from serve.openai.messages import check_variables
from serve.openai.params import chat_params
from serve.openai.protocol import ChatBody, parse
from serve.openai.tools import deltas_of, message_of, plan_tools
from serve.openai.turn import Turn, take_turn
from serve.openai.usage import usage_of, weights_of
from serve.responses import DONE, PING, Answer, EventStream, TextEvent, as_json, event
from serve.streams import Piece, Stream


def prepare(front: Front, call: Call, body: ChatBody) -> Turn:
    """In a worker thread."""
    params = chat_params(body, front.sampling_defaults)
    plan = plan_tools(body.tools, body.tool_choice, body.parallel_tool_calls, front.parsers, front.tokenizer)
    if body.continue_final_message and body.add_generation_prompt and "add_generation_prompt" in body.model_fields_set:
        raise invalid("continue_final_message", "continue_final_message and add_generation_prompt exclude each other")
    variables = check_variables(body.chat_template_kwargs, front.settings.template_variables)
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    return take_turn(
        front,
        body.messages,
        plan,
        params,
        request_id=body.request_id or f"chatcmpl-{call.request_id}",
        cache_salt=front.salt(call, body.cache_salt),
        limit_name="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        variables=variables,
        add_generation_prompt=body.add_generation_prompt,
        continue_final=body.continue_final_message,
        truncate_to=body.truncate_prompt_tokens,
        priority=body.priority,
    )


class Chat:
    """One call's answer in the making."""

    def __init__(self, front: Front, body: ChatBody, turn: Turn) -> None:
        self.body, self.request = body, turn.request
        self.parsers = [turn.parser() for _ in range(body.n)] if turn.parses else []
        self.head = {
            "id": turn.request.id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": front.check_model(body.model),
        }
        self.namer = Namer(None if body.return_tokens_as_token_ids else front.tokenizer)
        options = body.stream_options
        usage = options is not None and options.continuous_usage_stats
        self._text_only = not (body.logprobs or body.return_token_ids or usage)  # so are chunks in mid-stream
        self._events: dict[int, TextEvent] = {}  # by choice

    async def whole(self, stream: Stream) -> Answer:
        body, choices = self.body, []
        pieces = await collect(stream)
        for piece in pieces:
            message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
            if self.parsers:
                message = message_of(self.parsers[piece.index].parse(piece.text))
            choice = {
                "index": piece.index,
                "message": message,
                "logprobs": chat_logprobs(piece.logprobs, self.namer) if body.logprobs else None,
                "finish_reason": self._reason(piece),
                "stop_reason": piece.stop_reason,
            }
            if body.return_token_ids:
                choice["token_ids"] = piece.token_ids
            choices.append(choice)
        answer = {**self.head, **weights_of(stream), "choices": choices, "usage": usage_of([stream])}
        if body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(pieces[0].prompt_logprobs, self.namer)
        if body.return_token_ids:
            answer["prompt_token_ids"] = list(self.request.prompt_token_ids)
        return as_json(answer)

    def _reason(self, piece: Piece) -> str | None:
        called = bool(self.parsers) and self.parsers[piece.index].num_calls > 0
        return "tool_calls" if called and piece.finish_reason == "stop" else piece.finish_reason

    def _deltas(self, piece: Piece) -> list[dict[str, Any]]:
        if not self.parsers:
            return [{"content": piece.text}]
        parser = self.parsers[piece.index]
        events = parser.feed(piece.text)
        if piece.finish_reason is not None:
            events += parser.finish()
        return deltas_of(events) or [{}]

    def _choices(self, piece: Piece, first: bool) -> list[dict[str, Any]]:
        """One choice for each chunk that this piece makes; none when a parser holds all of it back."""
        body, found = self.body, []
        for delta in self._deltas(piece):
            if first and not found:
                delta = {"role": "assistant", "content": "", **delta}
            found.append({"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": None})
        if body.logprobs and piece.logprobs:
            found[0]["logprobs"] = chat_logprobs(piece.logprobs, self.namer)
        if body.return_token_ids:
            found[0]["token_ids"] = piece.token_ids
        if piece.finish_reason is not None:
            found[-1] |= {"finish_reason": self._reason(piece), "stop_reason": piece.stop_reason}
        return [one for one in found if one["delta"] or one["finish_reason"] or one["logprobs"] or "token_ids" in one]

    def _plain(self, piece: Piece, head: dict[str, Any], with_usage: bool) -> bytes:
        """The event of a piece that is only text, in mid-stream."""
        found = self._events.get(piece.index)
        if found is None:
            chunk = {**head, "usage": None} if with_usage else head
            choice = {"index": piece.index, "logprobs": None, "finish_reason": None}
            found = self._events[piece.index] = TextEvent(
                lambda text: {**chunk, "choices": [{**choice, "delta": {"content": text}}]}
            )
        return found(piece.text)

    async def events(self, front: Front, call: Call) -> AsyncGenerator[bytes]:
        head, options, begun = {**self.head, "object": "chat.completion.chunk"}, self.body.stream_options, set[int]()
        with_usage = options is not None and options.include_usage
        text_only, scored = self._text_only and not self.parsers, list[TokenLogprobs]()
        async with front.opened(call, [self.request]) as (stream,):
            while (pieces := await stream.next()) != []:
                if pieces is None:
                    yield PING
                    continue
                if not begun:
                    head |= weights_of(stream)
                chunks = []
                for piece in pieces:
                    if not begun and self.body.prompt_logprobs is not None:
                        scored += piece.prompt_logprobs
                        if not piece.token_ids and piece.finish_reason is None:
                            continue  # a part of a long prompt
                    if text_only and piece.finish_reason is None and piece.index in begun:
                        chunks.append(self._plain(piece, head, with_usage))
                        continue
                    for choice in self._choices(piece, piece.index not in begun):
                        chunk = {**head, "choices": [choice]}
                        if self.body.return_token_ids and not begun:
                            chunk["prompt_token_ids"] = list(self.request.prompt_token_ids)
                        if self.body.prompt_logprobs is not None and not begun:
                            chunk["prompt_logprobs"] = prompt_logprobs(scored, self.namer)
                        begun.add(piece.index)
                        if with_usage:
                            continuous = options is not None and options.continuous_usage_stats
                            chunk["usage"] = usage_of([stream]) if continuous else None
                        chunks.append(event(chunk))
                if chunks:
                    yield b"".join(chunks)
            if with_usage:
                yield event({**head, "choices": [], "usage": usage_of([stream])})
            yield DONE


async def create(front: Front, call: Call, raw: dict[str, Any]) -> Answer | EventStream:
    body = parse(ChatBody, raw)
    front.check_model(body.model)
    front.check_open(body.n if 1 <= body.n <= MAX_N else 1)  # n itself is judged with the other numbers
    turn = await front.off_loop(prepare, front, call, body)
    chat = Chat(front, body, turn)
    if not body.stream:
        async with front.opened(call, [turn.request]) as streams:
            return await chat.whole(streams[0])

    return EventStream(chat.events(front, call))
