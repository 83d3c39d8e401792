"""Answers as ASGI: JSON by orjson, and server-sent events with signs of life and errors in mid-stream.

In: values, or an async iterator of ready-made event bytes. Out: ASGI messages. An error before the first event is a
plain error response; after it, an event and then the end without [DONE]. Knows nothing of what the events say.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from serve.errors import ApiError
from serve.wire import body_writer

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


def event(value: Any, name: str | None = None) -> bytes:
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + orjson.dumps(value) + b"\n\n"


class TextEvent:
    """An event of which only one text changes from time to time: the JSON around it is made once."""

    _PLACE = "\0"

    def __init__(self, make: Callable[[str], Any]) -> None:
        """`make` gives the event's value around a text."""
        before, _, after = event(make(self._PLACE)).rpartition(orjson.dumps(self._PLACE))
        self._before, self._after = before, after

    def __call__(self, text: str) -> bytes:
        return self._before + orjson.dumps(text) + self._after


def error_event(error: ApiError) -> bytes:
    return event(error.body())


class Answer:
    """A whole body at once."""

    def __init__(self, body: bytes, status: int = 200, content_type: str = "application/json") -> None:
        self.body, self.status, self.content_type = body, status, content_type

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", self.content_type.encode()),
            (b"content-length", str(len(self.body)).encode()),
        ]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


def as_json(value: Any, status: int = 200) -> Answer:
    return Answer(orjson.dumps(value), status)


class EventStream:
    """Events as they come. Closing the iterator, whatever ends this, is what releases the streams behind it."""

    def __init__(self, events: AsyncGenerator[bytes], describe: Callable[[ApiError], bytes] = error_event) -> None:
        self.events, self.describe = events, describe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = self.events
        try:
            first = await anext(events, b"")  # an error here is still a status of its own
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
            send = scope["jaxllm.call"].send
            write = body_writer(send)
            await write(first)
            try:
                async for chunk in events:
                    await write(chunk)
            except ApiError as error:
                if error.status != 499:
                    await send({"type": "http.response.body", "body": self.describe(error), "more_body": True})
            except Exception:
                log.exception("a stream failed")
                problem = self.describe(ApiError(500, "internal error", code="internal_error"))
                await send({"type": "http.response.body", "body": problem, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await events.aclose()
