"""Which grammar a request asks for: response_format, vLLM's guided_* and structured_outputs, as one GrammarSpec.

In: a request's parsed body. Out: a GrammarSpec, None, or RequestError naming the field. Tools are in
parsers.tool_grammar. Knows nothing of compiling.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from jaxllm.core import GrammarSpec, RequestError
from jaxllm.engine.decoding import grammars
from serve.errors import ApiError, invalid

Maker = Callable[[Any, str], GrammarSpec]


def _json(value: Any, field: str) -> GrammarSpec:
    """A schema, also as JSON text, as vLLM takes it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RequestError(field, value, "must be a JSON schema") from None
    return grammars.json_schema(value, field)


MAKERS: dict[str, Maker] = {
    "json": _json,
    "regex": grammars.regex,
    "choice": grammars.choice,
    "grammar": grammars.grammar,
    "json_object": lambda value, field: grammars.json_object(field),
    "structural_tag": grammars.structural_tag,
}


def grammar_of(body: Mapping[str, Any]) -> GrammarSpec | None:
    """None: any text. At most one of the ways to ask may be used."""
    asked: list[GrammarSpec] = []
    if body.get("response_format") is not None:
        asked += [spec for spec in [_response_format(body["response_format"])] if spec is not None]
    for name in ("json", "regex", "choice", "grammar"):
        if body.get(f"guided_{name}") is not None:
            asked.append(MAKERS[name](body[f"guided_{name}"], f"guided_{name}"))
    options = body.get("structured_outputs")
    if options is not None:
        if not isinstance(options, Mapping):
            raise RequestError("structured_outputs", options, "must be a JSON object")
        for name, value in options.items():
            if value in (None, False):
                continue  # also vLLM's switches, when they are off
            if name not in MAKERS:
                raise RequestError("structured_outputs", name, f"must be one of {', '.join(MAKERS)}")
            asked.append(MAKERS[name](value, f"structured_outputs.{name}"))
    if len(asked) > 1:
        both = " and ".join(spec.field for spec in asked[:2])
        raise RequestError(asked[1].field, "given", f"only one of {both} may be given")
    return asked[0] if asked else None


def _response_format(value: Any) -> GrammarSpec | None:
    field = "response_format"
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return grammars.json_object(field)
    if kind == "json_schema":
        named = value.get("json_schema")
        if not isinstance(named, Mapping) or "schema" not in named:
            raise RequestError(f"{field}.json_schema", named, 'must be {"name": ..., "schema": {...}}')
        return grammars.json_schema(named["schema"], field, strict=named.get("strict") is True)
    if kind == "structural_tag":
        return grammars.structural_tag(value, field)
    if kind in ("regex", "grammar"):
        return MAKERS[kind](value.get("pattern" if kind == "regex" else "grammar"), field)
    allowed = "must be of type text, json_object, json_schema, structural_tag, regex or grammar"
    raise RequestError(field, value, allowed)


def flat_format(form: Any, field: str, kinds: Collection[str], strict: bool = False) -> GrammarSpec | None:
    """A response_format whose schema stands one step up, as `field` of Responses and of Messages has it; ApiError names
    that field. `kinds`: those of `type` it knows; `strict`: where it does not say."""
    param = field.partition(".")[0]
    if not isinstance(form, dict) or form.get("type") not in kinds:
        raise invalid(param, f"{field} must be an object of type {', '.join(kinds)}")
    if form["type"] == "json_schema":
        form = {"type": "json_schema", "json_schema": {"strict": strict, **form}}
    try:
        spec = _response_format(form)
    except RequestError as error:
        raise ApiError(400, f"{field}: {error.allowed}", param=param, code="invalid_schema") from None
    return None if spec is None else replace(spec, field=param)
