"""Grammars and tool calls through the whole server: what is asked for is what comes, whole and streamed.

The runner picks among the tokens that the mask allows, so an answer can only be right because the mask was.
"""

import json

import pytest
from helpers.server import Server, settings

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "big": {"type": "boolean"}},
    "required": ["colour", "big"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA, "strict": True}} for name in ("paint", "buy")
]


@pytest.fixture(scope="module")
def server():
    with Server(settings(tool_parser="hermes"), step_s=0.0005) as running:
        yield running
        running.check_a()


def checked(text):
    thing = json.loads(text)
    assert set(thing) == {"colour", "big"}
    assert thing["colour"] in ("red", "green")
    return thing


def test_a_schema_is_obeyed_whole_streamed_with_logprobs_and_n(server):
    fields = dict(response_format=FORMAT, max_tokens=200)
    answer = server.chat(n=3, logprobs=True, **fields).json()
    for choice in answer["choices"]:
        checked(choice["message"]["content"])
        assert choice["finish_reason"] == "stop"
        assert choice["logprobs"]["content"]
    body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, **fields}
    events = server.events("/v1/chat/completions", body)
    streamed = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert streamed == answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("asked", "right"),
    [
        ({"guided_regex": "[a-f]{4}-[0-9]{2}"}, lambda text: len(text) == 7 and text[4] == "-"),
        ({"guided_choice": ["north", "south"]}, lambda text: text in ("north", "south")),
        ({"guided_json": SCHEMA}, checked),
        ({"structured_outputs": {"choice": ["a", "b"]}}, lambda text: text in ("a", "b")),
        ({"guided_grammar": 'start: "<" ("x" | "y") ">"'}, lambda text: text in ("<x>", "<y>")),
    ],
    ids=["regex", "choice", "json", "structured_outputs", "grammar"],
)
def test_every_way_to_ask_for_a_form_is_obeyed(server, asked, right):
    choice = server.complete(max_tokens=200, **asked).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert right(choice["text"])


def test_two_ways_at_once_are_refused(server):
    answer = server.complete(guided_regex="a", guided_choice=["b"])
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_schema"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "buy"}}], ids=str)
def test_a_forced_call_is_made_alike_whole_and_streamed(server, choice):
    fields = dict(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_tokens=300)
    answer = server.chat(**fields).json()["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] in (["buy"] if isinstance(choice, dict) else ["paint", "buy"])
    checked(call["function"]["arguments"])
    body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, **fields}
    events = server.events("/v1/chat/completions", body)
    deltas = [event["choices"][0] for event in events[:-1]]
    assert deltas[0]["delta"]["role"] == "assistant"
    assert deltas[-1]["finish_reason"] == "tool_calls"
    parts = [part for delta in deltas for part in delta["delta"].get("tool_calls", ())]
    assert parts[0]["function"]["name"] == call["function"]["name"]
    assert "".join(part["function"]["arguments"] for part in parts) == call["function"]["arguments"]


def test_tools_that_are_not_to_be_called_change_nothing(server):
    plain = server.chat().json()["choices"][0]["message"]["content"]
    assert server.chat(tools=TOOLS, tool_choice="none").json()["choices"][0]["message"]["content"] == plain


def test_a_model_without_a_format_for_calls_says_so():
    with Server() as server:
        error = server.chat(tools=TOOLS).json()["error"]
        assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
