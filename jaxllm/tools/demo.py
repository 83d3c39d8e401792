"""jaxllm demo: a code completion, a chat answer and a JSON extraction from one model, with their speed.

In: something that streams, and a place to write. Out: whether every task was answered. What is asked is data, below.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from jaxllm.core import RequestOutput, SamplingParams
from jaxllm.engine.output import speed


@dataclass(frozen=True)
class Task:
    """One thing to ask. A `chat` prompt goes through the model's chat template; a completion continues the text."""

    title: str
    prompt: str
    chat: bool
    max_tokens: int
    stop: tuple[str, ...] = ()
    expect_json: bool = False


TASKS = (
    Task(
        title="Code completion",
        prompt='def read_json(path):\n    """Return the object stored in a JSON file."""\n',
        chat=False,
        max_tokens=64,
        stop=("\ndef ", "\nclass ", "\n\n\n"),
    ),
    Task(
        title="Chat",
        prompt="Sort these words alphabetically: pear, apple, fig, cherry",
        chat=True,
        max_tokens=64,
    ),
    Task(
        title="JSON extraction",
        prompt="Extract the name, age and city as JSON.\n\nMaria Lopez is 34 years old and lives in Lisbon.",
        chat=True,
        max_tokens=96,
        expect_json=True,
    ),
)


class Streams(Protocol):
    """What the demo needs of an LLM."""

    def stream(self, prompt: str, params: SamplingParams | None = None) -> Iterable[RequestOutput]: ...

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None
    ) -> Iterable[RequestOutput]: ...


def run(llm: Streams, out: TextIO, tasks: Sequence[Task] = TASKS) -> bool:
    """Ask each task greedily and write prompt, answer and speed. True when all were answered, JSON where asked for."""
    answered = [_run_task(llm, out, task) for task in tasks]  # every task runs, whatever the others did
    return all(answered)


def _run_task(llm: Streams, out: TextIO, task: Task) -> bool:
    params = SamplingParams(temperature=0.0, max_tokens=task.max_tokens, stop=task.stop)
    out.write(f"── {task.title} ──\n{task.prompt}{chr(10) if task.chat else ''}")
    if task.chat:
        out.write("→ ")
    deltas = llm.stream_chat([{"role": "user", "content": task.prompt}], params) if task.chat else None
    answer, num_tokens, last = "", 0, None
    for last in deltas if deltas is not None else llm.stream(task.prompt, params):
        text = last.outputs[0].text
        answer, num_tokens = answer + text, num_tokens + len(last.outputs[0].token_ids)
        out.write(text)
        out.flush()
    assert last is not None, "a stream ends with a finished delta"
    note, good = _judge(task, answer, last.error)
    out.write(f"\n[{speed(last.timings, num_tokens)}{note}]\n\n")
    return good


def _judge(task: Task, answer: str, error: str | None) -> tuple[str, bool]:
    if error is not None:
        return f"; failed: {error}", False
    if not task.expect_json:
        return "", bool(answer.strip())
    try:
        json.loads(answer)
    except ValueError as why:
        return f"; not valid JSON: {why}", False
    return "; valid JSON", True
