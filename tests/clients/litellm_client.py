"""litellm against the server at OPENAI_BASE_URL; LITELLM_LOCAL_MODEL_COST_MAP keeps it from asking the network."""

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from said import CITY, EXTRACT, FORMAT, MODEL, QUESTION, TOOL, run

where = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": "none"}
greedy = {"model": f"hosted_vllm/{MODEL}", "temperature": 0, "max_tokens": 64, **where}


def chat():
    plain = litellm.completion(messages=QUESTION, **{**greedy, "model": f"openai/{MODEL}"})
    answer = litellm.completion(messages=QUESTION, **greedy)
    assert plain.choices[0].message.content == answer.choices[0].message.content
    return answer.choices[0].message.content


def stream():
    chunks = litellm.completion(messages=QUESTION, stream=True, stream_options={"include_usage": True}, **greedy)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat()
    return text


def tools():
    (call,) = litellm.completion(messages=CITY, tools=[TOOL], **greedy).choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"]
    forced = litellm.completion(messages=QUESTION, tools=[TOOL], tool_choice="required", **greedy)
    assert forced.choices[0].message.tool_calls[0].function.name == "get_weather"
    return call.function.name, call.function.arguments


def json_schema():
    answer = litellm.completion(messages=EXTRACT, response_format=FORMAT, **greedy)
    found = json.loads(answer.choices[0].message.content)
    assert set(found) == {"name", "age"}
    return found


def logprobs():
    answer = litellm.completion(messages=QUESTION, logprobs=True, top_logprobs=2, **greedy)
    content = answer.choices[0].logprobs.content
    assert all(len(one.top_logprobs) == 2 for one in content)
    return len(content)


def embeddings():
    data = litellm.embedding(model=f"openai/{MODEL}", input=["one text", "another"], **where).data
    assert len(data) == 2
    return len(data[0]["embedding"])


if __name__ == "__main__":
    run("litellm", [chat, stream, tools, json_schema, logprobs, embeddings])
