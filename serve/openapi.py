"""/openapi.json from the route table and the bodies' pydantic models, and a page that shows it without any script.

In: the table. Out: a dict, and HTML. Knows nothing of requests.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import pydantic
from pydantic.json_schema import models_json_schema

from serve.answers import content_of

ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ANTHROPIC_SCHEMA = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
ANTHROPIC_ERRORS = frozenset({("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens")})
STYLE = "body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}code,pre{font-size:.9em}"


class Line(Protocol):
    @property
    def method(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def body(self) -> type[pydantic.BaseModel] | None: ...

    @property
    def summary(self) -> str: ...

    @property
    def empty_body(self) -> bool: ...


def describe(
    table: Sequence[Line], public: Collection[str], admin: Collection[str], *, keys: bool = True
) -> dict[str, Any]:
    """`keys`: whether this server asks for one; admin routes always do."""
    models = [line.body for line in table if line.body is not None]
    _, schemas = models_json_schema(
        [(model, "validation") for model in dict.fromkeys(models)], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    problem = {"description": "an error", "content": {"application/json": {"schema": {"$ref": _ref("Error")}}}}
    either = {"anyOf": [{"$ref": _ref("Error")}, {"$ref": _ref("AnthropicError")}]}
    other = {"description": "an error", "content": {"application/json": {"schema": either}}}
    for line in table:
        path = re.sub(r":path}", "}", line.path)
        names = re.findall(r"{(\w+)}", path)
        operation: dict[str, Any] = {
            "summary": line.summary,
            "operationId": f"{line.method.lower()}{re.sub(r'[^a-z0-9]+', '_', path)}".rstrip("_"),
            "responses": {
                "200": {"description": "done", "content": content_of(line.method, path)},
                "default": other if (line.method, path) in ANTHROPIC_ERRORS else problem,
            },
            "security": [{"admin": []}] if path in admin else [{"key": []}] if keys and path not in public else [],
        }
        if names:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ]
        if line.body is not None:
            schema = {"$ref": _ref(line.body.__name__)}
            operation["requestBody"] = {
                "required": not line.empty_body,
                "content": {"application/json": {"schema": schema}},
            }
        paths.setdefault(path, {})[line.method.lower()] = operation
    scheme = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxllm", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": {**schemas.get("$defs", {}), "Error": ERROR_SCHEMA, "AnthropicError": ANTHROPIC_SCHEMA},
            "securitySchemes": {"key": scheme, "admin": scheme},
        },
    }


def _ref(name: str) -> str:
    return f"#/components/schemas/{name}"


def docs_page(document: dict[str, Any]) -> bytes:
    """Every route with its body's fields and types."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>jaxllm API</title><style>{STYLE}</style>"]
    parts.append("<h1>jaxllm API</h1><p>Machine readable: <a href=/openapi.json>/openapi.json</a></p>")
    schemas = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation['summary'])}</p>")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            fields = schemas.get(body.get("$ref", "").rpartition("/")[2], {}).get("properties", {})
            parts.extend(
                f"<div><code>{html.escape(name)}</code>: {html.escape(_type(field))}</div>"
                for name, field in fields.items()
            )
    return "".join(parts).encode()


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(one) for one in field["anyOf"])
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    kind = str(field.get("type", "any"))
    return f"{kind} of {_type(field['items'])}" if kind == "array" and "items" in field else kind
