"""The ways to ask for a grammar, and what is wrong with each."""

import json

import pytest

from jaxllm.core import GrammarKind, RequestError
from serve.openai.structured import grammar_of

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
NAMED = {"name": "x", "schema": SCHEMA}
TAG = {"type": "structural_tag", "format": {"type": "any_text"}}

ASKED = [
    ({}, None, None),
    ({"response_format": {"type": "text"}}, None, None),
    ({"response_format": {"type": "json_object"}}, GrammarKind.JSON_SCHEMA, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, GrammarKind.JSON_SCHEMA, "response_format"),
    ({"response_format": TAG}, GrammarKind.TAGS, "response_format"),
    ({"response_format": {"type": "regex", "pattern": "a"}}, GrammarKind.REGEX, "response_format"),
    ({"response_format": {"type": "grammar", "grammar": 'start: "a"'}}, GrammarKind.LARK, "response_format"),
    ({"guided_json": SCHEMA}, GrammarKind.JSON_SCHEMA, "guided_json"),
    ({"guided_json": json.dumps(SCHEMA)}, GrammarKind.JSON_SCHEMA, "guided_json"),
    ({"guided_regex": "a+"}, GrammarKind.REGEX, "guided_regex"),
    ({"guided_choice": ["a", "b"]}, GrammarKind.LARK, "guided_choice"),
    ({"guided_grammar": 'root ::= "a"'}, GrammarKind.LARK, "guided_grammar"),
    ({"structured_outputs": {"json": SCHEMA}}, GrammarKind.JSON_SCHEMA, "structured_outputs.json"),
    ({"structured_outputs": {"choice": ["a"], "regex": None}}, GrammarKind.LARK, "structured_outputs.choice"),
    ({"structured_outputs": {"json_object": True}}, GrammarKind.JSON_SCHEMA, "structured_outputs.json_object"),
    ({"structured_outputs": {"json_object": False, "disable_any_whitespace": False}}, None, None),
]


@pytest.mark.parametrize(("body", "kind", "field"), ASKED)
def test_every_way_to_ask_gives_its_grammar_and_keeps_its_name(body, kind, field):
    spec = grammar_of(body)
    assert (kind, field) == (None, None) if spec is None else (spec.kind, spec.field) == (kind, field)


def test_a_schema_is_strict_only_when_it_says_so():
    for strict in (True, False):
        form = {"type": "json_schema", "json_schema": {**NAMED, "strict": strict}}
        spec = grammar_of({"response_format": form})
        assert spec is not None
        assert spec.lenient is not strict


REFUSED = [
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "yaml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, "response_format"),
    ({"response_format": {"type": "regex"}}, "response_format"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": "[" * 100_000}, "guided_json"),
    ({"guided_choice": "ab"}, "guided_choice"),
    ({"guided_regex": 3}, "guided_regex"),
    ({"structured_outputs": []}, "structured_outputs"),
    ({"structured_outputs": {"jsn": SCHEMA}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}}, "structured_outputs"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
]


@pytest.mark.parametrize(("body", "field"), REFUSED)
def test_what_is_wrong_is_refused_by_its_name(body, field):
    with pytest.raises(RequestError) as caught:
        grammar_of(body)
    assert caught.value.field == field
