"""The front's hold on the engine: submit requests, get streams; restarts it when it dies; knows whether it is well.

In: Requests from the event loop. Out: Streams, and answers to controls. One reader thread takes the engine's events,
makes text of tokens (off the event loop) and hands each batch over at once. When the engine dies every open stream ends
with an error, and the engine is started again, at most `max_restarts` times in `restart_window_s`; then the client is
lost and `on_lost` is called. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxllm.core import Request
from jaxllm.engine.decoding.stop import TokenPieces
from jaxllm.engine.messages import Abort, Add, Beat, Control, Event, Failed, Ready, Reply, Step
from jaxllm.engine.process.links import Link
from serve.errors import ApiError, from_engine
from serve.streams import Piece, Reader, Stream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Supervision:
    max_restarts: int = 3
    restart_window_s: float = 600.0
    unhealthy_s: float = 10.0  # without a finished step while work waits, or without a heartbeat
    kill_s: float = 30.0  # without a heartbeat: the process is stopped or wedged, and is killed
    start_s: float = 3600.0  # loading and compiling take as long as they take


@dataclass
class Health:
    """What is known of the engine; written by the event loop only."""

    up: bool = False
    ready: Ready | None = None
    beat: Beat = field(default_factory=lambda: Beat(0.0, False, False, {}))
    heard_s: float = field(default_factory=time.monotonic)
    restarts: int = 0
    lost: str | None = None  # why there will be no engine any more
    draining: bool = False

    def trouble(self, unhealthy_s: float) -> str | None:
        """Why the server is not live; None when it is."""
        if self.lost is not None:
            return f"the engine is lost: {self.lost}"
        if not self.up:
            return None  # starting is not being dead
        if self.beat.stalled_s > unhealthy_s:
            return "the engine does not make progress"
        if time.monotonic() - self.heard_s > unhealthy_s:
            return "the engine is silent"
        return None

    def unready(self, unhealthy_s: float) -> str | None:
        """Why requests should not come here; None when they may."""
        if self.draining:
            return "shutting down"
        if not self.up:
            return self.trouble(unhealthy_s) or "the engine is starting"
        if self.beat.paused:
            return "paused"
        if self.beat.asleep:
            return "asleep"
        if self.beat.sick:
            return "numerical errors in several steps in a row"
        return self.trouble(unhealthy_s)


class EngineClient:
    def __init__(
        self,
        link: Link,
        tokenizer: TokenPieces | None = None,
        supervision: Supervision | None = None,
        *,
        stream_limit_tokens: int = 65536,
        queue_timeout_s: float | None = None,
    ) -> None:
        self.link, self.health = link, Health()
        self.supervision = supervision or Supervision()
        self.streams: dict[str, Stream] = {}
        self.on_lost: Callable[[str], None] = lambda why: None
        self.on_gap: Callable[[float], None] = lambda seconds: None  # between a stream's tokens
        self.on_beat: Callable[[Beat], None] = lambda beat: None
        self.on_ready: Callable[[], None] = lambda: None  # before the first request is taken
        self.aborted = 0
        self._tokenizer, self._limit, self._queue_timeout_s = tokenizer, stream_limit_tokens, queue_timeout_s
        self._readers: dict[str, Reader] = {}
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._ids = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closing = self._was_ready = False
        self._failure: Failed | None = None
        self._warm = asyncio.Event()

    # ---- life ----

    async def start(self, *, wait: bool = True) -> None:
        """Starts the engine; with `wait`, returns when it is warm and raises ApiError when it cannot start."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._read, name="engine-events", daemon=True)
        self._thread.start()
        if wait:
            await self._warm.wait()
            if self.health.lost is not None:
                raise ApiError(500, self.health.lost, code="engine_died")

    async def warm(self) -> None:
        """Returns when the engine is ready for the first time, or lost."""
        await self._warm.wait()

    async def close(self) -> None:
        self._closing = True
        self.fail_all("shutting_down: the server is shutting down")
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self.link.close)

    # ---- requests ----

    def submit(self, request: Request, tenant: str = "") -> Stream:
        """Raises ApiError 503 while there is no engine."""
        if not self.health.up:
            why = self.health.lost or "the engine is starting"
            raise ApiError(503, why, code="engine_unavailable", retry_after_s=5)
        stream = Stream(request, tenant, self._limit, self._drop)
        self.streams[request.id] = stream
        self._readers[request.id] = Reader(request, self._tokenizer)
        self.link.send(Add(request, self._queue_timeout_s))
        return stream

    def release(self, stream: Stream) -> None:
        """Whoever read the stream is done with it; what still runs is taken back from the engine."""
        if stream.released:
            return
        stream.released = True
        self._forget(stream)
        if not stream.finished:
            self.aborted += 1
            self.link.send(Abort(stream.id))
            stream.end("abort")

    def abort(self, request_id: str, error: ApiError | None = None) -> bool:
        """Ends a request on another's behalf: its reader sees finish_reason abort, or the error."""
        stream = self.streams.get(request_id)
        if stream is None:
            return False
        self.aborted += 1
        self._forget(stream)
        self.link.send(Abort(request_id))
        if error is None:
            stream.end("abort")
        else:
            stream.fail(error)
        return True

    def fail_all(self, error: str) -> None:
        for stream in list(self.streams.values()):
            self._forget(stream)
            if not stream.finished:
                self.link.send(Abort(stream.id))
            stream.fail(from_engine(error))

    async def control(self, operation: str, timeout_s: float = 30.0, **arguments: Any) -> Any:
        """One of the engine's operations; ApiError when it refuses, fails or does not answer."""
        if not self.health.up:
            raise ApiError(503, "the engine is starting", code="engine_unavailable", retry_after_s=5)
        number = next(self._ids)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._replies[number] = answer
        self.link.send(Control(number, operation, arguments))
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            raise ApiError(503, "the engine did not answer in time", code="engine_unavailable") from None
        finally:
            self._replies.pop(number, None)

    def _forget(self, stream: Stream) -> None:
        self.streams.pop(stream.id, None)
        self._readers.pop(stream.id, None)

    def _drop(self, stream: Stream) -> None:
        """A stream ended itself because nobody reads it."""
        self._forget(stream)
        self.aborted += 1
        self.link.send(Abort(stream.id))

    # ---- the reader thread ----

    def _read(self) -> None:
        starts: deque[float] = deque()
        while not self._closing:
            starts.append(time.monotonic())
            self._failure = None
            try:
                self.link.start()
                why = self._listen()
            except OSError as error:
                why = f"it could not be started: {error.strerror}"
            if self._closing:
                return
            self.link.kill()
            while starts and time.monotonic() - starts[0] > self.supervision.restart_window_s:
                starts.popleft()
            may_help = self._failure is None and self._was_ready  # what never started will not start again
            again = may_help and len(starts) <= self.supervision.max_restarts
            self._call(self._died, why, again)
            if not again:
                return

    def _listen(self) -> str:
        """Until the engine is gone; returns why."""
        heard, warm = time.monotonic(), False
        while True:
            events = self.link.receive(0.1)
            if events:
                heard = time.monotonic()
                warm = warm or any(isinstance(event, Ready) for event in events)
                self._was_ready = self._was_ready or warm
                self._dispatch(events)
                continue
            if self._closing:
                return "closing"
            why = self.link.death()
            if why is not None:
                left = self.link.receive(0.0)
                self._dispatch(left)
                if not left:
                    return why
            elif time.monotonic() - heard > (self.supervision.kill_s if warm else self.supervision.start_s):
                return "it was silent too long"

    def _dispatch(self, events: list[Event]) -> None:
        pieces: list[tuple[str, Piece, bool, str]] = []
        others: list[Event] = []
        for event in events:
            if isinstance(event, Step):
                self._collect(event, pieces)
            else:
                others.append(event)
                if isinstance(event, Failed):
                    self._failure = event
        self._call(self._deliver, pieces, others)

    def _collect(self, step: Step, pieces: list[tuple[str, Piece, bool, str]]) -> None:
        readers, version = self._readers, step.weights_version
        for one in step.news:
            reader = readers.get(one.request_id)
            if reader is not None:
                piece, cut = reader.read(one)
                if piece is not None:
                    pieces.append((one.request_id, piece, cut, version))

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            self._closing = True  # the event loop is closed

    # ---- on the event loop ----

    def _deliver(self, pieces: list[tuple[str, Piece, bool, str]], events: list[Event]) -> None:
        now = time.monotonic()
        self.health.heard_s = now
        for request_id, piece, cut, version in pieces:
            stream = self.streams.get(request_id)
            if stream is None:
                continue
            if cut:
                self.link.send(Abort(request_id, None if piece.error else piece.index))
            stream.weights_version = version
            if piece.token_ids:
                if stream.last_s is None:
                    stream.first_s = now
                else:
                    self.on_gap(now - stream.last_s)
                stream.last_s = now
            if piece.began_s is not None:
                stream.began_running_s = piece.began_s
            stream.put(piece)
            if stream.finished:
                self._forget(stream)
        for event in events:
            self._note(event)

    def _note(self, event: Event) -> None:
        match event:
            case Ready():
                self.health.up, self.health.ready = True, event
                self.on_ready()
                self._warm.set()
            case Beat():
                self.health.beat = event
                self.on_beat(event)
            case Reply():
                answer = self._replies.get(event.id)
                if answer is not None and not answer.done():
                    if event.error is None:
                        answer.set_result(event.value)
                    else:
                        answer.set_exception(from_engine(event.error))

    def _died(self, why: str, again: bool) -> None:
        """Every open stream ends with one explicit error; then a new engine, or none."""
        self.health.up = False
        if self._failure is not None:
            why = self._failure.message
        log.error("the engine died (%s); %d streams end with an error", why, len(self.streams))
        for stream in list(self.streams.values()):
            self._forget(stream)
            stream.fail(ApiError(503, "the engine died; try again", code="engine_died", retry_after_s=10))
        for answer in self._replies.values():
            if not answer.done():
                answer.set_exception(ApiError(503, "the engine died", code="engine_died", retry_after_s=10))
        if again:
            self.health.restarts += 1
            self.health.beat = Beat(0.0, False, False, {})
        else:
            self.health.lost = why
            self._warm.set()
            self.on_lost(why)
