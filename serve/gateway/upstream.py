"""Connections to workers: a request's bytes go out, the answer's head and body come back through a Sink's methods.

One pool a worker; connections are kept and reused. HTTP/1.1 is read by llhttp (httptools). Knows nothing of balancing,
retries or clients.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import httptools

KEPT_S = 60.0  # an idle connection is not used after this: workers close theirs later
KEPT = 256  # idle connections of one worker
Headers = list[tuple[bytes, bytes]]


class Sink(Protocol):
    """Who an answer is for."""

    def head(self, status: int, headers: Headers) -> None: ...

    def body(self, data: bytes) -> None: ...

    def end(self) -> None: ...

    def lost(self, why: str) -> None:
        """The connection ended before the answer did."""
        ...


class Connection(asyncio.Protocol):
    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.used = False  # whether an earlier request went over it
        self.heard = False  # whether this request has an answer's first byte
        self.idle_since_s = 0.0
        self.closed = False
        self._sink: Sink | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: Headers = []
        self._in_body = self._to_eof = False
        self._transport: Any = None

    # ---- asyncio ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._sink is None:
            self.close()  # nothing was asked
            return
        self.heard = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail("the worker changed protocols")
        except httptools.HttpParserError as error:
            self._fail(f"the worker does not speak HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self.pool.dropped(self)
        sink, self._sink = self._sink, None
        if sink is None:
            return
        if self._to_eof and exc is None:
            sink.end()
        else:
            sink.lost("the worker closed the connection" if exc is None else f"the connection broke: {exc}")

    # ---- httptools ----

    def on_message_begin(self) -> None:
        self._headers, self._in_body, self._to_eof = [], False, False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200 or self._sink is None:
            return
        self._in_body = True
        framed = any(name in (b"content-length", b"transfer-encoding") for name, _ in self._headers)
        self._to_eof = not framed and status not in (204, 304)
        self._sink.head(status, self._headers)

    def on_body(self, data: bytes) -> None:
        if self._sink is not None:
            self._sink.body(data)

    def on_message_complete(self) -> None:
        sink = self._sink
        if not self._in_body or sink is None:
            return
        self._sink, self._in_body = None, False
        if self._parser.should_keep_alive():
            self.pool.keep(self)
        else:
            self.close()
        sink.end()

    # ---- its user ----

    def send(self, request: bytes, sink: Sink) -> None:
        self._sink, self.heard = sink, False
        self._transport.write(request)

    def serves(self, sink: Sink) -> bool:
        return self._sink is sink

    def pause(self) -> None:
        if not self.closed:
            self._transport.pause_reading()

    def resume(self) -> None:
        if not self.closed:
            self._transport.resume_reading()

    def give_up(self) -> None:
        """The answer is not wanted any more: closing says so to the worker."""
        self._sink = None
        self.close()

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, why: str) -> None:
        sink, self._sink = self._sink, None
        self.close()
        if sink is not None:
            sink.lost(why)


class Pool:
    """Of one worker."""

    def __init__(self, url: str, connect_timeout_s: float) -> None:
        self.url, self._timeout_s = url, connect_timeout_s
        self._idle: list[Connection] = []
        self._closed = False
        parts = urlsplit(url)
        self.host = b"localhost" if url.startswith("unix:") else parts.netloc.encode()
        self._address = parts.hostname or "", parts.port or 80

    async def connection(self, *, fresh: bool = False) -> Connection:
        """OSError or TimeoutError when there is none to be had."""
        now = time.monotonic()
        while self._idle and not fresh:
            kept = self._idle.pop()
            if not kept.closed and now - kept.idle_since_s < KEPT_S:
                kept.used = True
                return kept
            kept.close()
        loop, make = asyncio.get_running_loop(), cast("Callable[[], Connection]", lambda: Connection(self))
        async with asyncio.timeout(self._timeout_s):
            if self.url.startswith("unix:"):
                return (await loop.create_unix_connection(make, self.url[5:]))[1]
            return (await loop.create_connection(make, *self._address))[1]

    def keep(self, connection: Connection) -> None:
        if self._closed or connection.closed or len(self._idle) >= KEPT:
            connection.close()  # an answer may end after its pool did
        else:
            connection.idle_since_s = time.monotonic()
            self._idle.append(connection)

    def dropped(self, connection: Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().close()


class Whole:
    """A sink that waits for a whole answer."""

    def __init__(self) -> None:
        self.status, self.headers, self._parts = 0, Headers(), list[bytes]()
        self.done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def head(self, status: int, headers: Headers) -> None:
        self.status, self.headers = status, headers

    def body(self, data: bytes) -> None:
        self._parts.append(data)

    def end(self) -> None:
        if not self.done.done():
            self.done.set_result(b"".join(self._parts))

    def lost(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(why))


async def fetch(pool: Pool, path: str, timeout_s: float, headers: Headers | None = None) -> tuple[int, bytes]:
    """GET: (status, body), on a new connection; OSError or TimeoutError."""
    async with asyncio.timeout(timeout_s):
        connection = await pool.connection(fresh=True)
        sink = Whole()
        try:
            connection.send(request_bytes("GET", path.encode(), pool.host, headers or [], None), sink)
            body = await sink.done
            return sink.status, body
        finally:
            if connection.serves(sink):  # else it is kept, and may be another's already
                connection.give_up()


NOT_PASSED_ON = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer transfer-encoding "
    b"upgrade expect host content-length".split()
)


def request_bytes(method: str, target: bytes, host: bytes, headers: Headers, body: bytes | None) -> bytes:
    """A request with our own framing; the rest of the headers as they came."""
    lines = [method.encode() + b" " + target + b" HTTP/1.1", b"host: " + host]
    lines += [name + b": " + value for name, value in headers if name not in NOT_PASSED_ON]
    if body is not None:
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")
