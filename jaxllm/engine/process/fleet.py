"""Several engine processes as one link: replicas of a model, each with its own devices, pages, schedule and Python.

In: commands; a request goes to the replica with the fewest tokens before it, an operation to all. Out: the events of
all, with what concerns the whole said once (`merge`). When a replica dies, its requests end with an error, the others
go on, and it is started again, with the weights and the state that operations gave the others meanwhile. The fleet is
dead when no replica is left, when one could not start, or after too many restarts. Knows nothing of GPUs, text or HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import zmq

from jaxllm.core import Request
from jaxllm.engine.messages import Abort, Add, Beat, Command, Control, Event, Failed, News, Ready, Reply, Step, Stop
from jaxllm.engine.process import merge
from jaxllm.engine.process.links import STOP_WAIT_S, ProcessLink

log = logging.getLogger(__name__)
DIED = "engine_died: the replica that had this request died; try again"
NOBODY = "engine_died: no replica is there; try again"
LOOK_S = 0.1  # between looks for replicas that are gone
SILENT_S = 3.0  # without a heartbeat of one replica: longer, and it counts as stalled
LASTING = ("update_weights", "sleep", "pause")  # operations that a replica which starts again must have had too
UNDONE = {"wake_up": "sleep", "resume": "pause"}
ALONE = ("embed",)  # of one replica, whichever


@dataclass(frozen=True)
class Restarts:
    """Of replicas, until the whole is given up."""

    most: int = 3
    window_s: float = 600.0
    silent_s: float = 30.0  # without a heartbeat it is stopped or wedged, and is killed


@dataclass(slots=True, eq=False)
class _Flight:
    open: set[int]  # sequences that have not ended
    prompt: int  # tokens that nobody has computed, until the first news
    left: int  # tokens still to compute or to sample, at most


@dataclass(eq=False)
class _Replica:
    number: int
    link: ProcessLink
    ready: Ready | None = None
    beat: Beat | None = None
    heard_s: float = 0.0
    load: int = 0  # tokens left of all flights
    flights: dict[str, _Flight] = field(default_factory=dict)
    catching_up: set[int] = field(default_factory=set)  # operations that must be done before it serves again

    @property
    def serves(self) -> bool:
        return self.ready is not None and not self.catching_up


@dataclass
class _Asked:
    control: Control
    waiting: set[int]  # replicas
    replies: list[Reply] = field(default_factory=list)


class FleetLink:
    def __init__(
        self, links: Sequence[ProcessLink], facts: Mapping[str, Any] | None = None, restarts: Restarts | None = None
    ) -> None:
        """`facts`: of the whole, for Ready."""
        self.links, self._facts, self._limits = tuple(links), facts or {}, restarts or Restarts()
        self._lock = threading.Lock()  # whoever sends is not the thread that receives
        self._begin()

    def _begin(self) -> None:
        self._replicas = [_Replica(number, link) for number, link in enumerate(self.links)]
        self._homes: dict[str, _Replica] = {}
        self._asked: dict[int, _Asked] = {}
        self._lasting: dict[str, Control] = {}  # what a replica that starts again is told first
        self._said: deque[Event] = deque()  # by the fleet itself
        self._counted: dict[str, float] = {}  # by processes that are gone
        self._restarted: deque[float] = deque()
        self._restarts, self._was_ready = 0, False
        self._death: str | None = None
        self._next_look_s = 0.0
        self._catch_up_ids = -1

    @property
    def pids(self) -> list[int | None]:
        return [replica.link.pid for replica in self._replicas]

    @property
    def num_ready(self) -> int:
        return sum(replica.ready is not None for replica in self._replicas)

    def loads(self) -> list[int]:
        """Tokens each replica has still to compute or to sample, at most."""
        return [replica.load for replica in self._replicas]

    # ---- life ----

    def start(self) -> None:
        with self._lock:
            self._begin()
            for replica in self._replicas:
                self._start(replica)
            self._watch_all()

    def _start(self, replica: _Replica) -> None:
        replica.link.start()
        replica.heard_s = time.monotonic()

    def _watch_all(self) -> None:
        self._poller = zmq.Poller()
        self._by_socket: dict[Any, _Replica] = {}
        for replica in self._replicas:
            self._poller.register(replica.link.events, zmq.POLLIN)
            self._by_socket[replica.link.events] = replica

    def death(self) -> str | None:
        return self._death

    def kill(self) -> None:
        for link in self.links:
            link.kill()

    def close(self) -> None:
        """All are told before any is waited for; one that is still starting would not listen."""
        alive = [each.link for each in self._replicas if each.ready is not None and each.link.death() is None]
        for link in alive:
            link.send(Stop())
        deadline = time.monotonic() + STOP_WAIT_S
        while any(link.death() is None for link in alive) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.kill()
        for link in self.links:
            link.close()

    # ---- commands ----

    def send(self, *commands: Command) -> None:
        with self._lock:
            parcels: dict[_Replica, list[Command]] = {}
            for command in commands:
                for replica in self._addressees(command):
                    parcels.setdefault(replica, []).append(command)
            for replica, parcel in parcels.items():
                replica.link.send(*parcel)

    def _addressees(self, command: Command) -> list[_Replica]:
        match command:
            case Add():
                return self._take_in(command.request)
            case Abort():
                return self._take_back(command)
            case Control():
                return self._ask(command)
            case Stop():
                return self._replicas

    def _serving(self) -> list[_Replica]:
        return [replica for replica in self._replicas if replica.serves]

    def _take_in(self, request: Request) -> list[_Replica]:
        if request.id in self._homes:
            return [self._homes[request.id]]  # which says that the id is in use
        replica = min(self._serving(), key=lambda each: each.load, default=None)
        if replica is None or replica.ready is None:
            self._said.append(Step([News(request.id, 0, None, "error", error=NOBODY)]))
            return []
        prompt, params = len(request.prompt_token_ids), request.params
        room = replica.ready.max_model_len - prompt
        most = room if params.max_tokens is None else min(room, params.max_tokens)
        replica.flights[request.id] = flight = _Flight(set(range(params.n)), prompt, prompt + most * params.n)
        replica.load += flight.left
        self._homes[request.id] = replica
        return [replica]

    def _take_back(self, command: Abort) -> list[_Replica]:
        replica = self._homes.get(command.request_id)
        if replica is None:
            return []  # crossed in flight with its end
        ended = replica.flights[command.request_id].open if command.index is None else (command.index,)
        self._end(replica, command.request_id, tuple(ended))
        return [replica]

    def _end(self, replica: _Replica, request_id: str, indexes: Sequence[int]) -> None:
        flight = replica.flights[request_id]
        flight.open.difference_update(indexes)
        if not flight.open:
            replica.load -= flight.left
            del replica.flights[request_id], self._homes[request_id]

    def _ask(self, control: Control) -> list[_Replica]:
        to = self._serving()
        if control.operation in ALONE:
            to = sorted(to, key=lambda replica: replica.load)[:1]
        if not to:
            self._said.append(Reply(control.id, error=NOBODY))
        else:
            self._asked[control.id] = _Asked(control, {replica.number for replica in to})
        return to

    # ---- events ----

    def receive(self, timeout_s: float) -> list[Event]:
        waits = 0 if self._said else int(timeout_s * 1000)
        heard = [self._by_socket[socket] for socket, _ in self._poller.poll(waits)]
        now = time.monotonic()
        found: list[Event] = []
        for replica in heard:
            replica.heard_s = now
        for replica in heard:
            events = replica.link.receive(0.0)
            with self._lock:
                for event in events:
                    found += self._hear(replica, event)
        if now >= self._next_look_s:
            self._next_look_s = now + LOOK_S
            for replica in self._replicas:
                if replica not in heard:
                    with self._lock:
                        found += self._look_after(replica, now)
        while self._said:
            found.append(self._said.popleft())
        return found

    def _hear(self, replica: _Replica, event: Event) -> Iterator[Event]:
        match event:
            case Step():
                self._account(replica, event.news)
                yield event
            case Ready():
                yield from self._note_ready(replica, event)
            case Beat():
                replica.beat = event
                if self._was_ready:
                    yield self._beat()
            case Reply():
                yield from self._note_reply(replica, event)
            case Failed():
                log.error("replica %d: %s", replica.number, event.message)
                if not self._was_ready:
                    yield event

    def _account(self, replica: _Replica, news: list[News]) -> None:
        """What is done is no load any more."""
        flights, done = replica.flights, 0
        for one in news:
            flight = flights.get(one.request_id)
            if flight is None:
                continue
            if one.error is not None and flight.prompt:  # it was refused, with all its sequences
                self._end(replica, one.request_id, tuple(flight.open))
                continue
            count = flight.prompt + (one.token_id is not None)
            flight.prompt = 0
            flight.left -= count
            done += count
            if one.finish_reason is not None:
                replica.load -= done
                done = 0
                self._end(replica, one.request_id, (one.index,))
        replica.load -= done

    def _note_ready(self, replica: _Replica, event: Ready) -> Iterator[Event]:
        replica.ready = event
        if not self._was_ready:
            if self.num_ready == len(self._replicas):
                self._was_ready = True
                yield merge.ready([each.ready for each in self._replicas if each.ready is not None], self._facts)
            return
        log.warning("replica %d is there again", replica.number)
        for control in self._lasting.values():
            number, self._catch_up_ids = self._catch_up_ids, self._catch_up_ids - 1
            replica.catching_up.add(number)
            replica.link.send(Control(number, control.operation, control.arguments))

    def _note_reply(self, replica: _Replica, event: Reply) -> Iterator[Event]:
        if event.id in replica.catching_up:
            replica.catching_up.discard(event.id)
            if event.error is not None:  # it must not serve with other weights than the rest
                log.error("replica %d cannot be as the others are: %s", replica.number, event.error)
                replica.ready = None
                replica.link.kill()
            return
        asked = self._asked.get(event.id)
        if asked is not None:
            asked.replies.append(event)
            yield from self._answered(asked, replica)

    def _answered(self, asked: _Asked, replica: _Replica) -> Iterator[Event]:
        """By this replica, or it will not any more; the whole answer once nobody is waited for."""
        asked.waiting.discard(replica.number)
        if asked.waiting:
            return
        control = asked.control
        del self._asked[control.id]
        if not asked.replies:
            yield Reply(control.id, error=DIED)
            return
        answer = merge.reply(control.id, control.operation, asked.replies, self._own_stats())
        if answer.error is None:
            self._lasting.pop(UNDONE.get(control.operation, control.operation), None)
            if control.operation in LASTING:
                self._lasting[control.operation] = control  # the latest last
        yield answer

    def _beat(self) -> Beat:
        now = time.monotonic()
        silent = max((now - replica.heard_s for replica in self._replicas if replica.ready is not None), default=0.0)
        beats = [replica.beat for replica in self._replicas if replica.beat is not None]
        return merge.beat(beats, self._own_stats(), silent if silent > SILENT_S else 0.0)

    def _own_stats(self) -> dict[str, float]:
        """What no process that lives has counted."""
        return {**self._counted, "replicas_serving": len(self._serving()), "replica_restarts": self._restarts}

    # ---- replicas that die ----

    def _look_after(self, replica: _Replica, now: float) -> Iterator[Event]:
        why = replica.link.death()
        if why is None:
            if replica.ready is not None and now - replica.heard_s > self._limits.silent_s:
                log.error("replica %d was silent too long and is killed", replica.number)
                replica.link.kill()
            return
        if self._death is not None:
            return
        while last := replica.link.receive(0.0):  # words that came after the look at its socket
            for event in last:
                yield from self._hear(replica, event)
        yield from self._bury(replica, why)

    def _bury(self, replica: _Replica, why: str) -> Iterator[Event]:
        log.error("replica %d died (%s); %d requests end with an error", replica.number, why, len(replica.flights))
        lost = [
            News(request_id, index, None, "error", error=DIED)
            for request_id, flight in replica.flights.items()
            for index in sorted(flight.open)
        ]
        for request_id in replica.flights:
            del self._homes[request_id]
        if replica.beat is not None:
            self._counted = merge.sums([self._counted, merge.counters(replica.beat.stats)])
        self._replicas[replica.number] = again = _Replica(replica.number, replica.link)
        if lost:
            yield Step(lost)
        for asked in [each for each in self._asked.values() if replica.number in each.waiting]:
            yield from self._answered(asked, replica)
        self._restart(again, why)

    def _restart(self, replica: _Replica, why: str) -> None:
        now = time.monotonic()
        while self._restarted and now - self._restarted[0] > self._limits.window_s:
            self._restarted.popleft()
        if not self._was_ready:
            self._death = f"replica {replica.number} could not start: {why}"
        elif self.num_ready == 0:
            self._death = f"no replica is left; the last one died of {why}"
        elif len(self._restarted) >= self._limits.most:
            self._death = f"replicas died too often; the last one of {why}"
        else:
            self._restarted.append(now)
            self._restarts += 1
            try:
                self._start(replica)
            except OSError as error:
                self._death = f"replica {replica.number} could not be started: {error.strerror}"
                return
            self._watch_all()
