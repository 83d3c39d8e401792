"""From tokens to what a user reads: text, log-probabilities, reasons and times of each request.

In: requests (`add`) and the engine's TokenOutputs (`process`). Out: RequestOutputs, and the sequences that ended here
(a stop string) and that the engine must finish. A streaming request gives an update after every step that brought it
something, holding only what is new; any other gives one, complete, at its end. A fault in making the text of one
sequence ends that sequence. Text that nobody needs before the end is made then. Knows nothing of scheduling, devices or
HTTP; LLM and the server both use it.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import NamedTuple

from jaxllm.core import (
    CompletionOutput,
    FinishReason,
    Request,
    RequestOutput,
    RequestTimings,
    Sequence,
    TokenLogprobs,
    TokenOutput,
)
from jaxllm.engine.decoding.stop import TokenPieces
from jaxllm.engine.decoding.text import TextAssembler

log = logging.getLogger(__name__)


class Ended(NamedTuple):
    """A sequence that ended while its text was made; the engine must finish it."""

    sequence: Sequence
    reason: FinishReason
    stop_reason: str | None


class Processed(NamedTuple):
    updates: list[RequestOutput]
    ended: list[Ended]


class Speed(NamedTuple):
    """How a request felt: seconds to the first token, then tokens per second."""

    ttft_s: float | None
    tokens_per_s: float | None
    num_tokens: int

    def __str__(self) -> str:
        ttft = "-" if self.ttft_s is None else f"{self.ttft_s:.3f} s"
        rate = "-" if self.tokens_per_s is None else f"{self.tokens_per_s:.1f} tok/s"
        return f"{self.num_tokens} tokens, TTFT {ttft}, {rate}"


def speed(timings: RequestTimings | None, num_tokens: int) -> Speed:
    """The rate counts the tokens after the first, or the only one over the whole time."""
    if timings is None or timings.first_token_s is None or timings.finished_s is None:
        return Speed(timings.ttft_s if timings else None, None, num_tokens)
    counted, since = (num_tokens - 1, timings.first_token_s) if num_tokens > 1 else (num_tokens, timings.arrival_s)
    seconds = timings.finished_s - since
    return Speed(timings.ttft_s, counted / seconds if seconds > 0 else None, num_tokens)


class _Completion:
    """One of a request's n: its text machinery, and what has gathered since it was last taken."""

    def __init__(self, request: Request, index: int, tokenizer: TokenPieces | None, *, at_end: bool) -> None:
        """`at_end`: nobody needs the text before the sequence ends."""
        params = request.params
        self.index = index
        wordy = params.logprobs is not None or params.prompt_logprobs is not None
        self.quiet = at_end and not wordy  # until it ends, of its tokens only the ids are kept
        self._at_end = at_end
        self._hidden = 0  # tokens at the end that have no text
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self._params = params
        self._assembler = TextAssembler(tokenizer, request)
        self._text: list[str] = []
        self.token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._cumulative_logprob = 0.0

    def apply(self, output: TokenOutput) -> None:
        """One token's news, and the end if it is one."""
        if output.token_id is not None:
            self.token_ids.append(output.token_id)
            if output.logprobs is not None and self._params.logprobs is not None:
                self._logprobs.append(_trimmed(output.logprobs, self._params.logprobs))
                self._cumulative_logprob += output.logprobs.logprob
            # The token that stops a sequence is listed, but its text is shown only on request.
            if output.finish_reason is FinishReason.STOP and not self._params.include_stop_str_in_output:
                self._hidden = 1
            elif not self._at_end:
                self._text.append(self._assembler.push(output.token_id))
        if self._assembler.stopped_by is not None:
            self._finish(FinishReason.STOP, self._assembler.stopped_by)
        elif output.finish_reason is not None:
            self.error = output.error
            self.finish(output.finish_reason, output.sequence.stop_reason)

    def _finish(self, reason: FinishReason, stop_reason: int | str | None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """The end came from elsewhere: what was held back is text after all."""
        if self._at_end:
            self._text += map(self._assembler.push, self.token_ids[: len(self.token_ids) - self._hidden])
        self._text.append(self._assembler.finish())
        self._finish(reason, stop_reason)

    def fail(self, error: str) -> None:
        """The text cannot be made; what was shown stays."""
        self.error = error
        self._finish(FinishReason.ERROR, None)

    def take(self) -> CompletionOutput:
        """What has gathered since the last time."""
        wanted = self._params.logprobs is not None
        output = CompletionOutput(
            index=self.index,
            text="".join(self._text),
            token_ids=self.token_ids,
            cumulative_logprob=self._cumulative_logprob if wanted else None,
            logprobs=self._logprobs if wanted else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        self._text, self.token_ids, self._logprobs = [], [], []
        return output


def _trimmed(logprobs: TokenLogprobs, count: int) -> TokenLogprobs:
    """The device computes a fixed number of alternatives; a request asked for `count`."""
    return logprobs if len(logprobs.top) <= count else dataclasses.replace(logprobs, top=logprobs.top[:count])


class _State:
    """A request in flight."""

    def __init__(self, request: Request, prompt: str | None, stream: bool, tokenizer: TokenPieces | None) -> None:
        self.request, self.prompt, self.stream = request, prompt, stream
        at_end = not (stream or request.params.stop)
        self.completions = [_Completion(request, i, tokenizer, at_end=at_end) for i in range(request.params.n)]
        self.timings = RequestTimings(request.arrival_s)
        self.touched: set[int] = set()
        self._prompt_token_ids = list(request.prompt_token_ids)
        self._prompt_logprobs: list[TokenLogprobs | None] = [None]
        self._num_cached = 0

    @property
    def under_way(self) -> bool:
        """The first token came: of later ones nobody asks when."""
        return self.timings.first_token_s is not None

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason is not None for completion in self.completions)

    def apply(self, output: TokenOutput, now: float) -> None:
        index = output.sequence.index
        if index == 0:
            self._num_cached = output.sequence.num_cached
            if output.prompt_logprobs:
                count = self.request.params.prompt_logprobs or 0
                self._prompt_logprobs += [_trimmed(logprobs, count) for logprobs in output.prompt_logprobs]
        if self.timings.first_token_s is None and output.token_id is not None:
            self.timings.first_token_s = now
        self.completions[index].apply(output)

    def update(self, now: float) -> RequestOutput | None:
        """What to tell the user now: news when streaming, else everything at the end."""
        finished = self.finished
        if not (finished or self.stream):
            return None
        if finished:
            self.timings.finished_s = now
        wants_prompt = self.request.params.prompt_logprobs is not None
        output = RequestOutput(
            request_id=self.request.id,
            prompt=self.prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=[c.take() for c in self.completions if not self.stream or c.index in self.touched],
            finished=finished,
            prompt_logprobs=self._prompt_logprobs if wants_prompt else None,
            num_cached_tokens=self._num_cached,
            timings=self.timings,
            error=next((c.error for c in self.completions if c.error is not None), None),
        )
        self._prompt_logprobs = []
        self.touched.clear()
        return output


def _failed(state: _State, completion: _Completion, error: Exception) -> None:
    log.exception("request %s: making its text failed", state.request.id)
    completion.fail(f"making the text failed: {type(error).__name__}")


class OutputProcessor:
    """Holds the text state of every request in flight. One thread owns it."""

    def __init__(self, tokenizer: TokenPieces | None) -> None:
        self._tokenizer = tokenizer
        self._states: dict[str, _State] = {}

    @property
    def num_requests(self) -> int:
        return len(self._states)

    def add(self, request: Request, *, prompt: str | None = None, stream: bool = False) -> None:
        """Start following a request. `prompt` is its text, if it had one, to be handed back with the result."""
        self._states[request.id] = _State(request, prompt, stream, self._tokenizer)

    def process(self, outputs: list[TokenOutput]) -> Processed:
        """A step's news: updates for users, endings for the engine. News of unknown or ended sequences is dropped."""
        now = time.monotonic()
        touched: dict[str, _State] = {}
        ended: list[Ended] = []
        for output in outputs:
            sequence = output.sequence
            state = self._states.get(sequence.request.id)
            if state is None or (completion := state.completions[sequence.index]).finish_reason is not None:
                continue
            if completion.quiet and state.under_way and output.finish_reason is None and output.token_id is not None:
                completion.token_ids.append(output.token_id)  # of most tokens of many prompts nobody asks for more
                continue
            try:
                state.apply(output, now)
            except Exception as error:  # one request's fault must not reach the others
                _failed(state, completion, error)
            reason = completion.finish_reason
            if state.stream:
                state.touched.add(sequence.index)
            if state.stream or reason is not None:  # nobody is told before the end who does not listen
                touched[sequence.request.id] = state
            if reason is not None and output.finish_reason is None:
                stop = completion.stop_reason
                ended.append(Ended(sequence, reason, stop if isinstance(stop, str) else None))
        updates = [self._update(state, now) for state in touched.values()]
        return Processed([update for update in updates if update is not None], ended)

    def abort(self, request_id: str) -> RequestOutput | None:
        """The request's last update, ended as aborted; None when it is unknown or has ended already."""
        state = self._states.get(request_id)
        if state is None:
            return None
        for completion in state.completions:
            if completion.finish_reason is None:
                try:
                    completion.finish(FinishReason.ABORT)
                except Exception as error:  # of an abort nobody expects one
                    _failed(state, completion, error)
                state.touched.add(completion.index)
        return self._update(state, time.monotonic())

    def _update(self, state: _State, now: float) -> RequestOutput | None:
        update = state.update(now)
        if state.finished:
            del self._states[state.request.id]
        return update
