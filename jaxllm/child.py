"""Helper processes that answer questions one by one, for work that may never end or take all memory.

In: a module to run as a program, its arguments, questions as JSON values. Out: answers as JSON values, or None when
none came in time; then the process is to be stopped. The module writes one line when it is ready and one for each line
it reads. Knows nothing of what is asked.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import LifoQueue
from typing import Any

ROOT = Path(__file__).parents[1]


class Child:
    def __init__(self, module: str, arguments: Sequence[str], start_s: float) -> None:
        command = [sys.executable, "-m", module, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        if self._read(start_s) is None:
            self.stop()
            raise RuntimeError(f"the process of {module} did not start")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, question: Any, deadline_s: float) -> Any:
        """None: no answer in time, or the process is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return None
        return self._read(deadline_s + 0.5)  # the child's alarm comes first

    def _read(self, timeout_s: float) -> Any:
        assert self._process.stdout is not None
        parts, end = [b""], time.monotonic() + timeout_s
        while not parts[-1].endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(self._process.stdout.fileno(), 1 << 20) if ready else b""
            if not chunk:
                return None
            parts.append(chunk)
        return json.loads(b"".join(parts))

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue


@dataclass
class Children:
    """At most `processes` of a module's processes at once; they start when first needed and live until `close`.

    One that did not answer in time is stopped, and another takes its place when the next question comes.
    """

    module: str
    arguments: Sequence[str]
    start_s: float
    processes: int
    restarts: int = 0
    _idle: LifoQueue[Child | None] = field(default_factory=LifoQueue)  # None: a place for one more
    _closed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        for _ in range(self.processes):
            self._idle.put(None)

    def ask(self, question: Any, deadline_s: float) -> Any:
        """Waits for a process to be free. None: no answer in time."""
        child = self._idle.get()
        try:
            child = child or Child(self.module, self.arguments, self.start_s)
            answer = child.ask(question, deadline_s)
            if answer is None:
                child.stop()
                child = None
                self.restarts += 1
            return answer
        finally:
            if child is not None and self._closed.is_set():
                child.stop()
                child = None
            self._idle.put(child)

    def close(self) -> None:
        """Ends the processes; those at work end when they are done."""
        self._closed.set()
        waiting = [self._idle.get_nowait() for _ in range(self._idle.qsize())]
        for child in waiting:
            if child is not None:
                child.stop()
            self._idle.put(None)
