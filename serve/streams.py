"""One request's answer on its way from the engine to a client: news in from the reader, batches of pieces out.

A Stream belongs to the event loop. Pieces that come while nobody reads are joined, so a slow client costs one buffer of
text, bounded by `limit_tokens`; beyond it the stream ends with an error and the batch never waits. Knows nothing of the
engine's queues or of HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxllm.core import FinishReason, Request, TokenLogprobs
from jaxllm.engine.decoding.stop import TokenPieces
from jaxllm.engine.decoding.text import TextAssembler
from jaxllm.engine.messages import News
from serve.errors import ApiError, from_engine


@dataclass(slots=True)
class Piece:
    """What is new in one of a request's n sequences."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached: int = 0
    error: str | None = None
    began_s: float | None = None

    def join(self, later: Piece) -> None:
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.prompt_logprobs += later.prompt_logprobs
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        self.num_cached = max(self.num_cached, later.num_cached)
        self.error = later.error


class Reader:
    """The half of a stream that lives in the reader thread: tokens to text, one assembler a sequence."""

    def __init__(self, request: Request, tokenizer: TokenPieces | None) -> None:
        self._assemblers = [TextAssembler(tokenizer, request) for _ in range(request.params.n)]
        self._ended = [False] * request.params.n
        self._wants_logprobs = request.params.logprobs is not None
        self._keeps_stop = request.params.include_stop_str_in_output

    def read(self, news: News) -> tuple[Piece | None, bool]:
        """The piece, and whether the engine has to be told to stop this sequence."""
        index = news.index
        if index >= len(self._ended) or self._ended[index]:
            return None, False  # tokens that were on their way when a stop string ended it
        if news.error is not None:
            self._ended = [True] * len(self._ended)
            return Piece(index, finish_reason="error", error=news.error), False
        try:
            return self._assemble(news)
        except Exception as error:  # one request's text must not end the reader
            self._ended = [True] * len(self._ended)
            why = f"internal_error: making this request's text failed ({type(error).__name__})"
            return Piece(index, finish_reason="error", error=why), True

    def _assemble(self, news: News) -> tuple[Piece, bool]:
        index, assembler, finish = news.index, self._assemblers[news.index], news.finish_reason
        piece = Piece(index, finish_reason=finish, stop_reason=news.stop_reason, num_cached=news.num_cached)
        piece.prompt_logprobs, piece.began_s = list(news.prompt_logprobs), news.began_s
        if news.token_id is not None:
            piece.token_ids = [news.token_id]
            if self._wants_logprobs and news.logprobs is not None:
                piece.logprobs = [news.logprobs]
            ended_by_it = finish == FinishReason.STOP and not self._keeps_stop
            piece.text = "" if ended_by_it else assembler.push(news.token_id)
        if finish is not None:
            piece.text += assembler.finish()
        if assembler.stopped_by is not None:
            piece.finish_reason, piece.stop_reason = "stop", assembler.stopped_by
        self._ended[index] = piece.finish_reason is not None
        return piece, assembler.stopped_by is not None and finish is None


class Stream:
    """The half that lives on the event loop: an inbox of joined pieces and one waiter."""

    def __init__(self, request: Request, tenant: str, limit_tokens: int, on_drop: Callable[[Stream], None]) -> None:
        self.request, self.tenant = request, tenant
        self.open = request.params.n  # sequences that have not ended
        self.released = self.cancelled = False
        self.began_s = time.monotonic()
        self.first_s: float | None = None
        self.last_s: float | None = None
        self.began_running_s: float | None = None  # when it left the engine's queue
        self.reason: str | None = None  # why the last of its sequences ended
        self.weights_version = ""  # of the weights behind the latest token
        self.num_tokens, self.num_cached = 0, 0
        self._limit, self._on_drop = limit_tokens, on_drop
        self._inbox: dict[int, Piece] = {}
        self._waiting_tokens = 0
        self._waiter: asyncio.Future[None] | None = None
        self._error: ApiError | None = None
        self._nudged = False
        self.counted = False  # whether admission knows that it no longer waits
        self.on_first: Callable[[Stream], None] = lambda stream: None

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def finished(self) -> bool:
        return self.open == 0 or self._error is not None

    @property
    def outcome(self) -> str:
        """For counting: how it went."""
        if self._error is not None:
            return self._error.code or "error"
        return "finished" if self.open == 0 and not self.cancelled else "aborted"

    def put(self, piece: Piece) -> None:
        if self._error is not None:
            return
        self.num_cached = max(self.num_cached, piece.num_cached)
        if piece.error is not None:
            self.fail(from_engine(piece.error))
            return
        count = len(piece.token_ids)
        if count and not self.num_tokens:
            self.on_first(self)
        self.num_tokens += count
        self._waiting_tokens += count
        if piece.finish_reason is not None:
            self.open -= 1
            self.reason = piece.finish_reason
        have = self._inbox.get(piece.index)
        if have is None:
            self._inbox[piece.index] = piece
        else:
            have.join(piece)
        if self._waiting_tokens > self._limit and not self.finished:
            self.fail(
                ApiError(500, f"the client read too slowly: {self._limit} tokens wait for it", code="slow_reader")
            )
            self._on_drop(self)
            return
        self._wake()

    def fail(self, error: ApiError) -> None:
        """Ends the stream; what it had not delivered is lost."""
        if self._error is None:
            self._error, self.open = error, 0
            self._wake()

    def end(self, reason: str) -> None:
        """Ends every sequence that still runs with this reason; what is undelivered is delivered."""
        if self._error is None and self.open:
            self.cancelled, self.reason = True, reason
            for index in range(self.request.params.n):
                have = self._inbox.setdefault(index, Piece(index))
                have.finish_reason = have.finish_reason or reason
            self.open = 0
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def nudge(self) -> None:
        """Lets a reader that has waited in vain send a sign of life: its `next` gives None."""
        if not self._inbox:
            self._nudged = self._waiter is not None
            self._wake()

    async def next(self) -> list[Piece] | None:
        """All that is new, at least one piece; [] when every sequence has ended; None for a nudge. Raises ApiError."""
        while not self._inbox:
            if self._error is not None:
                raise self._error.again()
            if self.open == 0:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
            if self._nudged and not self._inbox and not self.finished:
                self._nudged = False
                return None
        if self._error is not None:
            raise self._error.again()
        pieces, self._inbox, self._waiting_tokens = list(self._inbox.values()), {}, 0
        return pieces
