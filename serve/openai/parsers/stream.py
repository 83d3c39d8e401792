"""The streaming parser engine: a format is written as if all text were there; it is suspended where text is missing.

In: pieces of text, however they are cut. Out: events, each as soon as it is certain. A format is a generator over a
Source: it yields when it needs more, so one piece and a thousand take the same path. Nothing is ever scanned again but
the few characters that may be the beginning of a marker, so the time is linear in the text. Knows no format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import cache

from serve.openai.parsers.events import Event, NewId, Parsed, Sink, collect

type Steps[T] = Generator[None, None, T]
Put = Callable[[str], None]
Format = Callable[["Source", Sink], Steps[None]]
SPACE = re.compile(r"\s*")


class Source:
    """Text that has arrived and was not taken. Methods that are generators wait for what they need."""

    def __init__(self) -> None:
        self._text, self._at = "", 0
        self._tape: list[str] | None = None
        self.ended = False
        self.num_examined = 0  # characters looked at, all looks counted: what "linear" is measured by

    def feed(self, text: str) -> None:
        self._text, self._at = self._text[self._at :] + text, 0
        self.num_examined += len(self._text)

    def take(self, count: int) -> str:
        taken = self._text[self._at : self._at + count]
        self._at += count
        if self._tape is not None:
            self._tape.append(taken)
        return taken

    def take_rest(self) -> str:
        return self.take(len(self._text) - self._at)

    # Remembering what was taken, to give it back as text when it turns out to be nothing else.

    def record(self, already: str = "") -> None:
        self._tape = [already]

    def recorded(self) -> str:
        """What was taken since `record`; ends the recording."""
        tape, self._tape = self._tape or [], None
        return "".join(tape)

    # Looking and taking, with waiting.

    def peek(self) -> Steps[str]:
        """The next character, or "" at the end."""
        while self._at == len(self._text) and not self.ended:
            yield
        self.num_examined += 1
        return self._text[self._at : self._at + 1]

    def starts_with(self, literal: str) -> Steps[bool]:
        while True:
            arrived = self._text[self._at : self._at + len(literal)]
            self.num_examined += len(arrived)
            if len(arrived) == len(literal) or self.ended or not literal.startswith(arrived):
                return arrived == literal
            yield

    def skip(self, literal: str) -> Steps[bool]:
        """Takes the literal if it comes next."""
        found = yield from self.starts_with(literal)
        if found:
            self.take(len(literal))
        return found

    def run(self, pattern: re.Pattern[str], put: Put) -> Steps[None]:
        """Takes as many characters as the pattern, of the form `[...]*`, matches."""
        while True:
            found = pattern.match(self._text, self._at)
            end = found.end() if found else self._at
            self.num_examined += end - self._at + 1
            if end > self._at:
                put(self.take(end - self._at))
            if self._at < len(self._text) or self.ended:
                return
            yield

    def word(self, pattern: re.Pattern[str]) -> Steps[str]:
        pieces: list[str] = []
        yield from self.run(pattern, pieces.append)
        return "".join(pieces)

    def space(self) -> Steps[None]:
        yield from self.run(SPACE, ignore)

    def until(self, markers: tuple[str, ...], put: Put) -> Steps[str | None]:
        """Puts the text before the first marker, takes the marker and returns it; None when the text ends first."""
        pattern = _any_of(markers)
        while True:
            found = pattern.search(self._text, self._at)
            self.num_examined += (found.end() if found else len(self._text)) - self._at
            if found:
                put(self.take(found.start() - self._at))
                return self.take(len(found[0]))
            held = 0 if self.ended else self._held(markers)
            if len(self._text) - held > self._at:
                put(self.take(len(self._text) - held - self._at))
            if self.ended:
                return None
            yield

    def _held(self, markers: tuple[str, ...]) -> int:
        """How many characters at the end may be the beginning of a marker."""
        for size in range(min(max(map(len, markers)) - 1, len(self._text) - self._at), 0, -1):
            self.num_examined += 1
            tail = self._text[-size:]
            if any(marker.startswith(tail) for marker in markers):
                return size
        return 0


@cache
def _any_of(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, markers)))


def ignore(text: str) -> None:
    """A Put for what nobody needs."""


class StreamParser:
    """One format over one output."""

    def __init__(self, form: Format, new_id: NewId) -> None:
        self.source, self.sink = Source(), Sink(new_id)
        self._steps: Steps[None] | None = form(self.source, self.sink)

    def feed(self, text: str) -> list[Event]:
        """What is certain now that this text came too."""
        self.source.feed(text)
        self._advance()
        return self.sink.drain()

    def finish(self) -> list[Event]:
        """The rest; after this nothing may be fed."""
        self.source.ended = True
        self._advance()
        self.sink.end()
        return self.sink.drain()

    def _advance(self) -> None:
        if self._steps is not None:
            try:
                next(self._steps)
                return
            except StopIteration:
                self._steps = None
        self.sink.text(self.source.take_rest())  # a format that is done leaves the rest as it is


def parse_whole(parser: StreamParser, text: str) -> Parsed:
    return collect([*parser.feed(text), *parser.finish()])
