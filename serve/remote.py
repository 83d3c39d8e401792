"""A model behind a server of OpenAI's API, as `jaxllm chat --url` talks with it: what serve.chat needs of an LLM.

In: messages and sampling parameters. Out: deltas of one RequestOutput, without completions while the server is silent.
Knows nothing of terminals.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxllm.core import CompletionOutput, FinishReason, RequestOutput, RequestTimings, SamplingParams
from serve.http_client import ClientError, Target, events, message_of, open_stream, parsed, whole

LOOK_S = 0.1
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

    def _wait[T](self, coroutine: Coroutine[Any, Any, T], quiet: RequestOutput) -> Generator[RequestOutput, None, T]:
        """Its result. Meanwhile, now and then, `quiet`: whoever reads may have been told to stop."""
        loop = self._loop
        task = loop.create_task(coroutine)
        try:
            while not loop.run_until_complete(asyncio.wait({task}, timeout=LOOK_S))[0]:
                yield quiet
            return task.result()
        finally:  # closed while it waits, or interrupted: nothing of it runs on
            left = asyncio.all_tasks(loop)
            for one in left:
                one.cancel()
            if left:
                loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))

    def body(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams) -> dict[str, Any]:
        asked = {name: getattr(params, name) for name in NAMES if name in self.given}
        return {"model": self.model, "messages": list(messages), "stream": True, **asked}

    def stream_chat(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams) -> Generator[RequestOutput]:
        """Raises ClientError when the server refuses the conversation, breaks off or cannot be reached."""
        timings = RequestTimings(time.monotonic())
        asked = self.body(messages, params)
        quiet = RequestOutput("", None, [], [], timings=timings)
        status, parts = yield from self._wait(open_stream(self.target, "/v1/chat/completions", asked), quiet)
        if status != 200:
            said = yield from self._wait(whole(parts), quiet)
            raise ClientError(f"the server said {status}: {message_of(parsed(said))}")
        found, ended = events(parts), False
        try:
            while (data := (yield from self._wait(_next(found), quiet))) is not None and data != "[DONE]":
                delta = _delta(data, timings)
                ended = ended or delta.finished or delta.error is not None
                yield delta
            if data is None and not ended:
                raise ClientError("the server ended the answer before its end")
        finally:
            self._loop.run_until_complete(found.aclose())


async def _next(found: AsyncGenerator[str]) -> str | None:
    return await anext(found, None)


def _delta(data: str, timings: RequestTimings) -> RequestOutput:
    try:
        event = json.loads(data)
        choices = event.get("choices") or [{}]
        text = (choices[0].get("delta") or {}).get("content") or ""
    except (ValueError, AttributeError, LookupError, TypeError):
        raise ClientError(f"no event of OpenAI's API: {data[:80]!r}") from None
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
