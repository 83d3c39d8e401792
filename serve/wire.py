"""Below HTTP: limits on what a connection may send before it is a request. Wraps uvicorn's h11 protocol.

In: a connection's bytes. Out: the same bytes to h11, or a refusal and the end of the connection: header block too large
(431), lines ended by a bare LF (400), headers that take too long (408), silence. Knows nothing of routes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any, cast

import h11
from starlette.types import Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

from serve.errors import ApiError
from serve.settings import FrontSettings

_BARE_LF = re.compile(rb"(?<!\r)\n")


class GuardedProtocol(asyncio.Protocol):
    """One connection."""

    def __init__(self, inner: H11Protocol, settings: FrontSettings, loop: asyncio.AbstractEventLoop) -> None:
        self._inner, self._settings, self._loop = inner, settings, loop
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._head = b""  # header bytes that h11 has and has not made a request of
        self._timer_is_header = False
        self._refused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass of it
        self._inner.connection_made(transport)
        if len(self._inner.connections) > self._settings.max_connections:
            self._refuse(ApiError(503, "too many connections", code="too_many_connections", retry_after_s=5))
            return
        self._timer = self._loop.call_later(self._settings.idle_timeout_s, self._close)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._inner.conn.their_state is h11.IDLE and not self._check_head(data):
            return
        self._inner.data_received(data)
        self._rearm()

    def _check_head(self, data: bytes) -> bool:
        """Looks at what belongs to a header block; bytes after it are the body's or the next request's."""
        self._head += data[: self._settings.max_header_bytes + 1]
        head = self._head.partition(b"\r\n\r\n")[0]
        if len(head) > self._settings.max_header_bytes:
            status = 431 if b"\n" in head else 414
            self._refuse(ApiError(status, f"the header has more than {self._settings.max_header_bytes} bytes"))
        elif _BARE_LF.search(head):
            self._refuse(ApiError(400, "header lines end in CR LF", code="invalid_http"))
        return not self._refused

    def _rearm(self) -> None:
        """The header's clock starts with its first byte and stops when h11 has the request."""
        pending = self._inner.conn.their_state is h11.IDLE and bool(self._inner.conn.trailing_data[0])
        if pending and self._timer is not None and self._timer_is_header:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_is_header = pending
        if pending:
            self._timer = self._loop.call_later(self._settings.header_timeout_s, self._late)
        else:
            self._head = b""

    def _late(self) -> None:
        if self._inner.conn.their_state is h11.IDLE:
            wait = self._settings.header_timeout_s
            self._refuse(ApiError(408, f"the header did not come within {wait:g} s", code="header_timeout"))

    def _refuse(self, error: ApiError) -> None:
        self._refused = True
        body, transport = error.encode(), self._transport
        assert transport is not None
        phrase = {400: "Bad Request", 408: "Request Timeout", 414: "URI Too Long", 503: "Service Unavailable"}
        lines = [f"HTTP/1.1 {error.status} {phrase.get(error.status, 'Request Header Fields Too Large')}".encode()]
        lines += [name + b": " + value for name, value in error.headers()]
        lines += [b"content-length: " + str(len(body)).encode(), b"connection: close", b"", body]
        transport.write(b"\r\n".join(lines))
        transport.close()

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._inner.connection_lost(exc)

    def eof_received(self) -> None:
        self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


def body_writer(send: Send) -> Callable[[bytes], Awaitable[None]]:
    """Writes parts of a body that goes on, once its head is sent; `send` is the server's own.

    A chunked body over HTTP/1.1 is framed here and given to the socket at once: h11 would check each part anew, which
    costs as much as making it. h11 still sends the head and the end, and keeps no count of what is between.
    """
    cycle = getattr(send, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle) or cycle.scope["http_version"] != "1.1":

        async def whole(part: bytes) -> None:
            await send({"type": "http.response.body", "body": part, "more_body": True})

        return whole
    here, flow, transport = cycle, cycle.flow, cycle.transport

    async def framed(part: bytes) -> None:
        if flow.write_paused and not here.disconnected:
            await flow.drain()
        if part and not here.disconnected:
            transport.write(b"%x\r\n%b\r\n" % (len(part), part))

    return framed


def protocol_factory(settings: FrontSettings) -> Any:
    """What uvicorn calls for each connection."""

    def make(
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> GuardedProtocol:
        inner = H11Protocol(config, server_state, app_state, _loop)
        return GuardedProtocol(inner, settings, _loop or asyncio.get_running_loop())

    return make
