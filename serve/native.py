"""Our own routes beside OpenAI's: tokenize, detokenize, generate (SGLang's shape) and abort."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator
from typing import Any

from jaxllm.core import Request, SamplingParams
from serve.errors import ApiError, invalid
from serve.front import Front, collect
from serve.middleware import Call
from serve.openai.messages import render
from serve.openai.params import check_length, make_params
from serve.openai.protocol import AbortBody, DetokenizeBody, GenerateBody, TokenizeBody, parse
from serve.responses import DONE, PING, Answer, EventStream, as_json, event
from serve.streams import Piece, Stream

PARAMS = frozenset(item.name for item in dataclasses.fields(SamplingParams)) - {"detokenize", "logprobs", "grammar"}
SGLANG_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}


async def tokenize(front: Front, call: Call, raw: dict[str, Any]) -> Answer:
    body = parse(TokenizeBody, raw)
    front.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "give either prompt or messages")

    def work() -> list[int]:
        if front.tokenizer is None:
            raise invalid("prompt", "this model has no tokenizer", "no_tokenizer")
        if body.messages is not None:
            chat = render(front.tokenizer, body.messages, add_generation_prompt=body.add_generation_prompt)
            return chat.token_ids
        try:
            return list(front.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens))
        except ValueError as error:
            raise invalid("prompt", str(error)) from None

    ids = await front.off_loop(work)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": front.intake.max_model_len, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [front.tokenizer.token_bytes(one).decode("utf-8", "replace") for one in ids]
    return as_json(answer)


async def detokenize(front: Front, call: Call, raw: dict[str, Any]) -> Answer:
    body = parse(DetokenizeBody, raw)
    front.check_model(body.model)
    if front.tokenizer is None:
        raise invalid("tokens", "this model has no tokenizer", "no_tokenizer")
    for token in body.tokens:
        if not 0 <= token < front.intake.vocab_size:
            message = f"tokens = {token}: must be integers in [0, {front.intake.vocab_size - 1}]"
            raise ApiError(400, message, param="tokens", code="out_of_range")
    text = await front.off_loop(front.tokenizer.decode, body.tokens, body.skip_special_tokens)
    return as_json({"prompt": text})


def _prepare(front: Front, call: Call, body: GenerateBody) -> Request:
    if (body.text is None) == (body.input_ids is None):
        raise invalid("text", "give either text or input_ids")
    given = {SGLANG_NAMES.get(name, name): value for name, value in body.sampling_params.items()}
    unknown = sorted(given.keys() - PARAMS)
    if unknown:
        raise invalid("sampling_params", f"unknown sampling parameters: {', '.join(unknown)[:200]}")
    if isinstance(given.get("logit_bias"), dict):
        try:
            given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
        except ValueError:
            raise invalid("logit_bias", "logit_bias: every key must be a token id") from None
    given.setdefault("max_tokens", 128)
    if body.return_logprob:
        given["logprobs"] = body.top_logprobs_num
    try:
        params = make_params({**front.sampling_defaults, **given})
    except TypeError as error:
        raise invalid("sampling_params", str(error)) from None
    ids = front.intake_encode(body.text if body.text is not None else body.input_ids or [])
    check_length(len(ids), given["max_tokens"], front.intake.max_model_len, "max_new_tokens")
    request_id = body.rid or f"gen-{call.request_id}"
    salt = front.salt(call, body.cache_salt)
    return front.make_request(ids, params=params, request_id=request_id, priority=body.priority, cache_salt=salt)


def _result(stream: Stream, piece: Piece) -> dict[str, Any]:
    finish = None if piece.finish_reason is None else {"type": piece.finish_reason, "matched": piece.stop_reason}
    meta: dict[str, Any] = {
        "id": stream.id,
        "finish_reason": finish,
        "prompt_tokens": len(stream.request.prompt_token_ids),
        "completion_tokens": len(piece.token_ids),
        "cached_tokens": stream.num_cached,
        "weight_version": stream.weights_version or None,
    }
    if piece.logprobs:
        meta["output_token_logprobs"] = [[one.logprob, one.token_id, None] for one in piece.logprobs]
        meta["output_top_logprobs"] = [[[value, token, None] for token, value in one.top] for one in piece.logprobs]
    return {"index": piece.index, "text": piece.text, "output_ids": piece.token_ids, "meta_info": meta}


async def generate(front: Front, call: Call, raw: dict[str, Any]) -> Answer | EventStream:
    body = parse(GenerateBody, raw)
    front.check_open(1)
    request = await front.off_loop(_prepare, front, call, body)
    if not body.stream:
        async with front.opened(call, [request]) as streams:
            results = [_result(streams[0], piece) for piece in await collect(streams[0])]
            return as_json(results[0] if len(results) == 1 else results)

    async def events() -> AsyncGenerator[bytes]:
        async with front.opened(call, [request]) as streams, contextlib.aclosing(_stream(streams[0])) as inner:
            async for chunk in inner:
                yield chunk

    return EventStream(events())


async def _stream(stream: Stream) -> AsyncGenerator[bytes]:
    """As SGLang does, every event holds the whole text so far."""
    whole: dict[int, Piece] = {}
    while (pieces := await stream.next()) != []:
        if pieces is None:
            yield PING
            continue
        for piece in pieces:
            so_far = whole.setdefault(piece.index, Piece(piece.index))
            so_far.join(piece)
            yield event(_result(stream, so_far))
    yield DONE


async def abort(front: Front, call: Call, raw: dict[str, Any]) -> Answer:
    """A tenant may end its own requests; others' look as if they did not exist."""
    body = parse(AbortBody, raw)
    wanted = body.request_id or body.rid
    if not wanted:
        raise ApiError(400, "request_id is required", param="request_id", code="missing_required_parameter")
    ids = [
        stream.id
        for stream in list(front.client.streams.values())
        if stream.tenant == call.tenant and (stream.id == wanted or stream.id.rpartition("-")[0] == wanted)
    ]
    return as_json({"aborted": [one for one in ids if front.client.abort(one)]})
