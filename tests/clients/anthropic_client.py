"""The anthropic package against the same server; its base URL is the server's without /v1."""

import json
import os

import anthropic
from said import CITY, EXTRACT, MODEL, QUESTION, SCHEMA, TOOL, run

url = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")
client = anthropic.Anthropic(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=0)
greedy = {"model": MODEL, "max_tokens": 64, "extra_body": {"temperature": 0}}  # 2.x has no temperature of its own
function = TOOL["function"]
tool = {"name": function["name"], "description": function["description"], "input_schema": function["parameters"]}


def messages():
    answer = client.messages.create(messages=QUESTION, **greedy)
    assert answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens > 0
    return answer.content[0].text


def stream():
    with client.messages.stream(messages=QUESTION, **greedy) as events:
        text = "".join(events.text_stream)
        final = events.get_final_message()
    assert text == final.content[0].text == messages()
    return final.stop_reason


def tool_use():
    answer = client.messages.create(messages=CITY, tools=[tool], **greedy)
    assert answer.stop_reason == "tool_use"
    (use,) = [block for block in answer.content if block.type == "tool_use"]
    assert use.input["city"]
    return use.name, use.input


def tool_use_streamed_and_answered():
    with client.messages.stream(messages=CITY, tools=[tool], **greedy) as events:
        said = events.get_final_message()
    (use,) = [block for block in said.content if block.type == "tool_use"]
    assert use.input == tool_use()[1]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": '{"weather": "rain"}'}
    turns = [*CITY, {"role": "assistant", "content": said.content}, {"role": "user", "content": [result]}]
    return client.messages.create(messages=turns, tools=[tool], **greedy).content[0].text


def any_tool():
    answer = client.messages.create(messages=QUESTION, tools=[tool], tool_choice={"type": "any"}, **greedy)
    uses = [block for block in answer.content if block.type == "tool_use"]
    assert all(list(use.input) == ["city"] for use in uses[:-1])  # the last may be cut
    return len(uses), answer.stop_reason


def json_schema():
    form = {"type": "json_schema", "schema": SCHEMA}
    answer = client.messages.create(messages=EXTRACT, output_config={"format": form}, **greedy)
    found = json.loads(answer.content[0].text)
    assert set(found) == {"name", "age"}
    return found


def count_tokens():
    counted = client.messages.count_tokens(model=MODEL, messages=CITY, tools=[tool]).input_tokens
    used = client.messages.create(messages=CITY, tools=[tool], **greedy).usage
    assert counted == used.input_tokens + used.cache_read_input_tokens
    return counted


def errors_name_the_field():
    try:
        client.messages.create(messages=QUESTION, **{**greedy, "extra_body": {"temperature": 3}})
    except anthropic.BadRequestError as error:
        return error.body["error"]["type"], error.body["error"]["message"]
    raise AssertionError("temperature 3 was accepted")


if __name__ == "__main__":
    checks = [messages, stream, tool_use, tool_use_streamed_and_answered, any_tool, json_schema, count_tokens]
    run("anthropic", [*checks, errors_name_the_field])
