"""tool_choice required and named: whatever the grammar lets a model write, its parser reads as valid calls."""

import json
import random

import numpy as np
import pytest
from helpers.byte_tokenizer import EOS, VOCAB_SIZE, decode, encode, tokenizer_json

from jaxllm.core import RequestError
from jaxllm.engine.decoding.structured import TokenizerBridge, compile_spec
from serve.openai.parsers.output import TOOL_PARSERS, OutputParser
from serve.openai.parsers.tool_grammar import FORMS, TRIGGERS, check_tools, choose, strict_grammar, tool_grammar

CITY = {"enum": ["Oslo", "São Paulo"]}


def function(name, parameters=None):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = check_tools(
    [
        function(
            "get_weather",
            {
                "type": "object",
                "properties": {"city": CITY, "days": {"$ref": "#/$defs/days"}, "hot": {"type": "boolean"}},
                "required": ["city"],
                "additionalProperties": False,
                "$defs": {"days": {"enum": [1, 2, 3]}},
            },
        ),
        function("now"),
        function("maybe", {"type": "object", "properties": {"a": {"enum": [1]}, "b": {"type": "null"}}}),
    ]
)
REQUIRED = {"get_weather": {"city"}, "now": set(), "maybe": set()}


@pytest.fixture(scope="module")
def bridge():
    return TokenizerBridge(tokenizer_json(), VOCAB_SIZE, [EOS])


def write(spec, bridge, seed):
    """A text the grammar allows, chosen at random; None when it goes on for too long."""
    matcher, chosen, ids = compile_spec(spec, bridge).matcher(), random.Random(seed), []
    for _ in range(500):
        choices = np.flatnonzero(np.unpackbits(matcher.bits().view(np.uint8), bitorder="little")).tolist()
        token = EOS if EOS in choices and chosen.random() < 0.6 else chosen.choice(choices)
        if token == EOS:
            return decode(ids)
        assert matcher.advance(token)
        ids.append(token)
    return None


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("added", [(), ("[ARGS]",)])
def test_what_the_grammar_allows_is_read_as_calls_with_valid_arguments(name, added, bridge):
    spec = tool_grammar(name, TOOLS, added_tokens=added)
    texts = [text for text in (write(spec, bridge, seed) for seed in range(12)) if text is not None]
    assert len(texts) >= 6
    called = set()
    for text in texts:
        found = OutputParser(name, tool_names=REQUIRED).parse(text)
        assert found.content is None, text
        assert found.tool_calls, text
        for call in found.tool_calls:
            called.add(call.name)
            arguments = json.loads(call.arguments)
            assert arguments.keys() >= REQUIRED[call.name]
            if call.name == "get_weather":
                assert arguments["city"] in CITY["enum"]
                assert arguments.get("days", 1) in (1, 2, 3)
    assert len(called) >= 2


@pytest.mark.parametrize("name", FORMS)
def test_a_named_tool_without_parallel_calls_is_called_once(name, bridge):
    _, tools = choose(TOOLS, {"type": "function", "function": {"name": "now"}})
    spec = tool_grammar(name, tools, parallel=False)
    texts = {write(spec, bridge, seed) for seed in range(6)} - {None}
    assert texts
    for text in texts:
        assert [call.name for call in OutputParser(name, tool_names=REQUIRED).parse(text).tool_calls] == ["now"]


def test_the_usual_spelling_is_a_sentence_of_the_grammar(bridge):
    matcher = compile_spec(tool_grammar("hermes", TOOLS), bridge).matcher()
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
    assert all(matcher.advance(token) for token in encode(text))
    assert matcher.accepting


STRICT = check_tools(
    [{"type": "function", "function": {"name": "now", "parameters": {"enum": [{"a": 1}]}, "strict": True}}]
)


def allows(spec, text, bridge):
    matcher = compile_spec(spec, bridge).matcher()
    return all(matcher.advance(token) for token in encode(text)) and matcher.accepting


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_strict_tool_leaves_text_free_and_every_call_valid(name, bridge):
    spec = strict_grammar(name, STRICT)
    call = write(tool_grammar(name, STRICT, parallel=False), bridge, 0)
    assert '{"a":1}' in "".join(call.split())
    for text in ("", "No call < needed [1].", call, f"First: {call}", f"{call}\nand {call} done"):
        assert allows(spec, text, bridge), text
    for text in (call.replace("1}", "2}"), "Well " + call[: len(TRIGGERS[name]) + 2] + "x"):
        assert not allows(spec, text, bridge), text


def test_without_strict_tools_or_marks_text_is_not_constrained():
    assert strict_grammar("hermes", TOOLS) is None
    assert strict_grammar("pythonic", STRICT) is None


def test_every_tool_parser_has_a_grammar():
    assert FORMS.keys() == TOOL_PARSERS.keys()


BAD_TOOLS = {
    "1,000 tools": [function(f"f{i}") for i in range(1000)],
    "no tools": [],
    "not a list": "f",
    "no function": [{"type": "function"}],
    "another type": [{"type": "web_search"}],
    "name with newline": [function("a\nb")],
    "name with quote": [function('a"b')],
    "no name": [{"type": "function", "function": {}}],
    "same name twice": [function("f"), function("f")],
    "parameters a list": [function("f", [1])],
    "parameters too deep": [function("f", json.loads('{"items":' * 100 + "{}" + "}" * 100))],
    "remote reference": [function("f", {"$ref": "http://169.254.169.254/"})],
}


@pytest.mark.parametrize("tools", BAD_TOOLS.values(), ids=BAD_TOOLS.keys())
def test_bad_tools_are_refused_with_their_place(tools):
    with pytest.raises(RequestError) as caught:
        check_tools(tools)
    assert caught.value.field.startswith("tools")


def test_a_pattern_that_is_no_regex_is_refused_when_the_grammar_is_compiled(bridge):
    tools = check_tools([function("f", {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}})])
    with pytest.raises(RequestError) as caught:
        compile_spec(tool_grammar("hermes", tools), bridge)
    assert caught.value.field == "tools"


def test_tool_choice_says_whether_and_which():
    assert choose(TOOLS, None) == ("auto", TOOLS)
    assert choose([], None) == ("none", [])
    assert choose(TOOLS, "none") == ("none", [])
    assert choose(TOOLS, "required") == ("required", TOOLS)
    named = choose(TOOLS, {"type": "function", "function": {"name": "maybe"}})
    assert named == ("required", [TOOLS[2]])


@pytest.mark.parametrize("choice", ["sometimes", 3, {}, {"function": {"name": "nobody"}}, {"function": "now"}])
def test_a_tool_choice_that_names_none_is_refused(choice):
    with pytest.raises(RequestError, match="tool_choice"):
        choose(TOOLS, choice)
    with pytest.raises(RequestError, match="tool_choice"):
        choose([], "required")
