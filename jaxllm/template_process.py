"""Renders chat templates in processes of their own, with a deadline and a memory limit: a template is a program.

In: a template's source and its variables (JSON values; `now` is the time for strftime_now). Out: the text, or
ChatError. The sandbox stops escapes; this stops work: a loop that never ends, a text of gigabytes. A process that was
stopped is replaced. Also the program that runs in the process. Knows nothing of tokenizers or HTTP.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxllm.chat_template import ChatError, compile_template, render
from jaxllm.child import Children

START_S = 30.0
DEADLINE_S = 2.0
MAX_MEMORY_BYTES = 1 << 30
MAX_TEXT = 16 << 20  # characters


@dataclass
class TemplateProcesses:
    """Call it with a template's source and variables; `processes` at most render at once."""

    deadline_s: float = DEADLINE_S
    processes: int = 2
    _children: Children = field(init=False)

    def __post_init__(self) -> None:
        self._children = Children("jaxllm.template_process", (), START_S, self.processes)

    @property
    def restarts(self) -> int:
        """Processes that met a limit, and were stopped."""
        return self._children.restarts

    def __call__(self, source: str, variables: Mapping[str, Any]) -> str:
        """Raises ChatError with the template's own words, or when a limit was met."""
        plain = {name: value for name, value in variables.items() if not callable(value)}
        question = {"source": source, "variables": plain, "now": datetime.datetime.now().isoformat()}
        answer = self._children.ask({**question, "deadline_s": self.deadline_s}, self.deadline_s)
        if answer is None:
            why = f"took more than {self.deadline_s:g} s or {MAX_MEMORY_BYTES >> 20} MiB"
            raise ChatError(f"the model's chat template {why} for these messages")
        if "error" in answer:
            raise ChatError(answer["error"])
        return answer["text"]

    def close(self) -> None:
        self._children.close()


# ---- the process ----


def answer_of(question: dict[str, Any], compiled: dict[str, Any]) -> dict[str, str]:
    source = question["source"]
    now = datetime.datetime.fromisoformat(question["now"])
    try:
        template = compiled.get(source) or compile_template(source)
        compiled[source] = template
        text = render(template, {**question["variables"], "strftime_now": now.strftime})
    except ChatError as error:
        return {"error": str(error)[:2000]}
    if len(text) > MAX_TEXT:
        return {"error": f"the model's chat template made a text of {len(text)} characters"}
    return {"text": text}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compiled: dict[str, Any] = {}
    answer: dict[str, Any] = {"ready": True}
    while True:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, question.pop("deadline_s"))  # the default action ends the process
        answer = answer_of(question, compiled)
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
