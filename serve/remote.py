"""A model behind a server of OpenAI's API, as `jaxllm chat --url` talks with it: what serve.chat needs of an LLM.

In: messages and sampling parameters. Out: deltas of one RequestOutput. Knows nothing of terminals.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxllm.core import CompletionOutput, FinishReason, RequestError, RequestOutput, RequestTimings, SamplingParams
from serve.http_client import Target, events, message_of, open_stream, whole

NAMES = ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens")


@dataclass
class RemoteModel:
    """`given`: the sampling parameters that were asked for; the others are the server's own."""

    target: Target
    model: str
    given: frozenset[str] = frozenset()
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def close(self) -> None:
        self._loop.close()

    def body(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams) -> dict[str, Any]:
        asked = {name: getattr(params, name) for name in NAMES if name in self.given}
        return {"model": self.model, "messages": list(messages), "stream": True, **asked}

    def stream_chat(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams) -> Generator[RequestOutput]:
        """Raises RequestError when the server refuses the conversation, ClientError when it cannot be reached."""
        wait = self._loop.run_until_complete
        timings = RequestTimings(time.monotonic())
        status, parts = wait(open_stream(self.target, "/v1/chat/completions", self.body(messages, params)))
        if status != 200:
            why = message_of(_parsed(wait(whole(parts))))
            raise RequestError("messages", "this conversation", f"{status}: {why}")
        found = events(parts)
        try:
            while (data := wait(anext(found, None))) is not None and data != "[DONE]":
                yield _delta(json.loads(data), timings)
        finally:
            wait(found.aclose())


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode("utf-8", "replace")


def _delta(event: dict[str, Any], timings: RequestTimings) -> RequestOutput:
    choices = event.get("choices") or [{}]
    text = (choices[0].get("delta") or {}).get("content") or ""
    if text:
        timings.first_token_s = timings.first_token_s or time.monotonic()
        timings.finished_s = time.monotonic()
    reason = choices[0].get("finish_reason")
    known = FinishReason(reason) if reason in set(FinishReason) else FinishReason.STOP if reason else None
    completion = CompletionOutput(index=0, text=text, token_ids=[0] if text else [], finish_reason=known)
    error = message_of(event) if "error" in event else None
    return RequestOutput(
        str(event.get("id", "")), None, [], [completion], known is not None, timings=timings, error=error
    )


def open_remote(url: str, model: str | None, api_key: str | None, given: Sequence[str]) -> RemoteModel:
    """Asks for the server's first model when none is named."""
    from serve.loadgen import first_model

    target = Target(url.rstrip("/").removesuffix("/v1"), api_key)
    name = model or asyncio.run(first_model(target))
    return RemoteModel(target, name, frozenset(given))
