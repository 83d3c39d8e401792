"""What a 200 holds, as JSON schemas for /openapi.json: by route, whole and streamed.

In: nothing. Out: schemas. Keys that are always there are required; others may come. Knows nothing of how answers are
made.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}


def just(value: str) -> Schema:
    return {"type": "string", "const": value}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def many(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def record(optional: dict[str, Schema] | None = None, **required: Schema) -> Schema:
    return {"type": "object", "required": sorted(required), "properties": {**required, **(optional or {})}}


IDS = many(COUNT)
FINISH: Schema = {"type": "string", "enum": ["stop", "length", "tool_calls", "abort"]}
STOPPED_BY: Schema = {"type": ["string", "integer", "null"]}
USAGE = record(
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    total_tokens=COUNT,
    prompt_tokens_details=record(cached_tokens=COUNT),
)
WEIGHTS = {"system_fingerprint": maybe(TEXT), "weights_version": maybe(TEXT)}
CALL = record(id=TEXT, type=just("function"), function=record(name=TEXT, arguments=TEXT))
MESSAGE = record(
    {"refusal": maybe(TEXT), "reasoning_content": TEXT, "tool_calls": many(CALL)},
    role=just("assistant"),
    content=maybe(TEXT),
)
ENTRY = record({"top_logprobs": many(OBJECT)}, token=TEXT, logprob=NUMBER, bytes=maybe(IDS))
CHAT_LOGPROBS = maybe(record(content=many(ENTRY), refusal=maybe(TEXT)))
CHAT_CHOICE = record(
    {"stop_reason": STOPPED_BY, "token_ids": IDS},
    index=COUNT,
    message=MESSAGE,
    logprobs=CHAT_LOGPROBS,
    finish_reason=FINISH,
)
CHAT = record(
    {**WEIGHTS, "prompt_logprobs": many(maybe(OBJECT)), "prompt_token_ids": IDS},
    id=TEXT,
    object=just("chat.completion"),
    created=COUNT,
    model=TEXT,
    choices=many(CHAT_CHOICE),
    usage=USAGE,
)
TEXT_LOGPROBS = record(
    tokens=many(TEXT),
    token_logprobs=many(maybe(NUMBER)),
    text_offset=IDS,
    top_logprobs=many(maybe({"type": "object", "additionalProperties": NUMBER})),
)
TEXT_CHOICE = record(
    {"stop_reason": STOPPED_BY, "token_ids": IDS, "prompt_token_ids": IDS, "prompt_logprobs": many(maybe(OBJECT))},
    index=COUNT,
    text=TEXT,
    logprobs=maybe(TEXT_LOGPROBS),
    finish_reason=FINISH,
)
COMPLETION = record(
    WEIGHTS,
    id=TEXT,
    object=just("text_completion"),
    created=COUNT,
    model=TEXT,
    choices=many(TEXT_CHOICE),
    usage=USAGE,
)
CARD = record(
    {"root": TEXT, "parent": maybe(TEXT), "max_model_len": COUNT},
    id=TEXT,
    object=just("model"),
    created=COUNT,
    owned_by=TEXT,
)
RESPONSE = record(
    {"error": maybe(OBJECT), "incomplete_details": maybe(OBJECT), "usage": maybe(OBJECT), "metadata": OBJECT},
    id=TEXT,
    object=just("response"),
    created_at=COUNT,
    status={"type": "string", "enum": ["in_progress", "completed", "incomplete", "cancelled", "failed"]},
    model=TEXT,
    output=many(OBJECT),
)
VECTOR: Schema = {"anyOf": [many(NUMBER), TEXT]}
EMBEDDINGS = record(
    object=just("list"),
    model=TEXT,
    data=many(record(object=just("embedding"), index=COUNT, embedding=VECTOR)),
    usage=record(prompt_tokens=COUNT, total_tokens=COUNT),
)
ANTHROPIC_BLOCKS = [
    record(type=just("text"), text=TEXT),
    record(type=just("thinking"), thinking=TEXT, signature=TEXT),
    record(type=just("tool_use"), id=TEXT, name=TEXT, input=OBJECT),
]
ANTHROPIC = record(
    {"stop_sequence": maybe(TEXT)},
    id=TEXT,
    type=just("message"),
    role=just("assistant"),
    model=TEXT,
    content=many({"anyOf": ANTHROPIC_BLOCKS}),
    stop_reason=maybe(TEXT),
    usage=record(input_tokens=COUNT, output_tokens=COUNT),
)
GENERATED = record(index=COUNT, text=TEXT, output_ids=IDS, meta_info=OBJECT)

ANSWERS: dict[tuple[str, str], Schema] = {
    ("POST", "/v1/chat/completions"): CHAT,
    ("POST", "/v1/completions"): COMPLETION,
    ("GET", "/v1/models"): record(object=just("list"), data=many(CARD)),
    ("GET", "/v1/models/{model}"): CARD,
    ("POST", "/v1/responses"): RESPONSE,
    ("GET", "/v1/responses/{response_id}"): RESPONSE,
    ("DELETE", "/v1/responses/{response_id}"): record(id=TEXT, object=just("response"), deleted=FLAG),
    ("POST", "/v1/responses/{response_id}/cancel"): RESPONSE,
    ("POST", "/v1/embeddings"): EMBEDDINGS,
    ("POST", "/v1/messages"): ANTHROPIC,
    ("POST", "/v1/messages/count_tokens"): record(input_tokens=COUNT),
    ("POST", "/tokenize"): record({"token_strs": many(TEXT)}, count=COUNT, max_model_len=COUNT, tokens=IDS),
    ("POST", "/detokenize"): record(prompt=TEXT),
    ("POST", "/generate"): {"anyOf": [GENERATED, many(GENERATED)]},
    ("POST", "/abort"): OBJECT,
    ("GET", "/health"): record(status=TEXT),
    ("GET", "/ready"): record(status=TEXT),
    ("GET", "/version"): record(version=TEXT),
    ("GET", "/server_info"): record(version=TEXT, models=many(TEXT), engine=OBJECT, limits=OBJECT, in_flight=OBJECT),
    ("POST", "/pause"): record(paused=FLAG),
    ("POST", "/resume"): record(paused=FLAG),
    ("POST", "/reset_prefix_cache"): record(evicted_pages=COUNT),
    ("POST", "/rebalance_experts"): record(imbalance=NUMBER, expected=NUMBER, layers=COUNT),
    ("POST", "/sleep"): record(asleep=FLAG, level=COUNT),
    ("POST", "/wake_up"): record(asleep=FLAG, weights_version=TEXT),
    ("POST", "/update_weights"): record(weights_version=TEXT),
    ("POST", "/start_profile"): record(directory=TEXT),
    ("POST", "/stop_profile"): record(directory=TEXT),
}
PLAIN = frozenset({("GET", "/metrics")})
STREAMED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/generate"})


def content_of(method: str, path: str) -> dict[str, Any]:
    """OpenAPI's content of a 200."""
    if (method, path) in PLAIN:
        return {"text/plain": {"schema": TEXT}}
    content: dict[str, Any] = {"application/json": {"schema": ANSWERS[method, path]}}
    if path in STREAMED and method == "POST":
        content["text/event-stream"] = {}
    return content
