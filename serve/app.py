"""The ASGI application: one table of routes, the gate around it, errors in one shape.

In: a Front. Out: an ASGI app. A route is a function of (front, call) or (front, call, body); the table says which, and
what pydantic model its body has, so that /openapi.json is made of the same table. Knows nothing of sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

import pydantic
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serve import anthropic, native, probes
from serve.bodies import read_json
from serve.errors import ApiError
from serve.front import Front
from serve.middleware import ADMIN, PUBLIC, Call, Gate, respond, values
from serve.openai import chat, completions, embeddings, models, protocol, responses
from serve.openapi import describe, docs_page
from serve.responses import Answer, as_json
from serve.ui.assets import load_assets, ui_routes

log = logging.getLogger(__name__)

Handler = Callable[..., Awaitable[ASGIApp]]
LONG_S = 900.0  # for what waits for requests in flight, or reads weights


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    method: str
    path: str
    handler: Handler
    body: type[pydantic.BaseModel] | None = None
    summary: str = ""
    empty_body: bool = False  # POST without a body is fine


TABLE: tuple[Entry, ...] = (
    Entry("POST", "/v1/chat/completions", chat.create, protocol.ChatBody, "Chat"),
    Entry("POST", "/v1/completions", completions.create, protocol.CompletionBody, "Complete text or token ids"),
    Entry("GET", "/v1/models", models.listing, None, "Models of this server"),
    Entry("GET", "/v1/models/{model:path}", models.one, None, "One model"),
    Entry("POST", "/v1/responses", responses.create, protocol.ResponsesBody, "Responses API"),
    Entry("GET", "/v1/responses/{response_id}", responses.get, None, "A stored response"),
    Entry("DELETE", "/v1/responses/{response_id}", responses.delete, None, "Forget a stored response"),
    Entry(
        "POST",
        "/v1/responses/{response_id}/cancel",
        responses.cancel,
        None,
        "Cancel a running response",
        empty_body=True,
    ),
    Entry("POST", "/v1/embeddings", embeddings.create, protocol.EmbeddingBody, "Embeddings"),
    Entry("POST", "/v1/messages", anthropic.create, protocol.AnthropicBody, "Chat in Anthropic's shape"),
    Entry("POST", "/v1/messages/count_tokens", anthropic.count_tokens, protocol.AnthropicPrompt, "Its prompt's tokens"),
    Entry("POST", "/tokenize", native.tokenize, protocol.TokenizeBody, "Text or messages to token ids"),
    Entry("POST", "/detokenize", native.detokenize, protocol.DetokenizeBody, "Token ids to text"),
    Entry("POST", "/generate", native.generate, protocol.GenerateBody, "Generate, in SGLang's shape"),
    Entry("POST", "/abort", native.abort, protocol.AbortBody, "End one of your requests"),
    Entry("GET", "/health", probes.health, None, "Is the server alive?"),
    Entry("GET", "/ready", probes.ready, None, "Should requests come here?"),
    Entry("GET", "/metrics", probes.metrics, None, "Prometheus metrics"),
    Entry("GET", "/version", probes.version, None, "Version"),
    Entry("GET", "/server_info", probes.server_info, None, "Facts and limits (admin)"),
    Entry("POST", "/pause", probes.operation("pause"), None, "Stop stepping (admin)", empty_body=True),
    Entry("POST", "/resume", probes.operation("resume"), None, "Step again (admin)", empty_body=True),
    Entry(
        "POST",
        "/reset_prefix_cache",
        probes.operation("reset_prefix_cache"),
        None,
        "Forget cached pages (admin)",
        empty_body=True,
    ),
    Entry(
        "POST",
        "/rebalance_experts",
        probes.operation("rebalance_experts", timeout_s=LONG_S),
        None,
        "Move experts by measured load (admin)",
        empty_body=True,
    ),
    Entry(
        "POST",
        "/sleep",
        probes.operation("sleep", protocol.SleepBody, LONG_S),
        protocol.SleepBody,
        "Free the device (admin)",
        empty_body=True,
    ),
    Entry("POST", "/wake_up", probes.operation("wake_up", timeout_s=LONG_S), None, "Back (admin)", empty_body=True),
    Entry(
        "POST",
        "/update_weights",
        probes.operation("update_weights", protocol.UpdateWeightsBody, LONG_S),
        protocol.UpdateWeightsBody,
        "Other weights of the same shapes (admin)",
    ),
    Entry("POST", "/start_profile", probes.operation("start_profile"), None, "Start a trace (admin)", empty_body=True),
    Entry("POST", "/stop_profile", probes.operation("stop_profile"), None, "End a trace (admin)", empty_body=True),
)


class Endpoint:
    """A handler as ASGI."""

    def __init__(self, front: Front, entry: Entry) -> None:
        self._front, self._entry = front, entry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call: Call = scope["jaxllm.call"]
        call.path_params = scope.get("path_params")
        try:
            answer = await self._answer(scope, call)
            await answer(scope, receive, send)
        except ApiError as error:  # raised before an answer began: streams end themselves
            await respond(send, error, call.method)
        except Exception:
            log.exception("%s failed; request %s", self._entry.path, call.request_id)
            await respond(send, ApiError(500, "internal error", code="internal_error"), call.method)

    async def _answer(self, scope: Scope, call: Call) -> ASGIApp:
        handler, entry = self._entry.handler, self._entry
        if entry.method != "POST":
            return await handler(self._front, call)
        if entry.empty_body and not call.body:
            return await handler(self._front, call, {})
        kind = next(iter(values(scope["headers"], b"content-type")), b"")
        return await handler(self._front, call, read_json(call.body, kind))


def _documents(front: Front) -> list[Entry]:
    settings = front.settings
    public = PUBLIC | {"/metrics"} if settings.public_metrics else PUBLIC
    document = describe(TABLE, public, ADMIN, keys=bool(settings.keys))

    async def openapi(front: Front, call: Call) -> Answer:
        return as_json(document)

    async def docs(front: Front, call: Call) -> Answer:
        return Answer(docs_page(document), content_type="text/html; charset=utf-8")

    return [Entry("GET", "/openapi.json", openapi), Entry("GET", "/docs", docs)]


def build_app(front: Front) -> Gate:
    """The whole application; starting it starts the engine."""
    entries = [*TABLE, *_documents(front)]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await front.client.start(wait=False)
        tasks = [asyncio.create_task(front.ping()), asyncio.create_task(front.report())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await front.client.close()
            front.close()

    async def refused(request: Any, error: Exception) -> ASGIApp:
        assert isinstance(error, HTTPException)
        known = {
            404: ("no such route", "route_not_found"),
            405: ("this route has another method", "method_not_allowed"),
        }
        message, code = known.get(error.status_code, (str(error.detail), None))
        shown = request.url.path if len(request.url.path) <= 80 else request.url.path[:77] + "..."
        allow = None
        if error.status_code == 405:
            here = [route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE]
            allow = ", ".join(sorted({method for route in here for method in getattr(route, "methods", None) or ()}))
        wrong = ApiError(error.status_code, f"{message}: {request.method} {shown!a}", code=code, allow=allow)

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            await respond(send, wrong, scope["method"])

        return answer

    app = Starlette(
        routes=[
            *(Route(entry.path, Endpoint(front, entry), methods=[entry.method]) for entry in entries),
            *ui_routes(),
        ],
        exception_handlers=cast(Any, {HTTPException: refused}),
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return Gate(app, front.settings, {"/", *(f"/ui/{name}" for name in load_assets())})
