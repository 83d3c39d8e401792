"""The openai package against the server at OPENAI_BASE_URL."""

import json

import openai
from openai import OpenAI
from pydantic import BaseModel
from said import CITY, EXTRACT, FORMAT, MODEL, QUESTION, TOOL, run

client = OpenAI(max_retries=0)
greedy = {"model": MODEL, "temperature": 0, "max_completion_tokens": 64}


def models():
    assert [one.id for one in client.models.list()] == [MODEL]
    return client.models.retrieve(MODEL).id


def chat():
    answer = client.chat.completions.create(messages=QUESTION, **greedy)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    return answer.choices[0].message.content


def stream():
    chunks = list(
        client.chat.completions.create(messages=QUESTION, stream=True, stream_options={"include_usage": True}, **greedy)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat()
    assert chunks[-1].usage.completion_tokens > 0
    return text


def tools_auto():
    answer = client.chat.completions.create(messages=CITY, tools=[TOOL], **greedy)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert json.loads(call.function.arguments)["city"]
    return call.function.name, call.function.arguments


def tools_required():
    answer = client.chat.completions.create(messages=QUESTION, tools=[TOOL], tool_choice="required", **greedy)
    call = answer.choices[0].message.tool_calls[0]
    assert list(json.loads(call.function.arguments)) == ["city"]
    return call.function.arguments


def tools_streamed_and_answered():
    arguments = ""
    with client.chat.completions.stream(messages=CITY, tools=[TOOL], **greedy) as events:
        for event in events:
            if event.type == "tool_calls.function.arguments.delta":
                arguments += event.arguments_delta
        final = events.get_final_completion().choices[0].message
    (call,) = final.tool_calls
    assert arguments == call.function.arguments
    function = {"name": call.function.name, "arguments": arguments}
    said = {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": function}]}
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"weather": "rain"}'}
    answer = client.chat.completions.create(messages=[*CITY, said, result], tools=[TOOL], **greedy)
    return answer.choices[0].message.content


class Person(BaseModel):
    name: str
    age: int


def json_schema():
    answer = client.chat.completions.create(messages=EXTRACT, response_format=FORMAT, **greedy)
    found = json.loads(answer.choices[0].message.content)
    assert set(found) == {"name", "age"}
    return found


def json_schema_parsed():
    parsed = client.chat.completions.parse(messages=EXTRACT, response_format=Person, **greedy).choices[0].message.parsed
    assert isinstance(parsed, Person)
    return parsed


def logprobs():
    answer = client.chat.completions.create(messages=QUESTION, logprobs=True, top_logprobs=3, **greedy)
    content = answer.choices[0].logprobs.content
    assert all(len(one.top_logprobs) == 3 and one.logprob <= 0 for one in content)
    text = client.completions.create(model=MODEL, prompt="def add(a, b):", max_tokens=8, logprobs=2, temperature=0)
    assert len(text.choices[0].logprobs.tokens) == 8
    return [one.token for one in content]


def embeddings():
    packed = client.embeddings.create(model=MODEL, input=["one text", "another"])  # base64 on the way
    plain = client.embeddings.create(model=MODEL, input=["one text", "another"], encoding_format="float")
    assert len(packed.data) == len(plain.data) == 2
    assert abs(sum(x * x for x in packed.data[0].embedding) - 1) < 1e-3
    assert max(abs(a - b) for a, b in zip(packed.data[1].embedding, plain.data[1].embedding)) < 1e-6
    return len(plain.data[0].embedding)


def responses():
    answer = client.responses.create(model=MODEL, input="Hello!", temperature=0, max_output_tokens=64)
    again = client.responses.retrieve(answer.id)
    assert again.output_text == answer.output_text
    events = list(client.responses.create(model=MODEL, input="Hello!", temperature=0, stream=True))
    assert events[-1].response.output_text == answer.output_text
    return answer.output_text


def responses_call_tools():
    tool = {"type": "function", **TOOL["function"], "strict": True}
    asked = {"model": MODEL, "tools": [tool], "temperature": 0, "max_output_tokens": 64}
    with client.responses.stream(input=CITY[0]["content"], **asked) as events:
        arguments = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
        answer = events.get_final_response()
    (call,) = [item for item in answer.output if item.type == "function_call"]
    assert arguments == call.arguments
    assert json.loads(arguments)["city"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"weather": "rain"}'}
    kept = client.responses.create(input=[result], previous_response_id=answer.id, **asked)
    said = [item.model_dump(exclude={"parsed_arguments", "parsed"}) for item in answer.output]
    again = client.responses.create(input=[*CITY, *said, result], **asked)
    assert kept.output_text == again.output_text
    return call.name, arguments, kept.output_text


def refused(kind, **fields):
    try:
        client.chat.completions.create(messages=QUESTION, **fields)
    except kind as error:
        return error.param, error.code
    raise AssertionError(f"{fields} was accepted")


def errors_name_the_field():
    assert refused(openai.BadRequestError, model=MODEL, temperature=3) == ("temperature", "out_of_range")
    return refused(openai.NotFoundError, model="gpt-9")


if __name__ == "__main__":
    run(
        "openai",
        [
            *(models, chat, stream, tools_auto, tools_required, tools_streamed_and_answered, json_schema),
            *(json_schema_parsed, logprobs, embeddings, responses, responses_call_tools, errors_name_the_field),
        ],
    )
