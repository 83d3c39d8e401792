"""One generated conversation and how it reads as ChatML.

In: messages as Hugging Face writes them (role, content, tool_calls) and tools as JSON schemas. Out: the exact
text that the bundled chat template renders (a test holds the two together). Knows nothing of tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

type Message = dict[str, Any]
type Check = Literal["exact", "json", "tool_calls", "open"]

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A conversation that ends with the assistant's answer, and how that answer is to be judged."""

    kind: str
    messages: list[Message]
    check: Check = "exact"
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def answer(self) -> str:
        """What the assistant says last, as it appears between <|im_start|>assistant and <|im_end|>."""
        return assistant_text(self.messages[-1])


def ask(
    kind: str, question: str, answer: str, *, check: Check = "exact", tools: tuple[dict[str, Any], ...] = ()
) -> Sample:
    """A conversation of one question and one answer."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Sample(kind=kind, messages=messages, check=check, tools=tools)


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def assistant_text(message: Message) -> str:
    parts = [message["content"]] if message.get("content") else []
    for call in message.get("tool_calls", ()):
        function = call["function"]
        body = f'{{"name": "{function["name"]}", "arguments": {dumps(function["arguments"])}}}'
        parts.append(f"<tool_call>\n{body}\n</tool_call>")
    return "\n".join(parts)


def render(messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), *, prompt: bool = False) -> str:
    """The conversation as ChatML; with `prompt`, opened for the assistant's next answer."""
    out: list[str] = []
    rest = list(messages)
    system = rest.pop(0)["content"] if rest and rest[0]["role"] == "system" else ""
    if tools:
        listed = "".join("\n" + dumps(tool) for tool in tools)
        system = f"{system}\n\n" * bool(system) + TOOLS_HEAD + listed + TOOLS_TAIL
    if system:
        out.append(f"{IM_START}system\n{system}{IM_END}\n")
    previous = ""
    for index, message in enumerate(rest):
        role = message["role"]
        if role == "tool":
            out.append("" if previous == "tool" else f"{IM_START}user")
            out.append(f"\n<tool_response>\n{message['content']}\n</tool_response>")
            following = rest[index + 1]["role"] if index + 1 < len(rest) else ""
            out.append("" if following == "tool" else f"{IM_END}\n")
        else:
            content = assistant_text(message) if role == "assistant" else message["content"]
            out.append(f"{IM_START}{role}\n{content}{IM_END}\n")
        previous = role
    if prompt:
        out.append(f"{IM_START}assistant\n")
    return "".join(out)


def pick[T](rng: random.Random, options: Sequence[T]) -> T:
    """rng.choice without its per-call overhead; deterministic for a given rng state."""
    return options[int(rng.random() * len(options))]
