"""langchain-openai against the server at OPENAI_BASE_URL."""

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field
from said import CITY, EXTRACT, MODEL, QUESTION, run

model = ChatOpenAI(model=MODEL, temperature=0, max_tokens=64, max_retries=0)


@tool
def get_weather(city: str) -> str:
    """The weather in a city"""
    return f"rain in {city}"


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    age: int


def chat():
    answer = model.invoke(QUESTION)
    assert answer.usage_metadata["output_tokens"] > 0
    return answer.content


def stream():
    text = "".join(chunk.content for chunk in model.stream(QUESTION))
    assert text == chat()
    return text


def tools():
    (call,) = model.bind_tools([get_weather]).invoke(CITY).tool_calls
    return call["name"], call["args"], get_weather.invoke(call).content


def json_schema():
    found = model.with_structured_output(Person, method="json_schema").invoke(EXTRACT)
    assert isinstance(found, Person)
    return found


def logprobs():
    answer = model.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    content = answer.response_metadata["logprobs"]["content"]
    assert all(len(one["top_logprobs"]) == 2 for one in content)
    return len(content)


def embeddings():
    """Unchecked length: else langchain sends token ids of OpenAI's own tokenizer."""
    vectors = OpenAIEmbeddings(model=MODEL, check_embedding_ctx_length=False).embed_documents(["one text", "another"])
    assert len(vectors) == 2
    return len(vectors[0])


if __name__ == "__main__":
    run("langchain-openai", [chat, stream, tools, json_schema, logprobs, embeddings])
