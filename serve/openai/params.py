"""From a request's body to SamplingParams and token ids. Ranges are core's; names in errors are the client's.

In: protocol models, an Intake, a tokenizer. Out: core Requests, or ApiError. Runs in a worker thread. No JAX, no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxllm.core import MAX_LOGPROBS, GrammarSpec, RequestError, SamplingParams
from serve.errors import ApiError, from_request_error, invalid
from serve.openai.protocol import ChatBody, CompletionBody, SamplingBody
from serve.openai.structured import grammar_of

SIMPLE = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "allowed_token_ids",
    "bad_words",
)
ALWAYS = ("n", "ignore_eos", "min_tokens", "skip_special_tokens", "include_stop_str_in_output", "detokenize")
STRUCTURED = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")


def make_params(values: dict[str, Any], names: dict[str, str] | None = None) -> SamplingParams:
    """Core's checks, with their field names translated back to the client's."""
    try:
        return SamplingParams(**values)
    except RequestError as error:
        raise from_request_error(error, names) from None


def _logit_bias(body: SamplingBody) -> dict[int, float] | None:
    if body.logit_bias is None:
        return None
    found: dict[int, float] = {}
    for text, bias in body.logit_bias.items():
        if not text.isascii() or not text.isdigit() or len(text) > 12:
            raise invalid("logit_bias", f"logit_bias: {text[:40]!r} is not a token id")
        found[int(text)] = bias
    return found


def _shared(body: SamplingBody, defaults: dict[str, float]) -> dict[str, Any]:
    if body.best_of is not None and body.best_of != body.n:
        why = "must be at least n" if body.best_of < body.n else "beyond n is not supported by this server"
        raise ApiError(400, f"best_of = {body.best_of}: {why}", param="best_of", code="unsupported_parameter")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "stream_options is only allowed when stream is true")
    values: dict[str, Any] = {name: getattr(body, name) for name in ALWAYS}
    values |= defaults
    values |= {name: getattr(body, name) for name in SIMPLE if getattr(body, name) is not None}
    values["logit_bias"] = _logit_bias(body)
    values["grammar"] = grammar(body)
    values["prompt_logprobs"] = body.prompt_logprobs
    return values


def grammar(body: SamplingBody) -> GrammarSpec | None:
    """What the answer must match, checked and not yet compiled."""
    asked = {name: value for name in STRUCTURED if (value := getattr(body, name)) is not None}
    try:
        return grammar_of(asked) if asked else None
    except RequestError as error:
        raise from_request_error(error, code="invalid_schema") from None


def completion_params(body: CompletionBody, defaults: dict[str, float]) -> SamplingParams:
    """max_tokens 0 scores the prompt: one token is generated and not shown."""
    values = _shared(body, defaults)
    values["max_tokens"] = 16 if body.max_tokens is None else body.max_tokens or 1
    values["logprobs"] = body.logprobs
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        values["prompt_logprobs"] = body.logprobs
    return make_params(values)


def chat_params(body: ChatBody, defaults: dict[str, float]) -> SamplingParams:
    values = _shared(body, defaults)
    limit, name = body.max_completion_tokens, "max_completion_tokens"
    if limit is None:
        limit, name = body.max_tokens, "max_tokens"
    values["max_tokens"] = limit
    if body.top_logprobs is not None:
        if not body.logprobs:
            raise invalid("top_logprobs", "top_logprobs needs logprobs to be true")
        if not 0 <= body.top_logprobs <= MAX_LOGPROBS:
            message = f"top_logprobs = {body.top_logprobs}: must be an integer in [0, {MAX_LOGPROBS}]"
            raise ApiError(400, message, param="top_logprobs", code="out_of_range")
    values["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
    return make_params(values, {"max_tokens": name})


def truncate(ids: Sequence[int], limit: int | None, max_model_len: int) -> Sequence[int]:
    """The last `limit` tokens; -1 = as many as fit."""
    if limit is None:
        return ids
    if limit == -1:
        limit = max_model_len - 1
    if not 1 <= limit < max_model_len:
        allowed = f"must be -1 or an integer in [1, {max_model_len - 1}]"
        message = f"truncate_prompt_tokens = {limit}: {allowed}"
        raise ApiError(400, message, param="truncate_prompt_tokens", code="out_of_range")
    return ids[-limit:]


def check_length(num_prompt: int, max_tokens: int | None, max_model_len: int, param: str = "max_tokens") -> None:
    """Before queueing: the prompt and what was asked for must fit the context."""
    if num_prompt + (max_tokens or 1) > max_model_len:
        message = (
            f"the context is {max_model_len} tokens: the prompt has {num_prompt} and "
            f"{max_tokens or 1} were asked for ({num_prompt + (max_tokens or 1)} in all)"
        )
        param = param if num_prompt < max_model_len else "messages" if param == "max_completion_tokens" else "prompt"
        raise ApiError(400, message, param=param, code="context_length_exceeded")


def prompts_of(prompt: str | list[str] | list[int] | list[list[int]], limit: int) -> list[str | list[int]]:
    """A prompt is a text or a list of ids; a request holds one or several."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt", "prompt must not be an empty list")
    if isinstance(prompt[0], int):
        return [[one for one in prompt if isinstance(one, int)]]
    if len(prompt) > limit:
        raise invalid("prompt", f"at most {limit} prompts in one request")
    return [one for one in prompt if isinstance(one, str | list)]
