"""A worker's answer on its way to a client, and the rule of retries: only while the client was told nothing.

A plain answer is held until it is whole; of a stream, whole events pass at once. An answer that breaks before its first
event leaves no trace, so it may be asked again elsewhere; one that breaks later ends with an error event and without
[DONE]. Signs of life (": ping") are no events. Knows nothing of workers or prompts.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import orjson

from serve.errors import ApiError
from serve.gateway.listener import Client, Incoming
from serve.gateway.upstream import Headers

ELSEWHERE_STATUS = frozenset({429, 502, 503, 504})  # another worker may say yes
ELSEWHERE_CODES = frozenset({"engine_died", "shutting_down", "engine_unavailable", "queue_timeout"})
JSON = [(b"content-type", b"application/json")]
NO_BODY_STATUS = frozenset({204, 304})


@dataclass
class Held:
    """An answer that was not passed on."""

    status: int
    headers: Headers
    body: bytes

    @property
    def lost(self) -> bool:
        return self.status == 0


class Answer:
    """The sink of one attempt. `done` ends with None when the client has an answer, or with what was held back."""

    def __init__(self, request: Incoming, buffer_bytes: int) -> None:
        self._request, self._client, self._limit = request, request.client, buffer_bytes
        self.done: asyncio.Future[Held | None] = asyncio.get_running_loop().create_future()
        self.told = False  # an event, or a part of a plain answer, is with the client
        self.broke = ""  # why it ended with an error event
        self.first_byte = False
        self._status, self._headers = 0, Headers()
        self._stream = False
        self._parts: list[bytes] = []
        self._size = 0
        self._rest = b""  # of a stream: the beginning of an event

    # ---- from the worker ----

    def head(self, status: int, headers: Headers) -> None:
        self.first_byte = True
        self._status, self._headers = status, headers
        kind = next((value for name, value in headers if name == b"content-type"), b"")
        self._stream = status == 200 and kind.startswith(b"text/event-stream")

    def body(self, data: bytes) -> None:
        if self.done.done():
            return
        if self._stream:
            self._events(data)
        elif self.told:
            self._client.piece(data)
        else:
            self._parts.append(data)
            self._size += len(data)
            if self._size > self._limit and self._status not in ELSEWHERE_STATUS:
                self._begin()
                self.told = True
                self._client.piece(b"".join(self._parts))

    def end(self) -> None:
        if self.done.done():
            return
        if self._stream or self.told:
            if self._rest:
                self._pass(self._rest)
            if not self._client.began:
                self._begin()
            self._client.end()
            self.done.set_result(None)
            return
        body = b"".join(self._parts)
        if self._status in ELSEWHERE_STATUS:
            self.done.set_result(Held(self._status, self._headers, body))
        else:
            self.give(Held(self._status, self._headers, body))

    def lost(self, why: str) -> None:
        if self.done.done():
            return
        if not self.told:
            self.done.set_result(Held(0, [], why.encode()))
            return
        self.broke = why
        message = "the worker of this stream was lost; what came before is all there is"
        self.fail(ApiError(503, message, code="worker_lost", retry_after_s=5))

    # ---- to the client ----

    def give(self, held: Held) -> None:
        """A plain answer, whole."""
        if self._client.began:  # signs of life went out: too late for a status
            self.fail(as_error(held))
            return
        without = self._request.method == "HEAD" or held.status in NO_BODY_STATUS
        self._client.whole(held.status, held.headers, held.body, without_body=without)
        self._done()

    def fail(self, error: ApiError) -> None:
        """Says so in whatever way is left."""
        if not self._client.began:
            self._client.whole(error.status, error.headers(), error.encode())
        elif self._stream or not self.told:
            self._client.piece(error_event(self._request.path, error))
            self._client.end()
        else:
            self._client.cut()
        self._done()

    def _done(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def _begin(self) -> None:
        self._client.begin(self._status, self._headers, http10=self._request.http10)

    def _events(self, data: bytes) -> None:
        data = self._rest + data
        cut = max(data.rfind(b"\n\n") + 2, data.rfind(b"\r\n\r\n") + 4)
        if cut <= 3 and not data.endswith((b"\n\n", b"\r\n\r\n")):
            self._rest = data
            return
        self._rest = data[cut:]
        self._pass(data[:cut])

    def _pass(self, events: bytes) -> None:
        if not self.told and not is_comment(events):
            error = error_of(events)
            if error is not None and error.get("code") in ELSEWHERE_CODES:
                self.done.set_result(Held(503, JSON, orjson.dumps({"error": error})))
                return
            self.told = True
        if not self._client.began:
            self._begin()
        self._client.piece(events)


def is_comment(events: bytes) -> bool:
    """Whether these are signs of life only."""
    return events.startswith(b":") and all(not line or line[:1] in b":\r" for line in events.split(b"\n"))


def error_of(events: bytes) -> dict[str, object] | None:
    """The error that the first of these events is, or None."""
    for line in events.split(b"\n"):
        if line.startswith(b"data:"):
            if b'"error"' not in line:
                return None
            try:
                value = orjson.loads(line[5:])
            except orjson.JSONDecodeError:
                return None
            error = value.get("error") if isinstance(value, dict) else None
            return error if isinstance(error, dict) else None
    return None


def as_error(held: Held) -> ApiError:
    """What a refusal says, for a client that already has a stream's head."""
    try:
        error = orjson.loads(held.body)["error"]
        return ApiError(held.status, str(error["message"]), param=error.get("param"), code=error.get("code"))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return ApiError(held.status or 503, "no worker could answer", code="worker_lost")


def error_event(path: str, error: ApiError) -> bytes:
    """In the shape of the protocol the path belongs to."""
    body = error.body()
    if path == "/v1/messages":
        kind = "overloaded_error" if error.status == 503 else "api_error"
        body = {"type": "error", "error": {**body["error"], "type": kind}}
    elif path == "/v1/responses":
        body = {"type": "error", **body["error"], "sequence_number": 0}
    head = b"event: error\n" if path in ("/v1/messages", "/v1/responses") else b""
    return head + b"data: " + orjson.dumps(body) + b"\n\n"


def tell(client: Client, error: ApiError) -> None:
    """A request that no worker was asked."""
    client.whole(error.status, error.headers(), error.encode())
