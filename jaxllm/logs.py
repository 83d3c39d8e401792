"""Log lines on standard error: one line each, whatever a client put into it; a full disk drops lines and nothing else.

In: records. Out: text, control characters escaped, and a count of what could not be written. Knows nothing of requests.
"""

from __future__ import annotations

import logging
import re
import sys

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


def escaped(text: str) -> str:
    """One line without control characters: what a client names can neither start a line nor colour a terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class OneLine(logging.Formatter):
    """A traceback, which is ours, keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escaped(record.message)
        return super().formatMessage(record)


class StderrLog(logging.StreamHandler):
    def __init__(self, name: str = "") -> None:
        super().__init__(sys.stderr)
        self.dropped = 0
        self.setFormatter(OneLine(f"%(asctime)s {name}%(levelname)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        """A line that cannot be written is counted; serving goes on."""
        self.dropped += 1


def log_to_stderr(level: str, name: str = "") -> StderrLog:
    """The root logger's one handler from now on."""
    handler = StderrLog(name)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    return handler
