"""The demo: its tasks, what it prints, and when it counts as answered."""

import io

import pytest
from helpers.scripted_engine import at_rest, saying, scripted_engine

from jaxllm.llm import LLM
from jaxllm.tools.demo import TASKS, Task, run


@pytest.fixture
def tokenizer(tokenizers_by_kind):
    return tokenizers_by_kind["byte_level"]


def played(tokenizer, say, tasks=TASKS):
    llm, out = LLM(engine=scripted_engine(tokenizer, say)), io.StringIO()
    good = run(llm, out, tasks)
    assert at_rest(llm.engine)
    return good, out.getvalue()


def test_there_is_a_completion_a_chat_and_a_json_extraction():
    assert [(task.chat, task.expect_json) for task in TASKS] == [(False, False), (True, False), (True, True)]


def test_every_task_prints_prompt_answer_and_speed(tokenizer):
    good, out = played(tokenizer, saying(tokenizer, '{"name": "Ada"}'))
    assert good
    for task in TASKS:
        assert task.title in out
        assert task.prompt in out
    assert out.count('{"name": "Ada"}') == out.count("tok/s") == out.count("TTFT") == 3
    assert "valid JSON]" in out


def test_an_extraction_that_is_no_json_counts_as_unanswered(tokenizer):
    good, out = played(tokenizer, saying(tokenizer, "the name"), TASKS[2:])
    assert not good
    assert "not valid JSON" in out


def test_an_empty_answer_counts_as_unanswered(tokenizer):
    assert not played(tokenizer, saying(tokenizer, " "), TASKS[:1])[0]


def test_a_failed_task_says_so_and_the_others_still_run(tokenizer):
    ask = Task(title="A", prompt="a", chat=False, max_tokens=9)
    good, out = played(tokenizer, lambda sequence: ["not finite"], (ask, ask))
    assert not good
    assert out.count("failed: not finite") == 2
