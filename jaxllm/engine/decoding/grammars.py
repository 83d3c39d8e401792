"""GrammarSpecs from what users send: JSON schemas, regexes, choices, Lark or GBNF grammars, structural tags.

In: parsed JSON or text, and the name of the field it came in. Out: a GrammarSpec within the limits below, or a
RequestError that names the field. Everything here is a look at the source, in time linear in its size: nothing is
compiled, fetched or evaluated. Knows nothing of tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

from jaxllm.core import GrammarKind, GrammarSpec, RequestError

MAX_SOURCE_BYTES = 64 * 1024
MAX_REGEX_BYTES = 8 * 1024  # a mask of `a?a?a?...` takes time that grows with the square of its length
MAX_PROPERTIES = 1000
MAX_DEPTH = 64
MAX_LARK_RULES = 1000  # the compiler recurses through chains of rules
MAX_CHOICES = 1000
MAX_NUMBER = 2.0**53
MAX_MULTIPLE_OF = 1000  # its automaton has as many states
PROPERTY_KEYWORDS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def json_object(field: str = "response_format") -> GrammarSpec:
    """Any JSON object."""
    return json_schema({"type": "object"}, field)


def json_schema(
    schema: Mapping[str, Any] | bool, field: str = "response_format", *, strict: bool = True
) -> GrammarSpec:
    """Text that the schema accepts. Not strict: keywords that cannot be enforced are ignored instead of refused."""
    if not isinstance(schema, Mapping | bool):
        raise RequestError(field, schema, "the schema must be a JSON object")
    check_schema(schema, field)
    return _spec(GrammarKind.JSON_SCHEMA, _dump(schema, field), field, lenient=not strict)


def regex(pattern: str, field: str = "guided_regex") -> GrammarSpec:
    """Text that the whole pattern matches."""
    _text(field, pattern)
    if len(pattern.encode()) > MAX_REGEX_BYTES:
        raise RequestError(field, f"{len(pattern.encode())} bytes", f"a regex has at most {MAX_REGEX_BYTES}")
    return _spec(GrammarKind.REGEX, pattern, field)


def choice(options: SequenceOf[str], field: str = "guided_choice") -> GrammarSpec:
    """One of the texts."""
    if isinstance(options, str) or not isinstance(options, SequenceOf) or not 1 <= len(options) <= MAX_CHOICES:
        raise RequestError(field, options, f"must be a list of 1 to {MAX_CHOICES} strings")
    for option in options:
        _text(field, option)
        if not option:
            raise RequestError(field, option, "every choice must have at least one character")
    return _spec(GrammarKind.LARK, "start: " + " | ".join(json.dumps(option) for option in options), field)


def grammar(text: str, field: str = "guided_grammar") -> GrammarSpec:
    """A context-free grammar in Lark, or in GBNF (recognised by its `::=`)."""
    _text(field, text)
    spec = _spec(GrammarKind.LARK, text, field)
    if "::=" in text:
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            spec = _spec(GrammarKind.LARK, any_to_lark(text), field)
        except RequestError:
            raise
        except Exception as error:  # the converter raises its own kind and, on odd input, others
            raise RequestError(field, text, f"not a GBNF grammar: {str(error)[:200]}") from None
    if sum(":" in line for line in spec.source.splitlines()) > MAX_LARK_RULES:
        raise RequestError(field, text, f"a grammar has at most {MAX_LARK_RULES} rules")
    _check_brackets(spec.source, field)
    return spec


def structural_tag(value: Mapping[str, Any], field: str = "response_format") -> GrammarSpec:
    """Constrained stretches in free text; {"structures", "triggers"} or {"format": {"type": ...}} as in vLLM.

    Format types: const_string, json_schema, regex, grammar, any_text, sequence, or, tag, triggered_tags,
    tags_with_separator.
    """
    if not isinstance(value, Mapping):
        raise RequestError(field, value, "a structural tag must be a JSON object")
    form = value.get("format", _from_structures(value) if "structures" in value else None)
    if not isinstance(form, Mapping):
        raise RequestError(field, value, 'a structural tag needs "format", or "structures" and "triggers"')
    _measure(form, field, depth_limit=2 * MAX_DEPTH)
    check_format(form, field)
    return _spec(GrammarKind.TAGS, _dump(form, field), field)


def after_thinking(spec: GrammarSpec, start: str, end: str, *, inside: bool) -> GrammarSpec:
    """The same grammar, applied after the model's thinking.

    `inside`: the prompt opened the block, so it must end before the grammar begins. Else a block may come first.
    """
    contents = {
        GrammarKind.JSON_SCHEMA: lambda: {
            "type": "json_schema",
            "json_schema": json.loads(spec.source),
            "lenient": spec.lenient,
        },
        GrammarKind.REGEX: lambda: {"type": "regex", "pattern": spec.source},
        GrammarKind.LARK: lambda: {"type": "grammar", "grammar": spec.source},
        GrammarKind.TAGS: lambda: json.loads(spec.source),
    }
    space = {"type": "regex", "pattern": r"\s{0,2}"}
    thoughts = {"type": "tag", "begin": "" if inside else start, "content": {"type": "any_text"}, "end": end}
    block = {"type": "sequence", "elements": [thoughts, space]}
    optional = block if inside else {"type": "or", "elements": [block, {"type": "const_string", "value": ""}]}
    form = {"type": "sequence", "elements": [optional, contents[spec.kind]()]}
    return _spec(GrammarKind.TAGS, _dump(form, spec.field), spec.field)


def spec_key(spec: GrammarSpec) -> str:
    """Specs with one key compile to the same grammar, whatever field they came in."""
    return hashlib.sha256(f"{spec.kind}\0{spec.lenient:d}\0{spec.source}".encode()).hexdigest()


# ---- checks ----


def check_spec(spec: GrammarSpec) -> None:
    """What the makers above check, for a spec that came some other way (from another process, say)."""
    if spec.kind in (GrammarKind.JSON_SCHEMA, GrammarKind.TAGS):
        try:
            value = json.loads(spec.source)
        except (ValueError, RecursionError):
            raise RequestError(spec.field, spec.source, "not JSON, or nested too deeply") from None
        structural_tag({"format": value}, spec.field) if spec.kind is GrammarKind.TAGS else check_schema(
            value, spec.field
        )
    elif spec.kind is GrammarKind.REGEX:
        regex(spec.source, spec.field)
    else:
        grammar(spec.source, spec.field)


def check_schema(schema: Any, field: str) -> None:
    """Size, depth, number of properties, references: whatever the schema would do to the compiler."""
    if not isinstance(schema, Mapping | bool):
        raise RequestError(field, schema, "the schema must be a JSON object")
    properties = 0
    for value in _measure(schema, field):
        for keyword in PROPERTY_KEYWORDS & value.keys():
            properties += len(value[keyword]) if isinstance(value[keyword], Mapping) else 0
        reference = value.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            raise RequestError(field, reference, "a $ref must point into the same schema (#/...)")
        multiple = value.get("multipleOf")
        if isinstance(multiple, int | float) and not 1 / MAX_MULTIPLE_OF <= abs(multiple) <= MAX_MULTIPLE_OF:
            raise RequestError(field, multiple, f"multipleOf must be in [1/{MAX_MULTIPLE_OF}, {MAX_MULTIPLE_OF}]")
        pattern = value.get("pattern")
        if isinstance(pattern, str) and len(pattern.encode()) > MAX_REGEX_BYTES:
            raise RequestError(field, f"{len(pattern)} characters", f"a pattern has at most {MAX_REGEX_BYTES} bytes")
        if "x-guidance" in value:
            raise RequestError(field, "x-guidance", "is not a keyword of JSON schemas")
    if properties > MAX_PROPERTIES:
        raise RequestError(field, f"{properties} properties", f"a schema has at most {MAX_PROPERTIES}")


def _measure(root: Any, field: str, depth_limit: int = MAX_DEPTH) -> list[Mapping[str, Any]]:
    """Every object in a JSON value, outermost first; refuses what is too deep, or no JSON. Does not recurse."""
    found: list[Mapping[str, Any]] = []
    left: list[tuple[Any, int]] = [(root, 1)]
    nodes = 1
    while left:
        value, depth = left.pop()
        if depth > depth_limit:
            raise RequestError(field, f"depth over {depth_limit}", f"must be nested at most {depth_limit} deep")
        nodes += len(value) if isinstance(value, Mapping | list | tuple) else 0
        if nodes > MAX_SOURCE_BYTES:  # each takes at least a byte; known before any of them is looked at
            raise RequestError(field, "too large", f"must have at most {MAX_SOURCE_BYTES} bytes")
        if isinstance(value, Mapping):
            found.append(value)
            left += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list | tuple):
            left += [(inner, depth + 1) for inner in value]
        elif isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) <= MAX_NUMBER:
            raise RequestError(field, value, "numbers must be within 2^53")
        elif isinstance(value, str):
            _text(field, value)
        elif value is not None and not isinstance(value, bool | int | float):
            raise RequestError(field, value, "must hold JSON values only")
    return found


def check_format(form: Mapping[str, Any], field: str) -> None:
    """A structural tag's format: known types with the fields they need; what they hold is checked as on its own."""
    kind = form.get("type")

    def need(name: str, *types: type) -> Any:
        if not isinstance(form.get(name), types):
            raise RequestError(field, form.get(name), f"a structural tag of type {kind} needs {name!r}")
        return form[name]

    def children(name: str) -> None:
        parts = need(name, list)
        if not parts:
            raise RequestError(field, parts, f"{name!r} of a structural tag must not be empty")
        for part in parts:
            if not isinstance(part, Mapping):
                raise RequestError(field, part, f"entries of {name!r} must be JSON objects")
            check_format(part, field)

    if kind == "const_string":
        need("value", str)
    elif kind == "json_schema":
        check_schema(need("json_schema", Mapping, bool), field)
    elif kind == "regex":
        regex(need("pattern", str), field)
    elif kind == "grammar":
        grammar(need("grammar", str), field)
    elif kind in ("sequence", "or"):
        children("elements")
    elif kind == "tag":
        need("begin", str)
        need("end", str)
        check_format(need("content", Mapping), field)
    elif kind == "triggered_tags":
        children("tags")
        triggers = need("triggers", list)
        for tag in form["tags"]:
            begin = tag.get("begin")
            if not any(isinstance(t, str) and t and str(begin).startswith(t) for t in triggers):
                raise RequestError(field, begin, "a tag must begin with one of the triggers")
    elif kind == "tags_with_separator":
        children("tags")
        need("separator", str)
    elif kind != "any_text":
        raise RequestError(field, kind, "is not a type of structural tag")
    if kind in ("triggered_tags", "tags_with_separator") and any(tag.get("type") != "tag" for tag in form["tags"]):
        raise RequestError(field, form["tags"], f"the tags of {kind} must be of type tag")


def _from_structures(value: Mapping[str, Any]) -> Mapping[str, Any]:
    structures = value["structures"] if isinstance(value["structures"], list) else []
    tags = [
        {
            "type": "tag",
            "begin": one.get("begin"),
            "content": {"type": "json_schema", "json_schema": one.get("schema", {})},
            "end": one.get("end"),
        }
        for one in structures
        if isinstance(one, Mapping)
    ]
    return {"type": "triggered_tags", "triggers": value.get("triggers"), "tags": tags}


def _check_brackets(text: str, field: str) -> None:
    depth = 0
    for character in text:
        depth = depth + 1 if character in "([{" else max(0, depth - 1) if character in ")]}" else depth
        if depth > MAX_DEPTH:
            raise RequestError(field, f"depth over {MAX_DEPTH}", f"brackets must nest at most {MAX_DEPTH} deep")


def _text(field: str, value: object) -> None:
    if not isinstance(value, str):
        raise RequestError(field, value, "must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(field, value, "must be Unicode: it holds a lone surrogate") from None


def _dump(value: Any, field: str) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _spec(kind: GrammarKind, source: str, field: str, *, lenient: bool = False) -> GrammarSpec:
    size = len(source.encode())
    if size > MAX_SOURCE_BYTES:
        raise RequestError(field, f"{size} bytes", f"must have at most {MAX_SOURCE_BYTES}")
    return GrammarSpec(kind, source, field, lenient)
