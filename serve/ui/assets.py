"""The web page's files as Starlette routes: / and /ui/NAME, from inside the package, nothing else.

In: nothing. Out: routes. The page loads only these files and talks only to this server, and its headers say so. Names
are looked up in a table made at start: no request ever becomes a path. Knows nothing of what the page does.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # asked for again each time, answered 304 when unchanged
}


@dataclass(frozen=True)
class Asset:
    body: bytes
    media_type: str
    etag: str

    def answer(self, request: Request) -> Response:
        headers = {**HEADERS, "etag": self.etag}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.body, media_type=self.media_type, headers=headers)


@cache
def load_assets() -> dict[str, Asset]:
    """Every file of the page by name."""
    found = {}
    for entry in resources.files("serve.ui").joinpath("static").iterdir():
        kind = entry.name.rpartition(".")[2]
        if kind in TYPES:
            body = entry.read_bytes()
            found[entry.name] = Asset(body, TYPES[kind], f'"{hashlib.sha256(body).hexdigest()[:16]}"')
    return found


def ui_routes() -> list[Route]:
    """GET / is the page, GET /ui/{name} its parts. They need no key: the page holds nothing of the server's."""
    assets = load_assets()

    async def page(request: Request) -> Response:
        return assets["index.html"].answer(request)

    async def part(request: Request) -> Response:
        asset = assets.get(request.path_params["name"])
        return Response("no such file", 404, media_type="text/plain") if asset is None else asset.answer(request)

    return [Route("/", page, methods=["GET"]), Route("/ui/{name}", part, methods=["GET"])]
