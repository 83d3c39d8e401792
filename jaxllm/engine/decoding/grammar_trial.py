"""Tries grammars in a process of its own, so that one that never ends or overflows a stack costs only that process.

In: GrammarSpecs. Out: nothing, or a RequestError. The process is this module run as a program; it is told the
tokenizer's file once, then reads one JSON line a spec and answers with one. Both sides keep the deadline: the parent
stops waiting and kills it, the child's own alarm ends it when the parent is gone.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxllm.child import Children
from jaxllm.core import GrammarKind, GrammarSpec, RequestError
from jaxllm.engine.decoding.grammars import spec_key
from jaxllm.engine.decoding.structured import GrammarCompiler, TokenizerBridge, compile_spec

DEADLINE_S = 2.0
START_S = 30.0
MAX_PASSED = 1024
MAX_MEMORY_BYTES = 4 << 30
WALK_TOKENS = 32  # masks computed along one path into the grammar
MAX_MASK_S = 0.1  # processor time of one: every sequence of the batch would wait for it


@dataclass
class GrammarTrial:
    """Call it with a spec. `processes` at most run at once; they start when first needed and live until `close`."""

    tokenizer_file: Path
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    deadline_s: float = DEADLINE_S
    processes: int = 2
    _passed: OrderedDict[str, None] = field(default_factory=OrderedDict)  # the latest, by key
    _children: Children = field(init=False)

    def __post_init__(self) -> None:
        arguments = [str(self.tokenizer_file), str(self.vocab_size), *map(str, self.eos_token_ids)]
        self._children = Children("jaxllm.engine.decoding.grammar_trial", arguments, START_S, self.processes)

    @property
    def restarts(self) -> int:
        """Processes that took too long, and were stopped."""
        return self._children.restarts

    def __call__(self, spec: GrammarSpec) -> None:
        """Raises RequestError when the spec does not compile within the deadline. What passed is not tried again."""
        key = spec_key(spec)
        if key in self._passed:
            return
        self._try(spec)
        self._passed[key] = None
        if len(self._passed) > MAX_PASSED:
            self._passed.popitem(last=False)

    def _try(self, spec: GrammarSpec) -> None:
        answer = self._children.ask({**asdict(spec), "deadline_s": self.deadline_s}, self.deadline_s)
        if answer is None:
            raise RequestError(spec.field, spec.source, f"takes more than {self.deadline_s:g} s to compile")
        if answer.get("error"):
            raise RequestError(spec.field, spec.source, answer["error"])

    def close(self) -> None:
        self._children.close()


def open_grammars(directory: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> GrammarCompiler | None:
    """Of a model directory; None where there is no tokenizer. Costs nothing until the first grammar comes: what that
    needs of the tokenizer is then read in a worker."""
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    bridge = lambda: TokenizerBridge(path.read_text("utf-8"), vocab_size, eos_token_ids)  # noqa: E731
    return GrammarCompiler(bridge, GrammarTrial(path, vocab_size, eos_token_ids))


# ---- the child ----


def try_spec(spec: GrammarSpec, bridge: Any) -> str | None:
    """Compiles, then walks a little way in: where every mask is quick, those of a sequence most likely are."""
    try:
        matcher = compile_spec(spec, bridge).matcher()
    except RequestError as error:
        return error.allowed
    for step in range(WALK_TOKENS):
        started = time.thread_time()
        row = matcher.bits()
        if time.thread_time() - started > MAX_MASK_S:
            return "is too slow to follow: use fewer optional or repeated parts"
        words = row.nonzero()[0]
        if matcher.error or matcher.finished or not len(words):
            return f"cannot be used: {matcher.error}" if matcher.error else None
        word = int(words[(step * 7) % len(words)])
        mask = int(row[word])
        token = word * 32 + (mask & -mask).bit_length() - 1
        if token in bridge.eos_token_ids or not matcher.advance(token):
            return f"cannot be used: {matcher.error}" if matcher.error else None
    return None


def main(arguments: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    tokenizer_json = Path(arguments[0]).read_text("utf-8")
    bridge = TokenizerBridge(tokenizer_json, int(arguments[1]), map(int, arguments[2:]))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer: dict[str, Any] = {"ready": True}
    while True:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, question.pop("deadline_s"))  # the default action ends the process
        spec = GrammarSpec(**{**question, "kind": GrammarKind(question["kind"])})
        answer = {"error": try_spec(spec, bridge)}
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
