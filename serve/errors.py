"""Every way a request can fail, as one exception with OpenAI's four keys; and how the engine's words map onto it.

In: RequestError, pydantic's ValidationError, error texts of the engine (`code: message`). Out: ApiError, which knows
its status, body and headers. Bodies never hold paths, addresses or tracebacks.
"""

from __future__ import annotations

import re
from typing import Any

import orjson
import pydantic

from jaxllm.core import RequestError

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ENGINE_STATUS = {
    "invalid_request": 400,
    "invalid_schema": 400,
    "queue_timeout": 503,
    "engine_died": 503,
    "shutting_down": 503,
    "not_supported": 400,
    "invalid_state": 409,
    "asleep": 503,
    "prefill_unavailable": 503,
    "prefill_died": 503,
}
FIELD_NAMES = {"prompt_token_ids": "prompt", "id": "request_id"}
SHOWN = 400  # characters of a message that may quote what a user sent


class ApiError(Exception):
    """What a client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        close: bool = False,
        allow: str | None = None,
    ) -> None:
        """`allow`: of a 405, the methods that there are."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message[:SHOWN], param, code
        self.retry_after_s, self.close, self.allow = retry_after_s, close, allow

    def again(self) -> ApiError:
        """The same to raise: one that is kept and raised would keep the frames it went through."""
        kept = {"param": self.param, "code": self.code, "retry_after_s": self.retry_after_s}
        return ApiError(self.status, self.message, close=self.close, allow=self.allow, **kept)

    @property
    def type(self) -> str:
        return TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def encode(self) -> bytes:
        return orjson.dumps(self.body())

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Clients retry 408, 409, 429 and 5xx unless told that the same request will fail again."""
        found = [(b"content-type", b"application/json")]
        if self.retry_after_s is not None:
            found.append((b"retry-after", str(max(1, round(self.retry_after_s))).encode()))
        elif self.status in (408, 409, 429) or self.status >= 500:
            found.append((b"x-should-retry", b"false"))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        if self.allow is not None:
            found.append((b"allow", self.allow.encode()))
        if self.close:
            found.append((b"connection", b"close"))
        return found


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, why: str = "is not supported by this server") -> ApiError:
    return ApiError(400, f"{param} {why}", param=param, code="unsupported_parameter")


def from_request_error(
    error: RequestError, names: dict[str, str] | None = None, code: str = "out_of_range"
) -> ApiError:
    name = re.split(r"[\[.]", error.field, maxsplit=1)[0]
    param = (names or {}).get(name) or FIELD_NAMES.get(name, name)
    message = str(error).replace(error.field, param, 1)
    return ApiError(400, message, param=param, code=code)


def from_validation_error(error: pydantic.ValidationError) -> ApiError:
    """The first of pydantic's complaints; its location is the parameter."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "function-", "union[")))
    param = str(first["loc"][0]) if first["loc"] else None
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_type"
    if first["type"] in ("finite_number", "greater_than_equal", "less_than_equal", "greater_than", "too_long"):
        code = "out_of_range"
    return ApiError(400, f"{where or 'body'}: {first['msg']}", param=param, code=code)


def from_engine(text: str) -> ApiError:
    """`code: message` or `code/field: message` -> the error; unknown codes are the server's fault."""
    code, _, message = text.partition(": ")
    code, _, param = code.partition("/")
    param = FIELD_NAMES.get(param, param)
    status = ENGINE_STATUS.get(code, 500)
    retry = 5.0 if code == "queue_timeout" else 10.0 if status == 503 else None
    return ApiError(status, message or "the engine failed", param=param or None, code=code, retry_after_s=retry)
