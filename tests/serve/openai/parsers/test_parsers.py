"""Tool and reasoning parsers: what they make of real outputs, the same however the text is cut, in linear time."""

import json
from itertools import pairwise

import pytest
from helpers.output_corpus import CALLS, DS, NAMES, REASONED, ds_v3
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.openai.parsers.events import CallArguments, CallStart, Text, collect, openai_delta
from serve.openai.parsers.output import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    OutputParser,
    guess_parsers,
    starts_in_reasoning,
)

PARSERS = ["hermes", "llama3_json", "mistral", "deepseek_v3", "pythonic"]


def parser(tools=None, reasoning=None, inside=False):
    ids = iter(range(1000))
    return OutputParser(tools, reasoning, inside=inside, tool_names=NAMES, new_id=lambda: f"id{next(ids)}")


def streamed(made, pieces):
    return collect([event for piece in pieces for event in made.feed(piece)] + made.finish())


def cut(text, places):
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@pytest.mark.parametrize(("name", "text", "content", "calls"), CALLS)
def test_tool_calls_and_text_are_told_apart(name, text, content, calls):
    found = parser(name).parse(text)
    assert (found.content, [(call.name, call.arguments) for call in found.tool_calls]) == (content, calls)


@pytest.mark.parametrize(("name", "inside", "text", "reasoning", "content"), REASONED)
def test_reasoning_and_answer_are_told_apart(name, inside, text, reasoning, content):
    found = parser(None, name, inside).parse(text)
    assert (found.reasoning, found.content) == (reasoning, content)


CORPUS = [(name, None, False, text) for name, text, _, _ in CALLS]
CORPUS += [("hermes", name, inside, text) for name, inside, text, _, _ in REASONED]
CORPUS += [(name, "qwen3", False, f"<think>\nhm {text}\n</think>\n\n{text}") for name, text, _, _ in CALLS]


@pytest.mark.parametrize(("tools", "reasoning", "inside", "text"), CORPUS)
def test_a_stream_of_single_characters_equals_the_whole(tools, reasoning, inside, text):
    made = parser(tools, reasoning, inside)
    assert streamed(made, text) == parser(tools, reasoning, inside).parse(text)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CORPUS), st.lists(st.integers(0, 10_000), max_size=12))
def test_however_the_corpus_is_cut_the_stream_equals_the_whole(one, places):
    tools, reasoning, inside, text = one
    assert streamed(parser(tools, reasoning, inside), cut(text, places)) == parser(tools, reasoning, inside).parse(text)


PYTHON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.from_regex(r"[a-z_]{1,5}", fullmatch=True), PYTHON, max_size=4), st.lists(st.integers(0, 10_000))
)
def test_any_python_literals_become_the_json_of_their_values(arguments, places):
    text = f"[f({', '.join(f'{key}={value!r}' for key, value in arguments.items())})]"
    found = streamed(parser("pythonic"), cut(text, places))
    assert found.content is None
    assert json.loads(found.tool_calls[0].arguments) == json.loads(json.dumps(arguments))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(), PYTHON, max_size=4), st.booleans(), st.booleans(), st.lists(st.integers(0, 10_000)))
def test_json_arguments_arrive_as_they_stand_also_when_encoded_twice(arguments, twice, ascii_only, places):
    written = json.dumps(arguments, ensure_ascii=ascii_only)
    value = json.dumps(written, ensure_ascii=ascii_only) if twice else written
    text = '<tool_call>{"name": "f", "arguments": ' + value + "}</tool_call>"
    assert streamed(parser("hermes"), cut(text, places)).tool_calls[0].arguments == written


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<think>", "</think>"),
    *(
        *DS.values(),
        '{"name": "f", "arguments": ',
        '{"name": "f", "parameters": ',
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        "\\u00e9",
    ),
    *(
        "\\ud83d",
        "```json\n",
        "\n",
        " ",
        ",",
        ":",
        ";",
        "f(",
        "a=",
        ")",
        "'",
        "1",
        "-1.5e3",
        "True",
        "null",
        "x",
        "é",
        "[f(a=",
    ),
]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(PARSERS),
    st.sampled_from([None, "qwen3", "deepseek_r1"]),
    st.booleans(),
    st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join),
    st.lists(st.integers(0, 10_000), max_size=12),
)
def test_whatever_a_model_writes_nothing_raises_and_stream_equals_whole(tools, reasoning, inside, text, places):
    found = streamed(parser(tools, reasoning, inside), cut(text, places))
    assert found == parser(tools, reasoning, inside).parse(text)
    if not found.tool_calls and reasoning is None:
        assert (found.content or "") == text


def dense(name, size):
    """Outputs that grow by `size` in everything that could be looked at twice."""
    filler = '{"q": "' + 'a\\"{[<' * size + '", "deep": ' + "[" * size + "]" * size + "}"
    return {
        "hermes": "<tool" * size
        + f'<tool_call>{{"name": "f", "x": {filler}, "arguments": {filler}}}</tool_call>' * 3
        + "<" * size,
        "llama3_json": f'{{"name": "f", "x": {filler}, "parameters": {filler}}}; ' * 3 + "<|python_ta" * size,
        "mistral": "[TOOL" * size + f'[TOOL_CALLS][{{"name": "f", "arguments": {filler}}}]' + "[" * size,
        "deepseek_v3": "<｜tool" * size + f"{DS['calls▁begin']}{ds_v3('f', filler)}{DS['calls▁end']}" + "<" * size,
        "pythonic": "[f(a='" + "a\\'" * size + "', b=" + "[" * size + "]" * size + ", c=" + "[1, " * size,
    }[name]


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("piece", [1, 7, 10**9])
def test_twice_the_text_is_at_most_twice_the_work(name, piece):
    work = []
    for size in (500, 1000):
        text = "<think>" + "</thin" * size + "</think>" + dense(name, size)
        made = parser(name, "qwen3")
        streamed(made, [text[i : i + piece] for i in range(0, len(text), piece)])
        work.append((made.num_examined, len(text)))
    (before, short), (after, long) = work
    assert after / before <= 1.05 * long / short
    assert after < 40 * long


def test_a_long_name_that_never_ends_is_held_and_given_back():
    text = '<tool_call>{"name": "' + "x" * 10_000
    assert parser("hermes").parse(text).content == text


def test_arguments_are_streamed_while_they_arrive():
    made = parser("hermes")
    events = made.feed('Hi. <tool_call>{"name": "f", "arguments": {"city": "Os')
    assert events == [Text("Hi."), CallStart(0, "id0", "f"), CallArguments(0, '{"city": "Os')]
    assert made.feed("lo, No") == [CallArguments(0, "lo, No")]
    assert made.feed('rway"}}\n</tool_') == [CallArguments(0, 'rway"}')]
    assert made.feed("call>") + made.finish() == []


def test_python_arguments_are_streamed_as_json_while_they_arrive():
    made = parser("pythonic")
    assert made.feed("[f(city='Os") == [CallStart(0, "id0", "f"), CallArguments(0, '{"city": "Os')]
    assert made.feed("lo', n=1") == [CallArguments(0, 'lo", "n": ')]
    assert made.feed("2)]") + made.finish() == [CallArguments(0, "12}")]


def test_text_is_never_held_longer_than_a_marker_could_be():
    made = parser("hermes")
    assert made.feed("if a <") == [Text("if a")]
    assert made.feed(" b") == [Text(" < b")]


def test_deltas_have_the_shape_of_chat_completion_chunks():
    made = parser("hermes", "qwen3")
    text = '<think>so</think>Hi<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    deltas = [openai_delta(event) for event in made.feed(text) + made.finish()]
    assert deltas == [
        {"reasoning_content": "so"},
        {"content": "Hi"},
        {"tool_calls": [{"index": 0, "id": "id0", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
    ]


def test_calls_inside_reasoning_are_reasoning():
    text = '<think>I could <tool_call>{"name": "f"}</tool_call></think>No.'
    found = parser("hermes", "qwen3").parse(text)
    assert found.tool_calls == []
    assert found.content == "No."


def test_without_a_tool_parser_nothing_is_a_call_and_every_character_stays():
    text = '  <tool_call>{"name": "f", "arguments": {}}</tool_call>\n'
    assert parser().parse(text).content == text


def test_pythonic_arguments_are_json_whenever_they_are_complete():
    for name, text, _, calls in CALLS:
        if name == "pythonic" and text.endswith(("]", ">")) and "import" not in text:
            for (_, arguments), call in zip(calls, parser(name).parse(text).tool_calls):
                assert json.loads(arguments) == json.loads(call.arguments)


def test_ids_are_unique_and_mistral_gets_the_length_its_template_asks_for():
    text = '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "f", "arguments": {}}]'
    first, second = OutputParser("mistral").parse(text).tool_calls
    assert first.id != second.id
    assert len(first.id) == 9
    assert first.id.isalnum()
    other = OutputParser("hermes").parse('<tool_call>{"name": "f"}</tool_call>').tool_calls[0]
    assert other.id.startswith("call_")


def test_a_call_id_that_the_model_wrote_is_kept():
    assert parser("mistral").parse("[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{}").tool_calls[0].id == "abc123def"


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% if tools %}<tool_call>{% endif %}<think></think>", ("hermes", "qwen3")),
        ("<｜User｜>x<｜Assistant｜></think><｜tool▁calls▁begin｜>", ("deepseek_v3", "deepseek_r1")),
        ("[TOOL_CALLS]", ("mistral", None)),
        ("plain", (None, None)),
    ],
)
def test_a_template_shows_which_parsers_fit(template, found):
    assert guess_parsers(template) == found
    assert found[0] is None or found[0] in TOOL_PARSERS
    assert found[1] is None or found[1] in REASONING_PARSERS


@pytest.mark.parametrize(
    ("name", "prompt", "inside"),
    [
        (None, "<think>", False),
        ("qwen3", "user: hi\nassistant: <think>\n", True),
        ("qwen3", "user: what is <think>?\nassistant: ", False),
        ("qwen3", "assistant: <think>\n\n</think>\n\n", False),
        ("deepseek_r1", "assistant: ", True),
        ("deepseek_r1", "assistant: </think>", False),
    ],
)
def test_the_prompt_shows_whether_the_output_begins_inside_the_block(name, prompt, inside):
    assert starts_in_reasoning(name, prompt) is inside
