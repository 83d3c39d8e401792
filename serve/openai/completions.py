"""POST /v1/completions: prompts as text or ids, one or many; whole or streamed; echo, logprobs, n."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from jaxllm.core import MAX_N, Request, TokenLogprobs
from serve.front import Front, Merged, collect
from serve.middleware import Call
from serve.openai.logprobs import Namer, completion_logprobs, completion_tops, prompt_logprobs
from serve.openai.params import check_length, completion_params, prompts_of, truncate
from serve.openai.protocol import MAX_PROMPTS, CompletionBody, parse
from serve.openai.usage import usage_of, weights_of
from serve.responses import DONE, PING, Answer, EventStream, TextEvent, as_json, event
from serve.streams import Piece, Stream


def prepare(front: Front, call: Call, body: CompletionBody) -> list[Request]:
    """In a worker thread: the tokenizer's time is not the event loop's."""
    params = completion_params(body, front.sampling_defaults)
    requests = []
    for i, prompt in enumerate(prompts_of(body.prompt, MAX_PROMPTS)):
        ids = front.intake_encode(prompt, add_special_tokens=body.add_special_tokens)
        ids = truncate(ids, body.truncate_prompt_tokens, front.intake.max_model_len)
        check_length(len(ids), body.max_tokens, front.intake.max_model_len)
        requests.append(
            front.make_request(
                ids,
                params=params,
                request_id=f"{body.request_id or 'cmpl-' + call.request_id}-{i}",
                priority=body.priority,
                cache_salt=front.salt(call, body.cache_salt),
            )
        )
    return requests


class Completion:
    """One call's answer in the making."""

    def __init__(self, front: Front, call: Call, body: CompletionBody, requests: list[Request]) -> None:
        self.front, self.body, self.requests = front, body, requests
        self.head = {
            "id": body.request_id or f"cmpl-{call.request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": front.check_model(body.model),
        }
        self.namer = Namer(None if body.return_tokens_as_token_ids else front.tokenizer)
        self._scored: list[list[TokenLogprobs]] = [[] for _ in requests]  # a streamed prompt's log-probabilities so far
        self.score_only = body.max_tokens == 0
        self._offsets: dict[int, int] = {}  # by choice: characters of text so far
        options = body.stream_options
        usage = options is not None and options.continuous_usage_stats
        told = body.logprobs is not None or body.prompt_logprobs is not None or body.return_token_ids
        self._text_only = not (told or usage or self.score_only)  # chunks in mid-stream hold nothing but text
        self._events: dict[int, TextEvent] = {}  # by choice

    def choice(self, which: int, piece: Piece, first: bool, *, whole: bool = False) -> dict[str, Any]:
        """A choice of the answer, or of one chunk of it."""
        body, request = self.body, self.requests[which]
        number = which * body.n + piece.index
        text, ids, logprobs = piece.text, piece.token_ids, list[TokenLogprobs | None](piece.logprobs)
        finish = piece.finish_reason
        if self.score_only:
            text, ids, logprobs, finish = "", [], [], finish and "length"
        shown = list(ids)
        offset = self._offsets.get(number, 0)
        if body.echo and first:
            text = self.front.text_of(request.prompt_token_ids) + text
            if body.logprobs is not None:
                shown = [*request.prompt_token_ids, *shown]
                logprobs = [None, *piece.prompt_logprobs, *logprobs]
        found = {"index": number, "text": text, "logprobs": None, "finish_reason": finish}
        found["stop_reason"] = None if self.score_only else piece.stop_reason
        if body.logprobs is not None and (logprobs or whole):
            texts = [self.namer.text(token) for token in shown[: len(logprobs)]]
            found["logprobs"] = completion_logprobs(logprobs, texts, offset)
            found["logprobs"]["top_logprobs"] = completion_tops(logprobs, self.namer) if body.logprobs else []
        self._offsets[number] = offset + len(text)
        if body.prompt_logprobs is not None and first:
            found["prompt_logprobs"] = prompt_logprobs(piece.prompt_logprobs, self.namer)
        if body.return_token_ids:
            found["token_ids"] = ids
            if first:
                found["prompt_token_ids"] = list(request.prompt_token_ids)
        return found

    def _chunk(self, number: int, text: str) -> dict[str, Any]:
        choice = {"index": number, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}
        chunk = {**self.head, "choices": [choice]}
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            chunk["usage"] = None
        return chunk

    def plain(self, which: int, piece: Piece) -> bytes:
        """The event of a piece that is only text, in mid-stream."""
        number = which * self.body.n + piece.index
        found = self._events.get(number)
        if found is None:
            found = self._events[number] = TextEvent(lambda text: self._chunk(number, text))
        return found(piece.text)

    def usage(self, streams: list[Stream]) -> dict[str, Any]:
        return usage_of(streams, tokens=0 if self.score_only else None)

    async def whole(self, streams: list[Stream]) -> Answer:
        choices = []
        for which, stream in enumerate(streams):
            pieces = await collect(stream)
            for piece in pieces:
                piece.prompt_logprobs = pieces[0].prompt_logprobs  # the prompt is one: the first speaks for all
                choices.append(self.choice(which, piece, True, whole=True))
        return as_json({**self.head, **weights_of(streams[0]), "choices": choices, "usage": self.usage(streams)})

    async def events(self, call: Call) -> AsyncGenerator[bytes]:
        options, begun = self.body.stream_options, set[tuple[int, int]]()
        async with self.front.opened(call, self.requests) as streams, Merged(streams) as merged:
            while (news := await merged.next()) is not None:
                which, pieces = news
                if pieces is None:
                    yield PING
                    continue
                if not begun:
                    self.head |= weights_of(streams[which])
                chunks = []
                for piece in pieces:
                    first = (which, piece.index) not in begun
                    self._scored[which] += piece.prompt_logprobs
                    if first and not piece.token_ids and piece.finish_reason is None:
                        continue  # a part of a long prompt; its choices begin when all of it is known
                    piece.prompt_logprobs = self._scored[which] if first else []
                    if self._text_only and not first and piece.finish_reason is None:
                        chunks.append(self.plain(which, piece))
                        continue
                    begun.add((which, piece.index))
                    chunk = {**self.head, "choices": [self.choice(which, piece, first)]}
                    if options is not None and options.include_usage:
                        chunk["usage"] = self.usage(streams) if options.continuous_usage_stats else None
                    chunks.append(event(chunk))
                if chunks:
                    yield b"".join(chunks)
            if options is not None and options.include_usage:
                yield event({**self.head, "choices": [], "usage": self.usage(streams)})
            yield DONE


async def create(front: Front, call: Call, raw: dict[str, Any]) -> Answer | EventStream:
    body = parse(CompletionBody, raw)
    front.check_model(body.model)
    front.check_open(body.n if 1 <= body.n <= MAX_N else 1)  # n itself is judged with the other numbers
    requests = await front.off_loop(prepare, front, call, body)
    completion = Completion(front, call, body, requests)
    if not body.stream:
        async with front.opened(call, requests) as streams:
            return await completion.whole(streams)

    return EventStream(completion.events(call))
