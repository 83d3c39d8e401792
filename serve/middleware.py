"""The gate every request passes: its shape, its key, its rate and its body are judged before any route sees it.

In: ASGI. Out: ASGI, with a Call in the scope (tenant, request id, whole body), a request id on every answer, and every
failure in OpenAI's error shape. Deny by default: a path that is not in PUBLIC needs a key whenever keys are set, known
or not; paths under ADMIN need an admin key always. Knows nothing of models, prompts or engines.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.admission import RateLimit
from serve.errors import ApiError
from serve.settings import FrontSettings, hash_key

log = logging.getLogger(__name__)

PUBLIC = frozenset({"/health", "/ready"})
ADMIN = frozenset(
    {
        "/pause",
        "/resume",
        "/sleep",
        "/wake_up",
        "/reset_prefix_cache",
        "/rebalance_experts",
        "/start_profile",
        "/stop_profile",
        "/update_weights",
        "/server_info",
    }
)
MAX_PATH = 4096
MAX_KEY = 1024
_ECHOED = re.compile(rb"[\x21-\x7e]{1,128}")
Headers = list[tuple[bytes, bytes]]


@dataclass
class Call:
    """One request as a route sees it."""

    method: str
    path: str
    request_id: str
    tenant: str
    body: bytes
    receive: Receive  # gives nothing but the disconnect any more
    send: Send  # below every wrapper: for the bodies of streams, where each layer costs on every token
    query: bytes = b""
    path_params: dict[str, str] | None = None


def values(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]


def tenant_of(headers: Headers, keys: tuple[bytes, ...]) -> str | None:
    """Which of the keys the request carries, compared against every one in constant time; None when none."""
    sent = values(headers, b"authorization")
    given = sent[0][7:] if sent and sent[0][:7].lower() == b"bearer " else b""
    given = given or next(iter(values(headers, b"x-api-key")), b"")
    digest = hash_key(given[: MAX_KEY + 1].strip().decode("utf-8", "surrogateescape"))
    found = None
    for key in keys:
        if secrets.compare_digest(digest, key):
            found = key.hex()[:16]
    return found if len(given) <= MAX_KEY else None


async def respond(send: Send, error: ApiError, method: str = "GET") -> None:
    body = error.encode()
    headers = [*error.headers(), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if method == "HEAD" else body})


class Gate:
    def __init__(self, app: ASGIApp, settings: FrontSettings, page: Collection[str] = ()) -> None:
        """`page`: paths of static files that hold nothing of the server's, open like PUBLIC."""
        self.app, self.settings = app, settings
        self.public = PUBLIC | frozenset(page)
        self.requests = RateLimit(settings.requests_per_minute, "requests")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: Headers = scope["headers"]
        request_id = uuid.uuid4().hex
        extra = [(b"x-request-id", request_id.encode())]
        theirs = values(headers, b"x-request-id")
        if len(theirs) == 1 and _ECHOED.fullmatch(theirs[0]):
            extra.append((b"x-client-request-id", theirs[0]))
        extra += self._cors(headers)
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        try:
            self._check_shape(scope)
            tenant = self._authenticate(scope["path"], headers)
            if scope["method"] == "OPTIONS" and len(extra) > 1 and extra[-1][0].startswith(b"access-control"):
                await sending({"type": "http.response.start", "status": 204, "headers": []})
                await sending({"type": "http.response.body", "body": b""})
                return
            if scope["path"] not in PUBLIC:
                self.requests.spend(tenant, 1)
            body = await self._read_body(scope, receive)
            scope["jaxllm.call"] = Call(
                scope["method"], scope["path"], request_id, tenant, body, receive, send, scope["query_string"]
            )
            await self.app(scope, receive, sending)
        except ApiError as error:
            if not started:
                await respond(sending, error, scope["method"])
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("a route failed; request %s", request_id)
            if not started:
                await respond(sending, ApiError(500, "internal error", code="internal_error"), scope["method"])
        finally:
            scope.pop("jaxllm.call", None)  # it leads back to the scope: garbage that only a collection would find

    # ---- the judgements ----

    def _check_shape(self, scope: Scope) -> None:
        headers: Headers = scope["headers"]
        if len(headers) > self.settings.max_headers:
            raise ApiError(431, f"at most {self.settings.max_headers} headers", code="too_many_headers", close=True)
        if len(scope.get("raw_path") or b"") > MAX_PATH:
            raise ApiError(414, f"the path has more than {MAX_PATH} bytes", code="path_too_long", close=True)
        if values(headers, b"transfer-encoding") and values(headers, b"content-length"):
            message = "a request has either Content-Length or Transfer-Encoding"
            raise ApiError(400, message, code="ambiguous_length", close=True)

    def _authenticate(self, path: str, headers: Headers) -> str:
        settings = self.settings
        if path in self.public or (settings.public_metrics and path == "/metrics"):
            return ""
        if path in ADMIN:
            if not settings.admin_keys:
                raise ApiError(403, "admin routes are off: the server has no admin key", code="admin_disabled")
            tenant = tenant_of(headers, settings.admin_keys)
        elif settings.keys:
            tenant = tenant_of(headers, (*settings.keys, *settings.admin_keys))
        else:
            return ""
        if tenant is None:
            raise ApiError(401, "missing or wrong API key", code="invalid_api_key")
        return tenant

    def _cors(self, headers: Headers) -> Headers:
        origin = next(iter(values(headers, b"origin")), b"")
        if not origin or origin.decode("latin-1") not in self.settings.allowed_origins:
            return []
        return [
            (b"vary", b"origin"),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"access-control-allow-methods", b"GET, POST, DELETE"),
            (b"access-control-allow-origin", origin),
        ]

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self.settings.max_body_bytes
        too_long = ApiError(413, f"the body has more than {limit} bytes", code="body_too_large", close=True)
        for value in values(scope["headers"], b"content-length"):
            if not value.isdigit() or int(value) > limit:
                raise too_long
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left before the end of the body", close=True)
                    parts.append(message.get("body", b""))
                    size, more = size + len(parts[-1]), message.get("more_body", False)
                    if size > limit:
                        raise too_long
        except TimeoutError:
            message = f"the body did not come within {self.settings.body_timeout_s:g} s"
            raise ApiError(408, message, code="body_timeout", close=True) from None
        return b"".join(parts)
