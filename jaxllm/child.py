"""A helper process that answers questions one by one, for work that may never end or take all memory.

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
import time
from collections.abc import Sequence
from pathlib import Path
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
