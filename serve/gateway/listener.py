"""Connections of clients: bytes in, whole Incoming requests out; answers back, framed anew.

Limits are judged here, before anything else runs: header size, count and time, body size and time, silence, ambiguous
lengths. HTTP/1.1 is read by llhttp (httptools). Knows nothing of workers or prompts.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httptools

from serve.errors import ApiError
from serve.gateway.settings import GatewaySettings
from serve.gateway.upstream import Headers

PIPELINED = 16
_BARE_LF = re.compile(rb"(?<!\r)\n")
_FRAMING = frozenset((b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"upgrade", b"trailer"))
STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


@dataclass(slots=True)
class Incoming:
    """One request, whole."""

    method: str
    target: bytes
    headers: Headers
    body: bytes
    client: Client
    keep_alive: bool
    http10: bool

    @property
    def path(self) -> str:
        return self.target.partition(b"?")[0].decode("ascii", "replace")

    def header(self, name: bytes) -> bytes:
        return next((value for key, value in self.headers if key == name), b"")


Handle = Callable[[Incoming], Awaitable[None]]


class Listener:
    """What all connections share: the handler, the limits, the sweep of their clocks."""

    def __init__(self, settings: GatewaySettings, handle: Handle) -> None:
        self.settings, self.handle = settings, handle
        self.clients: set[Client] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.closing = False

    def make(self) -> Client:
        return Client(self)

    async def sweep(self) -> None:
        """For ever: closes what took too long."""
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            for client in list(self.clients):
                client.check(now)

    def finish(self) -> None:
        """No more requests: idle connections end now, the others with their answer."""
        self.closing = True
        for client in list(self.clients):
            client.close_if_idle()


class Client(asyncio.Protocol):
    def __init__(self, listener: Listener) -> None:
        self._listener, self._settings = listener, listener.settings
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[Incoming] = deque()
        self._task: asyncio.Task[None] | None = None
        self._transport: Any = None
        self._head, self._in_head = b"", True
        self._body: list[bytes] = []
        self._body_size = 0
        self._url, self._headers = b"", Headers()
        self._deadline: tuple[float, ApiError | None] = (float("inf"), None)
        self._refused = self._paused = False
        self._chunked = self._keep_alive = False
        self.on_pause: Callable[[bool], None] | None = None  # told when the client reads too slowly, and when not
        self.began = False  # an answer's head is out

    # ---- asyncio ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._listener.clients.add(self)
        if len(self._listener.clients) > self._settings.max_connections or self._listener.closing:
            self._refuse(ApiError(503, "too many connections", code="too_many_connections", retry_after_s=5))
        self._arm(self._settings.idle_timeout_s, None)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head:
            if not self._head:
                error = ApiError(408, "the header did not come in time", code="header_timeout")
                self._arm(self._settings.header_timeout_s, error)
            self._head += data
            if not self._check_head():
                return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(ApiError(400, "this server does not change protocols", code="invalid_http"))
        except httptools.HttpParserCallbackError:
            pass  # our own refusal, already told
        except httptools.HttpParserError:
            self._refuse(ApiError(400, "this is not HTTP/1.1", code="invalid_http"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.clients.discard(self)
        self._refused = True
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._paused = True
        if self.on_pause is not None:
            self.on_pause(True)

    def resume_writing(self) -> None:
        self._paused = False
        if self.on_pause is not None:
            self.on_pause(False)

    # ---- judgements ----

    def _check_head(self) -> bool:
        head = self._head.partition(b"\r\n\r\n")[0]
        if len(head) > self._settings.max_header_bytes:
            self._refuse(ApiError(431, f"the header has more than {self._settings.max_header_bytes} bytes"))
        elif _BARE_LF.search(head):
            self._refuse(ApiError(400, "header lines end in CR LF", code="invalid_http"))
        return not self._refused

    def _arm(self, seconds: float, error: ApiError | None) -> None:
        self._deadline = time.monotonic() + seconds, error

    def check(self, now_s: float) -> None:
        due, error = self._deadline
        if now_s < due or self._task is not None:
            return
        if error is None:
            self._transport.close()
        else:
            self._refuse(error)

    def close_if_idle(self) -> None:
        if self._task is None:
            self._transport.close()

    def _refuse(self, error: ApiError) -> None:
        if not self._refused:
            self._refused = True
            if not self.began:
                error.close = True
                self.whole(error.status, error.headers(), error.encode())
            self._transport.close()

    # ---- httptools ----

    def on_message_begin(self) -> None:
        self._url, self._headers, self._body, self._body_size = b"", [], [], 0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))
        if len(self._headers) > self._settings.max_headers:
            self._refuse(ApiError(431, f"at most {self._settings.max_headers} headers", code="too_many_headers"))
            raise ValueError("too many headers")

    def on_headers_complete(self) -> None:
        self._in_head, self._head = False, b""
        names = {name for name, _ in self._headers}
        if b"transfer-encoding" in names and b"content-length" in names:
            self._refuse(ApiError(400, "either Content-Length or Transfer-Encoding", code="ambiguous_length"))
            raise ValueError("ambiguous length")
        announced = next((value for name, value in self._headers if name == b"content-length"), b"0")
        if int(announced) > self._settings.max_body_bytes:
            self._too_large()
        if (b"expect", b"100-continue") in self._headers:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        wait = self._settings.body_timeout_s
        self._arm(wait, ApiError(408, f"the body did not come within {wait:g} s", code="body_timeout"))

    def _too_large(self) -> None:
        limit = self._settings.max_body_bytes
        self._refuse(ApiError(413, f"the body has more than {limit} bytes", code="body_too_large"))
        raise ValueError("too large")

    def on_body(self, data: bytes) -> None:
        self._body.append(data)
        self._body_size += len(data)
        if self._body_size > self._settings.max_body_bytes:
            self._too_large()

    def on_message_complete(self) -> None:
        self._in_head = True
        self._deadline = (float("inf"), None)
        parser, body = self._parser, self._body
        request = Incoming(
            method=parser.get_method().decode(),
            target=self._url,
            headers=self._headers,
            body=body[0] if len(body) == 1 else b"".join(body),
            client=self,
            keep_alive=parser.should_keep_alive(),
            http10=parser.get_http_version() == "1.0",
        )
        if self._task is None:
            self._start(request)
        elif len(self._waiting) < PIPELINED:
            self._waiting.append(request)
        else:
            self._transport.close()

    def _start(self, request: Incoming) -> None:
        self._keep_alive, self.began = request.keep_alive, False
        task = self._task = asyncio.get_running_loop().create_task(self._serve(request))
        self._listener.tasks.add(task)
        task.add_done_callback(self._listener.tasks.discard)

    async def _serve(self, request: Incoming) -> None:
        await self._listener.handle(request)
        self._task, self.on_pause = None, None
        if self._refused or not self._keep_alive or self._listener.closing:
            self._transport.close()
        elif self._waiting:
            self._start(self._waiting.popleft())
        else:
            self._arm(self._settings.idle_timeout_s, None)

    # ---- answers ----

    def whole(self, status: int, headers: Headers, body: bytes, *, without_body: bool = False) -> None:
        """An answer at once."""
        self.began = True
        head = self._head_bytes(status, headers, b"content-length: %d\r\n" % len(body))
        self._transport.write(head if without_body else head + body)

    def begin(self, status: int, headers: Headers, *, http10: bool) -> None:
        """An answer whose length is not known: chunks, or for HTTP/1.0 the end of the connection."""
        self.began, self._chunked = True, not http10
        if http10:
            self._keep_alive = False
        self._transport.write(self._head_bytes(status, headers, b"" if http10 else b"transfer-encoding: chunked\r\n"))

    def piece(self, data: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def end(self) -> None:
        if self._chunked:
            self._transport.write(b"0\r\n\r\n")

    def cut(self) -> None:
        """The answer cannot be completed and its client must not take it for whole."""
        self._keep_alive = False
        self._transport.close()

    @property
    def paused(self) -> bool:
        return self._paused

    def _head_bytes(self, status: int, headers: Headers, framing: bytes) -> bytes:
        line = STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
        passed = b"".join([b"%b: %b\r\n" % pair for pair in headers if pair[0] not in _FRAMING])
        close = b"connection: close\r\n" if not self._keep_alive or self._refused or self._listener.closing else b""
        return line + passed + framing + close + b"\r\n"
