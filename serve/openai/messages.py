"""A conversation to a prompt: messages checked, template variables allow-listed, rendered and encoded in one place.

In: messages as OpenAI sends them. Out: token ids, or ApiError. Runs in a worker thread. No JAX, no HTTP.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from jaxllm.tokenizer import ChatPrompt
from serve.errors import invalid

MAX_TEXT = 100  # characters of a quoted value


def check_messages(messages: Sequence[dict[str, Any]]) -> None:
    """What the template would only stumble over."""
    if not messages:
        raise invalid("messages", "messages must hold at least one message")
    for i, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") not in ("text", None):
                shown = str(part.get("type"))[:MAX_TEXT]
                raise invalid("messages", f"messages[{i}].content of type {shown!r}: this model takes text only")
        if message.get("role") == "tool" and not isinstance(message.get("tool_call_id"), str):
            raise invalid("messages", f"messages[{i}].tool_call_id must name the call this answers")
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if not isinstance(call, dict) or not isinstance(call.get("id"), str):
                raise invalid("messages", f"messages[{i}].tool_calls: every call needs an id")


def check_variables(variables: dict[str, Any] | None, allowed: Collection[str]) -> dict[str, Any]:
    for name in variables or {}:
        if name not in allowed:
            message = f"chat_template_kwargs may hold {', '.join(sorted(allowed))}; not {name[:MAX_TEXT]!r}"
            raise invalid("chat_template_kwargs", message)
    return dict(variables or {})


def render(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final: bool = False,
    variables: dict[str, Any] | None = None,
) -> ChatPrompt:
    """The prompt. Special tokens typed into a message stay text."""
    check_messages(messages)
    if tokenizer is None or not tokenizer.templates:
        raise invalid("messages", "this model has no chat template; use /v1/completions", "no_chat_template")
    try:
        if continue_final:
            return _continued(tokenizer, messages, tools, variables)
        return tokenizer.encode_chat(messages, tools, add_generation_prompt, None, variables)
    except ValueError as error:  # ChatError and TokenizerError, both of the client's making
        raise invalid("messages", str(error)) from None


def _continued(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    variables: dict[str, Any] | None,
) -> ChatPrompt:
    """The prompt ends inside the last message, so that the model goes on writing it."""
    last = messages[-1].get("content")
    if not isinstance(last, str) or not last.strip():
        raise invalid("continue_final_message", "the last message must have text to continue")
    chat = tokenizer.encode_chat(messages, tools, False, None, variables)
    end = chat.text.rfind(last.rstrip())
    if end < 0:
        raise invalid("continue_final_message", "this model's chat template rewrites the last message")
    text = chat.text[: end + len(last.rstrip())]
    ids = list(chat.token_ids)
    for count in range(len(ids), 0, -1):  # cut where the text ends, so that what was plain text stays plain text
        before = tokenizer.decode(ids[:count], skip_special_tokens=False)
        if len(before) <= len(text):
            rest = text[len(before) :]
            return ChatPrompt(text, ids[:count] + (tokenizer.encode(rest, add_special_tokens=False) if rest else []))
    return chat
