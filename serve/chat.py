"""The terminal's side of a conversation: lines in, streamed answers out; ctrl-c stops the answer, not the chat.

Knows nothing of options or of how the model was loaded; `serve.cli` does.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol, TextIO

from jaxllm.core import FinishReason, JaxLLMError, RequestOutput, RequestTimings, SamplingParams

HELP = "/reset forgets the conversation, /quit ends it, ctrl-c stops an answer."


@dataclass
class Heard:
    """What came of one stream."""

    text: str = ""
    num_tokens: int = 0
    timings: RequestTimings | None = None
    error: str | None = None
    finish_reason: FinishReason | None = None
    interrupted: bool = False


@contextmanager
def _interruptions() -> Iterator[list[int]]:
    """Ctrl-c is noted in the list instead of breaking into a step, which would leave the device state half written.
    A second one breaks in all the same."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def listen(deltas: Iterable[RequestOutput], out: TextIO) -> Heard:
    """Write a stream's text as it comes; ctrl-c ends it early."""
    heard = Heard()
    with _interruptions() as noted:
        for delta in deltas:
            for completion in delta.outputs:
                out.write(completion.text)
                heard.text += completion.text
                heard.num_tokens += len(completion.token_ids)
                heard.finish_reason = completion.finish_reason
            out.flush()
            heard.timings, heard.error = delta.timings, delta.error or heard.error
            if noted:
                heard.interrupted = True
                break
    return heard


class Talker(Protocol):
    """What a conversation needs: an LLM has it, and a model behind a URL."""

    def stream_chat(self, messages: list[dict[str, Any]], params: SamplingParams, /) -> Generator[RequestOutput]: ...


@dataclass
class Conversation:
    """Messages so far, and the model that answers."""

    llm: Talker
    params: SamplingParams
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str, out: TextIO) -> Heard:
        """One turn. A turn that fails leaves the conversation as it was; an interrupted one keeps what was said."""
        asked = [*self.messages, {"role": "user", "content": text}]
        deltas = self.llm.stream_chat(asked, self.params)
        try:
            heard = listen(deltas, out)
        finally:
            deltas.close()
        if heard.error is None:
            self.messages = [*asked, {"role": "assistant", "content": heard.text}]
        return heard


def repl(conversation: Conversation, lines: Iterable[str], out: TextIO, err: TextIO, *, stats: bool) -> bool:
    """Answer line after line until they end or /quit. True when every turn was answered."""
    from jaxllm.engine.output import speed

    good = True
    for line in lines:
        text = line.strip()
        if text == "/quit":
            break
        if text == "/reset":
            conversation.reset()
        elif text == "/help":
            err.write(HELP + "\n")
        elif text:
            try:
                heard = conversation.answer(text, out)
            except JaxLLMError as error:
                err.write(f"error: {error}\n")
                good = False
                continue
            out.write("\n")
            out.flush()
            if heard.error is not None:
                err.write(f"error: {heard.error}\n")
                good = False
            elif stats:
                err.write(f"[{'stopped; ' if heard.interrupted else ''}{speed(heard.timings, heard.num_tokens)}]\n")
    return good
