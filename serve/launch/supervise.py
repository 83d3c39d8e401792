"""Child processes that are started again when they die, so many times and no more.

In: a command, what goes into its standard input. Out: a Supervisor, whose `on_given_up` is told in one line when there
will be no other. A child that says it is alive on standard output is killed when it stops saying so. Knows nothing of
what children do.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serve.launch.tied import tied

log = logging.getLogger(__name__)
SILENT_S = 20.0
PAUSE_S = 0.5  # before a child is started again
STOP_S = 10.0
CANNOT_START = 1  # an exit code that another start would not change


@dataclass
class Supervisor:
    name: str
    command: Sequence[str]
    stdin: bytes = b""
    variables: dict[str, str] | None = None  # its environment; None: ours
    max_restarts: int = 3
    window_s: float = 600.0
    shows_life: bool = False  # bytes on standard output; their absence is death
    fatal_code: int | None = CANNOT_START
    silent_s: float = SILENT_S
    on_given_up: Callable[[str], None] = lambda why: None
    restarts: int = 0
    _starts: deque[float] = field(default_factory=deque)
    _process: subprocess.Popen[bytes] | None = None
    _stopping: bool = False
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=f"supervise {self.name}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def stop(self, grace_s: float = STOP_S) -> None:
        """Ends the child, politely first, and this supervision."""
        self._stopping = True
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(grace_s)
            except subprocess.TimeoutExpired:
                process.kill()
        if self._thread is not None:
            self._thread.join(STOP_S)

    def _run(self) -> None:
        while not self._stopping:
            now = time.monotonic()
            self._starts.append(now)
            while now - self._starts[0] > self.window_s:
                self._starts.popleft()
            code = self._live()
            if self._stopping:
                return
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            if code == self.fatal_code:
                self.on_given_up(f"{self.name} {how}: it cannot start")
                return
            if len(self._starts) > self.max_restarts:
                self.on_given_up(
                    f"{self.name} {how}; {self.max_restarts} restarts in {self.window_s:g} s are the limit"
                )
                return
            self.restarts += 1
            log.warning("%s %s; restart %d", self.name, how, self.restarts)
            time.sleep(PAUSE_S)

    def _live(self) -> int:
        """One child from start to end; its exit code."""
        process = self._process = subprocess.Popen(
            tied(self.command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if self.shows_life else None,
            env=self.variables,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(self.stdin)
            process.stdin.flush()
        try:
            return self._listen(process) if self.shows_life else process.wait()
        finally:
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()

    def _listen(self, process: subprocess.Popen[bytes]) -> int:
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(self.silent_s):
                    log.warning("%s has shown no life for %g s: it is killed", self.name, self.silent_s)
                    process.kill()
                elif process.stdout.raw.read(4096):  # type: ignore[attr-defined]
                    continue
                return process.wait()
