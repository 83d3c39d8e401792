"""Tools and reasoning by Responses and by Anthropic's Messages: one answer, whole and streamed, in the words of each.

Most answers are scripted, so that all kinds of blocks come; forced calls are the mask's work, as in chat.
"""

import json

import pytest
from helpers.byte_model import byte_tokenizer
from helpers.server import Server, settings

from serve.openai.parsers.blocks import Block, Blocks, message_of_blocks
from serve.openai.parsers.events import CallArguments, CallStart, Reasoning, Text
from serve.openai.protocol import ResponsesBody
from serve.openai.response_items import messages_of
from serve.openai.tools import ToolPlan
from serve.openai.turn import Turn

ARGUMENTS = {"city": "Paris"}
THOUGHT, SAID = "Where is it?", "Let me look."
CALLS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ANSWER = f"<think>\n{THOUGHT}\n</think>\n\n{SAID}\n{CALLS}\n{CALLS}"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"type": "function", "name": "weather", "description": "of a city", "parameters": SCHEMA, "strict": True}
TOOL = {"name": "weather", "description": "of a city", "input_schema": SCHEMA}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|turn|>{{ m.role }}:"
    "{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments | tojson }}){% endfor %}"
    "{% if m.tool_call_id %}<{{ m.tool_call_id }}>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:"
    "{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


def tokenizer():
    found = byte_tokenizer()
    found.templates["default"] = TEMPLATE
    return found


def server_of(**options):
    names = settings(tool_parser="hermes", reasoning_parser="qwen3")
    return Server(names, tokenizer=tokenizer(), context=2048, num_pages=512, **options)


@pytest.fixture(scope="module")
def scripted():
    with server_of(says=ANSWER) as running:
        yield running
        running.check_a()


@pytest.fixture(scope="module")
def server():
    with server_of() as running:
        yield running
        running.check_a()


def ask(**fields):
    return {"input": "weather in Paris?", "tools": [FUNCTION], "max_output_tokens": 400, "temperature": 0, **fields}


def say(**fields):
    messages = [{"role": "user", "content": "weather in Paris?"}]
    return {"messages": messages, "tools": [TOOL], "max_tokens": 400, "temperature": 0, **fields}


def without(item, *names):
    return {name: value for name, value in item.items() if name not in names}


# ---- responses ----


def test_a_response_is_reasoning_text_and_calls_in_the_order_they_came(scripted):
    made = scripted.post("/v1/responses", ask()).json()
    assert made["status"] == "completed"
    thought, text, first, second = made["output"]
    assert (thought["type"], thought["content"]) == ("reasoning", [{"type": "reasoning_text", "text": THOUGHT}])
    assert (text["type"], text["content"][0]["text"]) == ("message", SAID)
    for call in (first, second):
        assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "weather", ARGUMENTS)
    assert first["call_id"] != second["call_id"]
    assert len({item["id"] for item in made["output"]}) == 4
    details = made["usage"]["output_tokens_details"]
    assert details["reasoning_tokens"] == len(THOUGHT)  # one a byte
    assert made["tools"] == [FUNCTION]


def test_the_events_of_a_response_add_up_to_its_items(scripted):
    events = scripted.events("/v1/responses", ask())
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    final = events[-1]["response"]
    assert events[-1]["type"] == "response.completed"
    whole = scripted.post("/v1/responses", ask()).json()
    own = ("id", "call_id")
    assert [without(item, *own) for item in final["output"]] == [without(item, *own) for item in whole["output"]]
    for index, item in enumerate(final["output"]):
        mine = [event for event in events if event.get("output_index") == index]
        assert (mine[0]["type"], mine[-1]["type"]) == ("response.output_item.added", "response.output_item.done")
        assert mine[0]["item"]["status"] == "in_progress"
        assert mine[-1]["item"] == item
        assert all(event["item_id"] == item["id"] for event in mine[1:-1])
        grown = "".join(event["delta"] for event in mine if event["type"].endswith(".delta"))
        assert grown == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
        opened = [event["type"] for event in events].index
        assert opened("response.created") < opened("response.output_item.added")


def test_a_call_is_answered_in_the_next_turn_by_hand_or_by_the_server(scripted):
    made = scripted.post("/v1/responses", ask()).json()
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "rain"}
        for item in made["output"]
        if item["type"] == "function_call"
    ]
    kept = scripted.post("/v1/responses", ask(input=results, previous_response_id=made["id"])).json()
    items = [{"role": "user", "content": "weather in Paris?"}, *made["output"], *results]
    again = scripted.post("/v1/responses", ask(input=items)).json()
    assert kept["usage"]["input_tokens"] == again["usage"]["input_tokens"] > made["usage"]["input_tokens"]


def test_items_become_messages_with_one_of_the_assistants_for_what_it_did_in_a_row():
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "one moment"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {"role": "assistant", "content": "done"},
        {"role": "assistant", "content": "really"},
    ]
    before = [{"role": "assistant", "content": "before"}]
    found = messages_of(ResponsesBody(input=items, instructions="be kind"), before)
    calls = found[3].pop("tool_calls")
    assert [(call["id"], call["function"]["name"]) for call in calls] == [("c1", "f"), ("c2", "g")]
    assert found == [
        {"role": "system", "content": "be kind"},
        {"role": "assistant", "content": "before"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "one moment", "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "assistant", "content": "done"},
        {"role": "assistant", "content": "really"},
    ]
    assert before == [{"role": "assistant", "content": "before"}]


def test_calls_of_two_rounds_are_two_messages():
    items = []
    for call_id in ("c1", "c2"):
        items.append({"type": "function_call", "call_id": call_id, "name": "f", "arguments": "{}"})
        items.append({"type": "function_call_output", "call_id": call_id, "output": "1"})
    found = messages_of(ResponsesBody(input=items), [])
    assert [message["role"] for message in found] == ["assistant", "tool", "assistant", "tool"]
    assert [len(message.get("tool_calls", ())) for message in found] == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("tokens", "count"),
    [("<think>hello</think>abc", 5), ("hello</think>abc", 5), ("<think>hello", 5), ("hello", 5)],
    ids=["marked", "opened by the prompt", "cut", "opened and cut"],
)
def test_tokens_of_reasoning_are_counted_between_its_marks(tokens, count):
    named = tokenizer()
    named.rust.add_special_tokens(["<think>", "</think>"])
    turn = Turn(None, ToolPlan(reasoning_parser="qwen3"), "", named)
    assert turn.reasoning_tokens(named.encode(tokens), [Block(0, "reasoning", "hello")]) == count
    assert turn.reasoning_tokens(named.encode(tokens), [Block(0, "text", "hello")]) == 0


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}], ids=str)
def test_a_response_is_forced_to_call(choice):
    with Server(settings(tool_parser="hermes"), step_s=0.0005) as server:
        fields = ask(tool_choice=choice, parallel_tool_calls=False)
        (call,) = server.post("/v1/responses", fields).json()["output"]
        assert json.loads(call["arguments"])["city"] in ("Paris", "Rome")
        streamed = server.events("/v1/responses", fields)[-1]["response"]["output"]
        assert [item["arguments"] for item in streamed] == [call["arguments"]]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [FUNCTION, FUNCTION]}, "tools"),
        ({"tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"reasoning": {"effort": 3}}, "reasoning"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": 3}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_what_a_response_cannot_be_asked_is_refused_by_name(server, fields, param):
    answer = server.post("/v1/responses", ask(**fields))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


# ---- messages ----


def test_a_message_is_thinking_text_and_tool_use(scripted):
    made = scripted.post("/v1/messages", say()).json()
    assert made["stop_reason"] == "tool_use"
    thinking, text, first, second = made["content"]
    assert thinking == {"type": "thinking", "thinking": THOUGHT, "signature": ""}
    assert text == {"type": "text", "text": SAID}
    assert (first["type"], first["name"], first["input"]) == ("tool_use", "weather", ARGUMENTS)
    assert first["id"] != second["id"]


def test_the_events_of_a_message_add_up_to_its_blocks(scripted):
    whole = scripted.post("/v1/messages", say()).json()
    events = scripted.events("/v1/messages", say())
    kinds = [event["type"] for event in events]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert events[-2]["usage"] == whole["usage"]
    for index, block in enumerate(whole["content"]):
        mine = [event for event in events if event.get("index") == index]
        assert (mine[0]["type"], mine[-1]["type"]) == ("content_block_start", "content_block_stop")
        assert mine[0]["content_block"]["type"] == block["type"]
        deltas = [event["delta"] for event in mine[1:-1]]
        if block["type"] == "tool_use":
            assert mine[0]["content_block"]["input"] == {}
            assert json.loads("".join(delta["partial_json"] for delta in deltas)) == block["input"]
        else:
            key = {"thinking": "thinking", "text": "text"}[block["type"]]
            assert "".join(delta[key] for delta in deltas) == block[key]


def test_a_turn_with_results_is_the_prompt_that_chat_would_make(server):
    messages = [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "one moment"},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": ARGUMENTS},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "rain"}]},
                {"type": "text", "text": "and now?"},
            ],
        },
    ]
    function = {"name": "weather", "parameters": SCHEMA, "description": "of a city"}
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}
    chat = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "one moment", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "user", "content": "and now?"},
    ]
    fields = {"temperature": 0, "max_tokens": 4}
    tools = [{"type": "function", "function": function}]
    wanted = server.post("/v1/chat/completions", {"messages": chat, "tools": tools, **fields}).json()
    found = server.post("/v1/messages", say(messages=messages, **fields)).json()
    assert found["content"][0]["text"] == wanted["choices"][0]["message"]["content"]
    used = found["usage"]
    assert used["input_tokens"] + used["cache_read_input_tokens"] == wanted["usage"]["prompt_tokens"]
    counted = server.post("/v1/messages/count_tokens", without(say(messages=messages), "max_tokens")).json()
    assert counted == {"input_tokens": wanted["usage"]["prompt_tokens"]}


def test_one_call_at_a_time_is_the_first_of_those_that_came(scripted):
    one = {"disable_parallel_tool_use": True, "type": "auto"}
    for body, calls in ((say(tool_choice=one), 1), (say(), 2)):
        made = scripted.post("/v1/messages", body).json()
        assert [block["type"] for block in made["content"]] == ["thinking", "text", *["tool_use"] * calls]
        assert made["stop_reason"] == "tool_use"
        started = [e for e in scripted.events("/v1/messages", body) if e["type"] == "content_block_start"]
        assert len(started) == 2 + calls
    (call,) = [
        i for i in scripted.post("/v1/responses", ask(parallel_tool_calls=False)).json()["output"] if "name" in i
    ]
    assert json.loads(call["arguments"]) == ARGUMENTS
    tools = [{"type": "function", "function": without(FUNCTION, "type")}]
    chat = scripted.chat(tools=tools, parallel_tool_calls=False, max_tokens=400).json()["choices"][0]
    assert (len(chat["message"]["tool_calls"]), chat["finish_reason"]) == (1, "tool_calls")


def test_thinking_is_switched_off_by_the_template(server):
    def tokens(**fields):
        return server.post("/v1/messages/count_tokens", say(**fields)).json()["input_tokens"]

    off = tokens(thinking={"type": "disabled"}) - tokens(thinking={"type": "enabled", "budget_tokens": 1024})
    assert off == len("<think></think>")


def test_an_answer_goes_on_where_the_assistants_message_ends(server):
    begun = [{"role": "user", "content": "weather?"}, {"role": "assistant", "content": "It is"}]
    chat = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False, "temperature": 0}
    wanted = server.post("/v1/chat/completions", {**chat, "max_tokens": 4}).json()["choices"][0]["message"]["content"]
    found = server.post("/v1/messages", say(messages=begun, max_tokens=4, tools=None)).json()["content"][0]["text"]
    assert found == wanted


def test_a_call_that_is_cut_says_so():
    with server_of(says=CALLS) as server:
        made = server.post("/v1/messages", say(max_tokens=len(CALLS) - 30)).json()
        assert made["stop_reason"] == "max_tokens"
        assert [(block["type"], block["input"]) for block in made["content"]] == [("tool_use", {})]
        answer = server.post("/v1/responses", ask(max_output_tokens=len(CALLS) - 30)).json()
        assert [item["status"] for item in answer["output"]] == ["incomplete"]
        after = server.post("/v1/responses", ask(input="go on", previous_response_id=answer["id"]))
        assert after.status_code == 200, after.text


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}], ids=lambda c: c["type"])
def test_a_message_is_forced_to_use_a_tool(choice):
    with Server(settings(tool_parser="hermes"), step_s=0.0005) as server:
        made = server.post("/v1/messages", say(tool_choice={**choice, "disable_parallel_tool_use": True})).json()
        (block,) = made["content"]
        assert block["input"]["city"] in ("Paris", "Rome")
        assert made["stop_reason"] == "tool_use"


def test_a_message_obeys_a_schema_and_a_wrong_one_is_named():
    with Server(step_s=0.0005) as server:
        form = {"type": "json_schema", "schema": SCHEMA}
        made = server.post("/v1/messages", say(tools=None, output_config={"format": form})).json()
        assert json.loads(made["content"][0]["text"])["city"] in ("Paris", "Rome")
        for wrong in ({"type": "text"}, {"type": "json_schema"}, {**form, "schema": {"type": "nothing"}}):
            answer = server.post("/v1/messages", say(tools=None, output_config={"format": wrong}))
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "output_config"), answer.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools"),
        ({"tools": [{"name": "x y", "input_schema": SCHEMA}]}, "tools"),
        ({"tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}, "tools": []}, "tool_choice"),
        ({"tool_choice": {"type": "perhaps"}}, "tool_choice"),
        ({"thinking": {"type": "hard"}}, "thinking"),
        ({"output_config": {"effort": 3}}, "output_config"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "c"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]}, "messages"),
        ({"system": [{"type": "image"}]}, "system"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_what_a_message_cannot_be_asked_is_refused_by_name(server, path, fields, param):
    answer = server.post(path, say(**fields))
    assert (answer.status_code, answer.json()["type"]) == (400, "error"), answer.text
    assert answer.json()["error"]["param"] == param


def test_a_model_that_does_not_reason_is_not_asked_to():
    with Server() as server:
        answer = server.post("/v1/messages", say(tools=None, thinking={"type": "enabled", "budget_tokens": 1024}))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "thinking")


# ---- blocks ----


def test_a_text_after_a_call_is_a_block_of_its_own_and_nothing_is_one_empty_text():
    blocks = Blocks()
    events = [Reasoning("a"), Reasoning("b"), Text("c"), CallStart(0, "c1", "f"), CallArguments(0, "{}"), Text("d")]
    for _ in (*blocks.feed(events), *blocks.finish()):
        pass
    assert [(block.kind, block.text) for block in blocks.made] == [
        ("reasoning", "ab"),
        ("text", "c"),
        ("call", "{}"),
        ("text", "d"),
    ]
    message = message_of_blocks(blocks.made)
    assert (message["content"], message["reasoning_content"], len(message["tool_calls"])) == ("cd", "ab", 1)
    nothing = Blocks()
    assert [type(change).__name__ for change in nothing.finish()] == ["Opened", "Closed"]
    assert nothing.made[0].text == ""
