"""POST /v1/embeddings: texts or token ids to vectors, pooled from the served model's last hidden states."""

from __future__ import annotations

import base64
import struct
from typing import Any

from serve.errors import ApiError, unsupported
from serve.front import Front
from serve.middleware import Call
from serve.openai.params import prompts_of
from serve.openai.protocol import EmbeddingBody, parse
from serve.responses import Answer, as_json

MAX_INPUTS = 256


def _prepare(front: Front, body: EmbeddingBody) -> list[list[int]]:
    limit, found = front.intake.max_model_len, []
    for prompt in prompts_of(body.input, MAX_INPUTS):
        ids = list(front.make_request(prompt).prompt_token_ids)
        if not ids or len(ids) >= limit:
            message = f"an input has {len(ids)} tokens: must have 1 to {limit - 1}"
            raise ApiError(400, message, param="input", code="context_length_exceeded")
        found.append(ids)
    return found


def _renamed(error: ApiError) -> ApiError:
    message = error.message.replace("prompt", "input", 1)
    return ApiError(error.status, message, param="input" if error.param == "prompt" else error.param, code=error.code)


async def create(front: Front, call: Call, raw: dict[str, Any]) -> Answer:
    body = parse(EmbeddingBody, raw)
    name = front.check_model(body.model)
    if body.dimensions is not None:
        raise unsupported("dimensions")
    front.check_open(1)
    try:
        inputs = await front.off_loop(_prepare, front, body)
    except ApiError as error:
        raise _renamed(error) from None
    tokens = sum(map(len, inputs))
    front.token_rate.spend(call.tenant, tokens)
    front.admission.enter(len(inputs), tokens)
    data = []
    try:
        for index, ids in enumerate(inputs):
            vector = await front.client.control("embed", timeout_s=600, token_ids=ids, pooling=body.pooling)
            shown: Any = vector
            if body.encoding_format == "base64":
                shown = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
            data.append({"object": "embedding", "index": index, "embedding": shown})
    finally:
        front.admission.started(tokens)
        front.admission.leave(len(inputs))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return as_json({"object": "list", "data": data, "model": name, "usage": usage})
