"""Bytes of a request's body to a JSON object, strictly: what orjson refuses is refused, and said as well as can be.

In: bytes and a content type. Out: a dict, or ApiError 400 or 415. Knows nothing of routes.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

from serve.errors import ApiError

DIAGNOSED_BYTES = 64 * 1024  # above this nobody looks for the bad number


def read_json(body: bytes, content_type: bytes) -> dict[str, Any]:
    kind = content_type.partition(b";")[0].strip().lower()
    if kind and kind != b"application/json" and not (kind.startswith(b"application/") and kind.endswith(b"+json")):
        raise ApiError(415, "the body must be application/json", code="unsupported_media_type")
    try:
        value = orjson.loads(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", param=_culprit(body), code="invalid_json") from None
    if not isinstance(value, dict):
        kinds = {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}
        message = f"the body must be a JSON object, not {kinds.get(type(value), 'a number')}"
        raise ApiError(400, message, code="invalid_json")
    return value


class _Unreadable(Exception):
    pass


def _culprit(body: bytes) -> str | None:
    """The top-level field whose number JSON does not have (NaN, Infinity, 1e999, too many digits); None if another."""
    if len(body) > DIAGNOSED_BYTES or body.count(b"[") + body.count(b"{") > 500:
        return None

    bad = _Unreadable()

    def constant(text: str) -> Any:
        return bad

    def real(text: str) -> Any:
        value = float(text)
        return bad if value in (float("inf"), float("-inf")) else value

    def whole(text: str) -> Any:
        return bad if len(text) > 20 else int(text)

    try:
        value = json.loads(body.decode(), parse_constant=constant, parse_float=real, parse_int=whole)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    return next((name for name, inner in value.items() if _holds(inner, bad)), None)


def _holds(value: Any, bad: _Unreadable) -> bool:
    if isinstance(value, dict):
        return any(_holds(inner, bad) for inner in value.values())
    if isinstance(value, list):
        return any(_holds(inner, bad) for inner in value)
    return value is bad
