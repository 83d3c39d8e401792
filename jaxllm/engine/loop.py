"""The engine's thread: takes commands, steps while there is work, gives events. One loop body, one owner of the engine.

In: commands from `receive` (a queue or a socket). Out: events through `send`. It decides queue timeouts, turns a failed
step into one error for each request in flight, and says through `Progress` whether it moves. Knows nothing of sockets,
processes, text or HTTP.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from jaxllm.core import FinishReason, Grammar, JaxLLMError, Request, RequestError, Sequence, TokenOutput
from jaxllm.engine.disagg.engine import DisaggregatedEngine
from jaxllm.engine.engine import Engine
from jaxllm.engine.messages import Abort, Add, Beat, Command, Control, Event, News, Ready, Reply, Step, Stop
from jaxllm.engine.operations import OPERATIONS, Operation, Refused, reset_prefix_cache
from jaxllm.engine.replicas import ReplicaFailedError, ReplicatedEngine
from jaxllm.engine.retry import is_device_lost

log = logging.getLogger(__name__)

Receive = Callable[[float], list[Command]]  # waits at most so many seconds for the first command
Send = Callable[[Event], None]

IDLE_WAIT_S = 0.5
PREPARE_WAIT_S = 0.005  # between looks at a grammar that compiles, while nothing else is to do
SWEEP_S = 0.05  # how often queue timeouts are looked at
SICK_AFTER = 3  # steps with numerical errors in a row
STEP_FAILED = "engine_error: a step of the engine failed; this request was ended by it"


class EngineBroken(RuntimeError):
    """The engine's state cannot be trusted any more; the process must end and start again."""


@dataclass
class Progress:
    """What a watchdog and the heartbeat read from other threads: single values, written whole."""

    turn_began_s: float | None = None  # None between turns
    paused: bool = False
    sick: bool = False
    asleep: bool = False
    stats: dict[str, float] = field(default_factory=dict)

    def stalled_s(self) -> float:
        began = self.turn_began_s
        return 0.0 if began is None else time.monotonic() - began

    def beat(self) -> Beat:
        return Beat(self.stalled_s(), self.paused, self.sick, self.stats, self.asleep)


@dataclass
class _Flight:
    sequences: list[Sequence]
    queue_deadline_s: float | None


@dataclass
class EngineLoop:
    engine: Engine | ReplicatedEngine | DisaggregatedEngine
    receive: Receive
    send: Send
    operations: dict[str, Operation] = field(default_factory=lambda: dict(OPERATIONS))
    progress: Progress = field(default_factory=Progress)
    stopped: bool = False
    step_failures: int = 0
    holding: bool = False  # new requests wait outside, until an operation that needs an empty engine is done
    _flights: dict[str, _Flight] = field(default_factory=dict)
    _queued: dict[str, _Flight] = field(default_factory=dict)  # those that never ran
    _begun: dict[str, float] = field(default_factory=dict)  # when each came into the batch, until it is told
    _held: dict[str, tuple[Add, Grammar | None]] = field(default_factory=dict)
    _preparing: dict[str, tuple[Add, Future[Any]]] = field(default_factory=dict)  # requests whose grammar compiles
    _jobs: deque[tuple[int, Generator[None, None, Any]]] = field(default_factory=deque)
    borrowed: set[int] = field(default_factory=set)  # pages that a job holds
    _failed_in_a_row: int = 0
    _sick_steps: int = 0
    _next_sweep_s: float = 0.0

    def run(self, facts: dict[str, Any] | None = None) -> None:
        """Until a Stop command. Raises EngineBroken when the engine cannot go on."""
        self.measure()
        self.send(self.ready(facts or {}))
        while not self.stopped:
            for command in self.receive(0.0 if self._can_step else self._patience()):
                self._handle(command)
            self.progress.turn_began_s = time.monotonic()
            self._turn()
            self.progress.turn_began_s = None

    def ready(self, facts: dict[str, Any]) -> Ready:
        limits, pool, intake = self.engine.scheduler.config, self.engine.scheduler.pool, self.engine.intake
        return Ready(
            max_model_len=limits.max_model_len,
            max_num_seqs=limits.max_num_seqs,
            capacity_tokens=pool.num_pages * pool.page_size,
            vocab_size=intake.vocab_size,
            eos_token_ids=intake.eos_token_ids,
            bos_token_id=intake.bos_token_id,
            default_params=intake.default_params,
            facts=facts,
        )

    @property
    def _can_step(self) -> bool:
        return (self.engine.has_work and not self.progress.paused) or bool(self._jobs)

    def _patience(self) -> float:
        if self._preparing:
            return PREPARE_WAIT_S
        return SWEEP_S if self._flights else IDLE_WAIT_S

    def _turn(self) -> None:
        if time.monotonic() >= self._next_sweep_s:
            self._sweep()
        if self._preparing:
            self._admit_prepared()
        if self._jobs:
            self._advance(*self._jobs.popleft())
        if self.engine.has_work:
            self._step(self.engine.drain if self.progress.paused else self.engine.step)
        self.measure()

    # ---- commands ----

    def _handle(self, command: Command) -> None:
        match command:
            case Add():
                self._add(command)
            case Abort():
                self._abort(command)
            case Control():
                self._control(command)
            case Stop():
                self.stopped = True

    def _add(self, command: Add) -> None:
        """A grammar compiles in its own worker meanwhile; the steps of others go on."""
        if self.progress.asleep:
            self._fail(command.request.id, "asleep: the engine is asleep; wake it up first")
            return
        future = self.engine.prepare(command.request)
        if future is None:
            self._admit(command)
        elif future.done():
            self._admit_with(command, future)
        else:
            self._preparing[command.request.id] = (command, future)

    def _admit_prepared(self) -> None:
        now = time.monotonic()
        for request_id, (command, future) in list(self._preparing.items()):
            if future.done():
                del self._preparing[request_id]
                self._admit_with(command, future)
            elif (deadline := _deadline(command)) is not None and now > deadline:
                del self._preparing[request_id]
                self._fail(request_id, "queue_timeout: waited too long for its grammar to compile")

    def _admit_with(self, command: Add, future: Future[Any]) -> None:
        """With the grammar in hand: looking it up again could mean compiling it again, here."""
        error = future.exception()
        if error is None:
            self._admit(command, future.result())
        elif isinstance(error, RequestError):
            self._refuse(command.request, error)
        else:
            log.error("compiling a grammar failed", exc_info=error)
            self._fail(command.request.id, "internal_error: compiling this request's grammar failed")

    def _fail(self, request_id: str, error: str) -> None:
        self.send(Step([News(request_id, 0, None, "error", error=error)]))

    def _refuse(self, request: Request, error: RequestError) -> None:
        spec = request.params.grammar
        code = "invalid_schema" if spec is not None and error.field == spec.field else "invalid_request"
        self._fail(request.id, f"{code}/{error.field}: {error}")

    def _admit(self, command: Add, grammar: Grammar | None = None) -> None:
        request = command.request
        if self.holding:
            self._held[request.id] = command, grammar
            return
        try:
            sequences = self.engine.add(self._salted(request), grammar)
        except RequestError as error:
            self.engine.abort(request.id)
            self._refuse(request, error)
            return
        self._flights[request.id] = self._queued[request.id] = _Flight(sequences, _deadline(command))

    def _salted(self, request: Request) -> Request:
        """Pages that other weights computed must not be found."""
        keeper = self.engine.residency
        if keeper is None or not keeper.updates:
            return request
        return dataclasses.replace(request, cache_salt=f"{keeper.updates}/{request.cache_salt}")

    def release(self) -> None:
        """What waited outside comes in."""
        self.holding = False
        held, self._held = self._held, {}
        for command, grammar in held.values():
            if self.progress.asleep:
                self._fail(command.request.id, "asleep: the engine is asleep; wake it up first")
            else:
                self._admit(command, grammar)

    def end_all(self) -> None:
        """Every request in flight ends here as aborted, and hears of it."""
        news = []
        for request_id, flight in list(self._flights.items()):
            for sequence in reversed(flight.sequences):
                if not sequence.finished:
                    self.engine.scheduler.finish(sequence, FinishReason.ABORT)
                    news.append(News(request_id, sequence.index, None, "abort"))
            self._forget_if_done(request_id)
        self.send(Step(news))

    def _abort(self, command: Abort) -> None:
        self._preparing.pop(command.request_id, None)
        self._held.pop(command.request_id, None)
        flight = self._flights.get(command.request_id)
        if flight is None:
            return  # crossed in flight with its end
        for sequence in reversed(flight.sequences):
            if command.index is None or sequence.index == command.index:
                self.engine.scheduler.finish(sequence, FinishReason.ABORT)
        self._forget_if_done(command.request_id)

    def _control(self, command: Control) -> None:
        operation = self.operations.get(command.operation)
        if operation is None:
            self.send(Reply(command.id, error=f"not_supported: the engine has no operation {command.operation!r}"))
            return
        try:
            value = operation(self, command.arguments)
        except EngineBroken:
            raise
        except Exception as error:  # one operation's failure must not end the streams
            self._answer_failure(command.id, error)
            return
        if isinstance(value, Generator):
            self._jobs.append((command.id, value))
        else:
            self._reply(command.id, value)

    def _reply(self, number: int, value: Any) -> None:
        """What it changed is known at once, not with the next heartbeat."""
        self.send(self.progress.beat())
        self.send(Reply(number, value))

    def _advance(self, number: int, job: Generator[None, None, Any]) -> None:
        try:
            next(job)
        except StopIteration as end:
            self._reply(number, end.value)
        except EngineBroken:
            raise
        except Exception as error:
            self._answer_failure(number, error)
        else:
            self._jobs.append((number, job))

    def _answer_failure(self, number: int, error: Exception) -> None:
        if isinstance(error, Refused):
            self.send(Reply(number, error=f"{error.code}: {error}"))
        elif isinstance(error, JaxLLMError):
            self.send(Reply(number, error=f"invalid_request: {error}"))
        else:
            log.error("an operation failed", exc_info=error)
            code = "numerical_error" if isinstance(error, FloatingPointError) else "internal_error"
            self.send(Reply(number, error=f"{code}: {type(error).__name__}"))

    # ---- steps ----

    def _step(self, step: Callable[[], list[TokenOutput]]) -> None:
        try:
            outputs = step()
        except ReplicaFailedError as failure:
            self._tell(failure.outputs)
            self._recover(failure.__cause__ or failure, failure.in_a_row, failure.requests)
            return
        except Exception as error:
            self._failed_in_a_row += 1
            self._recover(error, self._failed_in_a_row)
            return
        self._failed_in_a_row = 0
        self._tell(outputs)

    def _tell(self, outputs: list[TokenOutput]) -> None:
        self._watch_numbers(outputs)
        if self._queued:
            self._note_begun()
        if outputs:
            keeper = self.engine.residency
            version = "" if keeper is None else keeper.version
            self.send(Step([_news(output, self._begun) for output in outputs], version))
        for output in outputs:
            if output.finish_reason is not None:
                self._forget_if_done(output.sequence.request.id)

    def _recover(self, error: BaseException, in_a_row: int, requests: Collection[str] | None = None) -> None:
        """A step raised: each request of it ends with one error; what the host knows must balance after.

        `requests`: of the engine that failed, where there are several; without it, all that are in flight.
        """
        hit = [name for name in self._flights if requests is None or name in requests]
        log.error("a step failed; %d requests end with an error", len(hit), exc_info=error)
        if is_device_lost(error):
            raise EngineBroken("the device is lost") from error
        self.step_failures += 1
        news = []
        for request_id in hit:
            for sequence in reversed(self._flights[request_id].sequences):
                if not sequence.finished:
                    self.engine.scheduler.finish(sequence, FinishReason.ERROR)
                    news.append(News(request_id, sequence.index, None, "error", error=STEP_FAILED))
            self._forget_if_done(request_id)
        self.send(Step(news))
        reset_prefix_cache(self, {})
        try:
            self.engine.scheduler.check(self.borrowed)
        except AssertionError as imbalance:
            raise EngineBroken(f"the books do not balance after a failed step: {imbalance}") from imbalance
        if in_a_row >= 2:
            raise EngineBroken("two steps in a row failed")

    def _note_begun(self) -> None:
        """When requests came into the batch; their first news will say so."""
        now = time.monotonic()
        for request_id, flight in list(self._queued.items()):
            if not _never_ran(flight):
                self._begun[request_id] = now
                del self._queued[request_id]

    def _watch_numbers(self, outputs: list[TokenOutput]) -> None:
        bad = any(output.error is not None and output.error.startswith("numerical_error") for output in outputs)
        good = any(output.token_id is not None for output in outputs)
        if bad:
            self._sick_steps += 1
        elif good:
            self._sick_steps = 0
        self.progress.sick = self._sick_steps >= SICK_AFTER

    def _sweep(self) -> None:
        """Ends requests that waited too long for the batch; decided here once, by this clock."""
        now = time.monotonic()
        self._next_sweep_s = now + SWEEP_S
        late = [
            request_id
            for request_id, flight in self._queued.items()
            if flight.queue_deadline_s is not None and now > flight.queue_deadline_s and _never_ran(flight)
        ]
        for request_id in late:
            self._abort(Abort(request_id))
            self._fail(request_id, "queue_timeout: waited too long in the queue")

    def _forget_if_done(self, request_id: str) -> None:
        flight = self._flights.get(request_id)
        if flight is not None and all(sequence.finished for sequence in flight.sequences):
            del self._flights[request_id]
            self._queued.pop(request_id, None)
            self._begun.pop(request_id, None)

    def measure(self) -> None:
        stats = self.engine.scheduler.metrics.as_dict()
        pool = self.engine.scheduler.pool
        stats |= {
            "running": self.engine.scheduler.num_running,
            "waiting": self.engine.scheduler.num_waiting,
            "free_pages": pool.num_free,
            "cached_pages": pool.num_cached,
            "held_pages": pool.num_held,
            "total_pages": pool.num_pages,
            "step_failures": self.step_failures,
        }
        self.progress.stats = stats


def _deadline(command: Add) -> float | None:
    return None if command.queue_timeout_s is None else command.request.arrival_s + command.queue_timeout_s


def _never_ran(flight: _Flight) -> bool:
    """Admission gives a row at once, and a preempted sequence has been admitted before."""
    return all(s.row is None and not s.num_preempted and not s.num_output for s in flight.sequences)


def _news(output: TokenOutput, begun: dict[str, float]) -> News:
    sequence = output.sequence
    return News(
        sequence.request.id,
        sequence.index,
        output.token_id,
        output.finish_reason,
        sequence.stop_reason if output.finish_reason is not None else None,
        sequence.num_cached,
        output.error,
        output.logprobs,
        output.prompt_logprobs,
        begun.pop(sequence.request.id, None) if begun else None,
    )


# ---- beside the loop ----


def watch(
    progress: Progress,
    send: Send,
    give_up: Callable[[], None],
    *,
    stall_s: float,
    beat_s: float = 0.5,
    when_idle: bool = True,
) -> threading.Thread:
    """A thread that sends a Beat every `beat_s`; when one turn lasts `stall_s` it dumps all stacks and gives up.

    Not `when_idle`: only where something has changed, for a listener that does not listen while it asks for nothing.
    """

    def body() -> None:
        last: Beat | None = None
        while True:
            time.sleep(beat_s)
            beat = progress.beat()
            if when_idle or beat != last:
                send(beat)
            last = beat
            if progress.stalled_s() > stall_s:
                log.error("the engine has not finished a step for %.1f s", progress.stalled_s())
                faulthandler.dump_traceback(all_threads=True)
                give_up()
                return

    thread = threading.Thread(target=body, name="engine-watch", daemon=True)
    thread.start()
    return thread
