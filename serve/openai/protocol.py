"""The bodies of OpenAI's requests as pydantic models: types here, ranges in jaxllm.core, unknown fields ignored.

In: parsed JSON. Out: models, or pydantic's ValidationError. What OpenAI and vLLM define and this server does not do is
listed in UNSUPPORTED and refused by name. No JAX, no HTTP.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import pydantic
import pydantic_core

from serve.errors import from_validation_error, unsupported

log = logging.getLogger(__name__)

MAX_MESSAGES = 4096
MAX_PROMPTS = 256

# Known elsewhere, not done here; values that ask for nothing are let pass.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "web_search_options": (None,),
    "functions": (None, []),
    "function_call": (None, "none"),
    "chat_template": (None,),
    "documents": (None, []),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1, 1.0),
    "logits_processors": (None, []),
    "prompt_embeds": (None,),
    "mm_processor_kwargs": (None, {}),
    "kv_transfer_params": (None,),
    "lora_path": (None,),
    "lora_adapter": (None,),
    "guided_whitespace_pattern": (None,),
    "guided_json_object": (None, False),
    "spaces_between_special_tokens": (None, True),
    "include_reasoning": (None, True),
    "thinking_token_budget": (None,),
    "vllm_xargs": (None, {}),
    "custom_logit_processor": (None,),
}


class Body(pydantic.BaseModel):
    """A field that may be left out may be null too: OpenAI's schema says so of most, and clients send all they have."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    @pydantic.model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        needed = {name for name, item in cls.model_fields.items() if item.is_required()}
        return {name: value for name, value in given.items() if value is not None or name in needed}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: pydantic_core.CoreSchema, handler: pydantic.GetJsonSchemaHandler
    ) -> dict[str, Any]:
        found = handler.resolve_ref_schema(handler(core_schema))
        for name, item in found.get("properties", {}).items():
            either = item.get("anyOf") or [
                {key: value for key, value in item.items() if key not in ("default", "title")}
            ]
            if name not in found.get("required", ()) and {"type": "null"} not in either:
                kept = {key: item[key] for key in ("default", "title") if key in item}
                found["properties"][name] = {"anyOf": [*either, {"type": "null"}], **kept}
        return found


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingBody(Body):
    """What completions and chat share. None = the model's recommendation, else vLLM's default."""

    model: str | None = None
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    priority: int = 0
    cache_salt: str | None = pydantic.Field(default=None, max_length=256)
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    request_id: str | None = pydantic.Field(default=None, pattern=r"^[A-Za-z0-9._-]{1,96}$")
    stream: bool = False
    stream_options: StreamOptions | None = None
    best_of: int | None = None
    user: str | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class CompletionBody(SamplingBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True


class ChatBody(SamplingBody):
    messages: list[dict[str, Any]] = pydantic.Field(max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class ResponsesBody(Body):
    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    stream: bool = False
    store: bool = True
    background: bool = False
    previous_response_id: str | None = None
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None


class EmbeddingBody(Body):
    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    pooling: Literal["mean", "last"] = "mean"
    user: str | None = None


class TokenizeBody(Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = pydantic.Field(default=None, max_length=MAX_MESSAGES)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[int]
    skip_special_tokens: bool = False


class GenerateBody(Body):
    """SGLang's native shape: text or input_ids, and sampling parameters by core's names."""

    text: str | None = None
    input_ids: list[int] | None = None
    sampling_params: dict[str, Any] = {}
    stream: bool = False
    return_logprob: bool = False
    top_logprobs_num: int = 0
    rid: str | None = pydantic.Field(default=None, pattern=r"^[A-Za-z0-9._-]{1,96}$")
    priority: int = 0
    cache_salt: str | None = pydantic.Field(default=None, max_length=256)


class AbortBody(Body):
    request_id: str | None = None
    rid: str | None = None


class SleepBody(Body):
    """Level 1 keeps the weights in host memory, level 2 drops them. `mode`: what becomes of requests in flight."""

    level: Literal[1, 2] = 1
    mode: Literal["wait", "abort"] = "wait"


class UpdateWeightsBody(Body):
    """Other weights of the same shapes, from a directory of the server's machine."""

    path: str = pydantic.Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")
    version: str | None = pydantic.Field(default=None, pattern=r"^[A-Za-z0-9._-]{1,96}$")
    mode: Literal["wait", "abort"] = "wait"


class AnthropicPrompt(Body):
    """What of a message its prompt is made of; all of what its tokens are counted by."""

    model: str | None = None
    messages: list[dict[str, Any]] = pydantic.Field(max_length=MAX_MESSAGES)
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


class AnthropicBody(AnthropicPrompt):
    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool = False
    metadata: dict[str, Any] | None = None


CHAT_UNSUPPORTED: dict[str, tuple[Any, ...]] = {"echo": (None, False), "add_special_tokens": (None, False)}


def parse[T: Body](kind: type[T], body: Any) -> T:
    """The model, or ApiError naming the field; unknown fields cost one debug line."""
    for name, harmless in (UNSUPPORTED | CHAT_UNSUPPORTED if kind is ChatBody else UNSUPPORTED).items():
        if name in body and body[name] not in harmless:
            raise unsupported(name)
    unknown = body.keys() - kind.model_fields.keys() - UNSUPPORTED.keys()
    if unknown:
        log.debug("ignored unknown fields: %s", ", ".join(sorted(map(repr, unknown)))[:200])
    try:
        return kind.model_validate(body)
    except pydantic.ValidationError as error:
        raise from_validation_error(error) from None
