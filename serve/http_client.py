"""A small HTTP/1.1 client for streams: one request a connection, the body as it comes. No dependencies, little cost.

In: a URL, a body. Out: status, and chunks of the answer with no delay of its own. For bench and chat, which must work
against any server of OpenAI's API. Follows no redirects, keeps no connections.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from jaxllm.core import JaxLLMError

HEAD_LIMIT = 1 << 20


class ClientError(JaxLLMError):
    """The server cannot be reached, or does not speak HTTP."""


@dataclass(frozen=True)
class Target:
    """A server and the key for it."""

    url: str
    api_key: str | None = None

    def head(self, method: str, path: str, length: int) -> bytes:
        where = urlsplit(self.url)
        lines = [f"{method} {where.path.rstrip('/')}{path} HTTP/1.1", f"host: {where.netloc}", "connection: close"]
        lines += ["accept: text/event-stream, application/json"]
        if method == "POST":
            lines += ["content-type: application/json", f"content-length: {length}"]
        if self.api_key:
            lines.append(f"authorization: Bearer {self.api_key}")
        return "\r\n".join([*lines, "", ""]).encode()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        wrong = ClientError(f"url = {self.url!r}: must be http://host:port or https://host:port")
        try:
            where = urlsplit(self.url)
            port = where.port or {"http": 80, "https": 443}.get(where.scheme)
        except ValueError:
            raise wrong from None
        if port is None or not where.hostname:
            raise wrong
        secure = ssl.create_default_context() if where.scheme == "https" else None
        try:
            return await asyncio.open_connection(where.hostname, port, ssl=secure, limit=HEAD_LIMIT)
        except OSError as error:
            raise ClientError(f"{self.url} cannot be reached: {error.strerror or error}") from None


async def open_stream(
    target: Target, path: str, body: Mapping[str, Any] | None = None
) -> tuple[int, AsyncGenerator[bytes]]:
    """(status, parts of the body); closing the generator closes the connection. POST when there is a body."""
    content = b"" if body is None else json.dumps(body).encode()
    reader, writer = await target.connect()
    try:
        writer.write(target.head("GET" if body is None else "POST", path, len(content)) + content)
        await writer.drain()
        status, headers = _read_head(await reader.readuntil(b"\r\n\r\n"))
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        writer.close()
        raise ClientError(f"{target.url}: the server ended the connection ({type(error).__name__})") from None
    except BaseException:  # no HTTP, or whoever asked has given up
        writer.close()
        raise
    return status, _parts(reader, writer, headers)


def _read_head(head: bytes) -> tuple[int, dict[bytes, bytes]]:
    first, *lines = head.rstrip().split(b"\r\n")
    try:
        status = int(first.split(b" ", 2)[1])
    except (IndexError, ValueError):
        raise ClientError(f"no HTTP: {first[:80]!r}") from None
    pairs = (line.partition(b":") for line in lines)
    return status, {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _parts(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: Mapping[bytes, bytes]
) -> AsyncGenerator[bytes]:
    try:
        if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
            while size := int((await reader.readuntil(b"\n")).split(b";")[0], 16):
                yield await reader.readexactly(size)
                await reader.readexactly(2)
        else:
            left = int(headers.get(b"content-length", b"-1"))
            while left and (part := await reader.read(65536 if left < 0 else min(left, 65536))):
                left -= len(part) if left > 0 else 0
                yield part
            if left > 0:
                raise asyncio.IncompleteReadError(b"", left)
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
        raise ClientError(f"the answer broke off ({type(error).__name__})") from None
    finally:
        writer.close()


async def whole(parts: AsyncGenerator[bytes]) -> bytes:
    return b"".join([part async for part in parts])


async def fetch(target: Target, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
    """(status, what was said)."""
    status, parts = await open_stream(target, path, body)
    return status, parsed(await whole(parts))


def parsed(content: bytes) -> Any:
    """JSON, else text."""
    try:
        return json.loads(content)
    except ValueError:
        return content.decode("utf-8", "replace")


async def events(parts: AsyncGenerator[bytes]) -> AsyncGenerator[str]:
    """The data of each server-sent event."""
    rest = b""
    try:
        async for part in parts:
            rest += part
            while b"\n\n" in rest or b"\r\n\r\n" in rest:
                end = b"\r\n\r\n" if b"\r\n\r\n" in rest and b"\n\n" not in rest else b"\n\n"
                event, _, rest = rest.partition(end)
                data = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
                if data:
                    yield b"\n".join(data).decode("utf-8", "replace")
    finally:
        await parts.aclose()


def message_of(answer: Any) -> str:
    """An error's words in OpenAI's shape, else what there is."""
    error = answer.get("error") if isinstance(answer, dict) else None
    return str(error.get("message") if isinstance(error, dict) else error or answer)[:500]
