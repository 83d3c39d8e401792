"""What every route needs of the server: the engine client, the tokenizer, the limits, and requests opened under them.

In: calls and core Requests. Out: Streams that are admitted, watched for the client's leaving, and released. Holds no
protocol: routes know shapes, this knows resources.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from jaxllm.core import Request, RequestError
from jaxllm.engine.intake import Intake
from jaxllm.template_process import TemplateProcesses
from serve.admission import Admission, RateLimit
from serve.client import EngineClient
from serve.errors import ApiError, from_request_error, invalid
from serve.metrics import FrontMetrics
from serve.middleware import Call
from serve.openai.store import Store
from serve.openai.tools import parser_names
from serve.settings import FrontSettings
from serve.streams import Piece, Stream

log = logging.getLogger(__name__)

TEXT_THREADS = max(2, min(8, (os.cpu_count() or 2) // 2))  # that tokenize; they hold no lock of the interpreter's
RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass
class Front:
    settings: FrontSettings
    client: EngineClient
    metrics: FrontMetrics
    tokenizer: Any = None  # jaxllm.tokenizer.Tokenizer, or None
    created_s: int = field(default_factory=lambda: int(time.time()))
    intake: Intake = field(init=False)
    admission: Admission = field(init=False)
    token_rate: RateLimit = field(init=False)
    pool: ThreadPoolExecutor = field(init=False)
    parsers: tuple[str | None, str | None] = field(init=False)  # of tool calls and of reasoning
    stored: Store = field(init=False)  # of /v1/responses
    templates: TemplateProcesses = field(init=False)

    def __post_init__(self) -> None:
        self.intake = Intake(vocab_size=0, max_model_len=0, tokenizer=self.tokenizer)
        self.admission = Admission(self.settings.max_queue, self.settings.max_queue_tokens)
        self.token_rate = RateLimit(self.settings.tokens_per_minute, "tokens")
        self.pool = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        self.parsers = parser_names(self.settings, self.tokenizer)
        self.stored = Store(self.settings.max_stored_responses)
        self.templates = TemplateProcesses(self.settings.template_timeout_s)
        if self.tokenizer is not None and self.tokenizer.templates:
            self.tokenizer.render_elsewhere = self.templates
        self.client.on_ready = self.adopt
        self.metrics.bind(self.client, self.admission)

    def adopt(self) -> None:
        """What only the warm engine knows; before that no request is taken."""
        ready = self.client.health.ready
        if ready is not None:
            known = self.intake
            known.max_model_len, known.vocab_size = ready.max_model_len, ready.vocab_size
            known.eos_token_ids, known.bos_token_id = ready.eos_token_ids, ready.bos_token_id
            known.default_params = ready.default_params
            self.admission.max_slots = self.settings.max_queue + ready.max_num_seqs

    async def off_loop[T](self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs what takes time (tokenizing, templates) beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.templates.close()

    # ---- names ----

    @property
    def model_name(self) -> str:
        return self.settings.model_names[0]

    def check_model(self, name: str | None) -> str:
        if name is None:
            return self.model_name
        if name not in self.settings.model_names:
            shown = name if len(name) <= 80 else name[:77] + "..."
            message = f"the model {shown!r} does not exist; this server has {', '.join(self.settings.model_names)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    @property
    def sampling_defaults(self) -> dict[str, float]:
        """What the model's author recommends, for requests that do not say."""
        return {name: getattr(self.intake.default_params, name) for name in RECOMMENDED}

    def salt(self, call: Call, cache_salt: str | None) -> str:
        """Tenants never share cached pages."""
        return f"{call.tenant}/{cache_salt or ''}" if call.tenant or cache_salt else ""

    def check_open(self, slots: int) -> None:
        """Before any work: is there an engine, is there room?"""
        health = self.client.health
        if health.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=5, close=True)
        if not health.up:
            why = "the engine is lost" if health.lost else "the engine is starting"
            raise ApiError(503, why, code="engine_unavailable", retry_after_s=5)
        self.admission.check_slots(slots)

    def make_request(self, prompt: str | Sequence[int], **options: Any) -> Request:
        try:
            return self.intake.make_request(prompt, **options)
        except RequestError as error:
            raise from_request_error(error) from None

    def intake_encode(self, prompt: str | Sequence[int], *, add_special_tokens: bool = True) -> Sequence[int]:
        try:
            return self.intake.encode(prompt, add_special_tokens) if isinstance(prompt, str) else prompt
        except RequestError as error:
            raise from_request_error(error) from None
        except ValueError as error:  # the tokenizer's own
            raise invalid("prompt", str(error)) from None

    def text_of(self, token_ids: Sequence[int]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode(token_ids, skip_special_tokens=True)

    # ---- streams ----

    @contextlib.asynccontextmanager
    async def opened(self, call: Call, requests: Sequence[Request]) -> AsyncIterator[list[Stream]]:
        """The requests' streams, admitted together or not at all; aborted when the client leaves or the block ends."""
        slots = sum(request.params.n for request in requests)
        tokens = sum(len(request.prompt_token_ids) for request in requests)
        self.token_rate.spend(call.tenant, tokens)
        self.admission.enter(slots, tokens)
        waiting = tokens
        streams: list[Stream] = []
        watcher: asyncio.Task[None] | None = None
        try:
            streams += [self.client.submit(request, call.tenant) for request in requests]
            for stream in streams:
                stream.on_first = self._started
            waiting = 0
            watcher = asyncio.create_task(self._watch(call, streams))
            yield streams
        finally:
            if watcher is not None:
                watcher.cancel()
            for stream in streams:
                self.client.release(stream)
                self._started(stream)
                self.metrics.ended(stream)
            self.admission.leave(slots)
            self.admission.started(waiting)

    def _started(self, stream: Stream) -> None:
        if not stream.counted:
            stream.counted = True
            self.admission.started(len(stream.request.prompt_token_ids))

    async def _watch(self, call: Call, streams: list[Stream]) -> None:
        while (await call.receive())["type"] != "http.disconnect":
            pass
        for stream in streams:
            # One each: an exception that is raised again keeps the frames of every time it was raised.
            self.client.abort(stream.id, ApiError(499, "the client left", code="client_gone"))

    async def ping(self) -> None:
        """For ever: gives readers of silent streams the chance to send a sign of life."""
        every = self.settings.ping_s
        while True:
            await asyncio.sleep(every)
            late = time.monotonic() - every
            for stream in list(self.client.streams.values()):
                if (stream.last_s or stream.began_s) < late:
                    stream.nudge()

    async def report(self, every_s: float = 10.0) -> None:
        """For ever: one line while the server is busy."""
        before = 0.0
        while True:
            await asyncio.sleep(every_s)
            stats = self.client.health.beat.stats
            total = stats.get("generated_tokens", 0.0)
            if total > before or stats.get("running", 0) or stats.get("waiting", 0):
                log.info(
                    "%.0f tokens/s, %d running, %d waiting, %.0f%% of pages in use, %d streams",
                    max(0.0, total - before) / every_s,  # a new engine counts from zero
                    stats.get("running", 0),
                    stats.get("waiting", 0),
                    100 * stats.get("held_pages", 0) / max(1.0, stats.get("total_pages", 1)),
                    len(self.client.streams),
                )
            before = total


async def collect(stream: Stream) -> list[Piece]:
    """All of a stream at once: one piece for each of its n sequences."""
    whole = {index: Piece(index) for index in range(stream.request.params.n)}
    while (pieces := await stream.next()) != []:
        for piece in pieces or ():
            whole[piece.index].join(piece)
    return list(whole.values())


class Merged:
    """Several streams as one: `next` gives (which stream, its news), None when all have ended; news None = a sign of
    life is due. A context, so that what waits is let go."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        self._streams = streams
        self._waits: dict[asyncio.Future[list[Piece] | None], int] = {}
        self._done: list[tuple[int, list[Piece] | None]] = []

    async def __aenter__(self) -> Merged:
        if len(self._streams) > 1:
            self._waits = {asyncio.ensure_future(stream.next()): i for i, stream in enumerate(self._streams)}
        return self

    async def __aexit__(self, *_: object) -> None:
        for one in self._waits:
            one.cancel()

    async def next(self) -> tuple[int, list[Piece] | None] | None:
        if len(self._streams) == 1:  # almost always, and on the way of every token
            pieces = await self._streams[0].next()
            return None if pieces == [] else (0, pieces)
        while not self._done and self._waits:
            done, _ = await asyncio.wait(self._waits, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                i, pieces = self._waits.pop(one), one.result()
                if pieces != []:
                    self._waits[asyncio.ensure_future(self._streams[i].next())] = i
                    self._done.append((i, pieces))
        return self._done.pop(0) if self._done else None
