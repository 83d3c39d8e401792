"""One server behind the gateway: its load, its health and its circuit.

In: what became of attempts, and what probes read. Out: whether it may be given a request now. Time is passed in. Knows
nothing of sockets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from serve.gateway.settings import GatewaySettings


@dataclass(frozen=True)
class Vitals:
    """What one look at a worker found."""

    ready: bool
    why: str = ""  # when it is not
    generated_tokens: float | None = None  # None: it does not say
    running: float = 0.0
    waiting: float = 0.0
    restarts: float = 0.0


@dataclass
class Circuit:
    """Closed: requests pass. Open: none do until a pause is over. Then one does, and decides."""

    break_after: int
    first_pause_s: float
    max_pause_s: float
    failures: int = 0  # in a row
    opened: int = 0
    open_until_s: float | None = None
    trying: bool = False  # half open: one request is on its way

    def admits(self, now_s: float) -> bool:
        return self.open_until_s is None or (now_s >= self.open_until_s and not self.trying)

    def enter(self) -> None:
        self.trying = self.open_until_s is not None

    def succeeded(self) -> None:
        self.failures, self.opened, self.open_until_s, self.trying = 0, 0, None, False

    def failed(self, now_s: float) -> None:
        self.failures += 1
        if self.trying or (self.open_until_s is None and self.failures >= self.break_after):
            pause_s = min(self.first_pause_s * 2**self.opened, self.max_pause_s)
            self.opened, self.open_until_s = min(self.opened + 1, 30), now_s + pause_s
        self.trying = False

    @property
    def state(self) -> str:
        if self.open_until_s is None:
            return "closed"
        return "half_open" if self.trying else "open"


@dataclass
class Worker:
    name: str
    settings: GatewaySettings
    circuit: Circuit = field(init=False)
    ready: bool = False  # until a probe says so
    why: str = "not looked at yet"
    drained: bool = False  # taken out by a person
    retired: bool = False  # another address took its place
    in_flight: int = 0
    load: float = 0.0  # of what we sent and it has not answered
    foreign: float = 0.0  # requests it says it has beyond ours
    attempts: dict[object, Callable[[str], None]] = field(default_factory=dict)  # how to end each one
    on_restart: Callable[[], None] = lambda: None
    _tokens: float | None = None
    _restarts: float = 0.0
    _moved_s: float | None = None  # when its tokens last moved, or nothing ran

    def __post_init__(self) -> None:
        known = self.settings
        self.circuit = Circuit(known.break_after, known.break_s, known.max_break_s)

    def usable(self, now_s: float) -> bool:
        return self.ready and not self.drained and not self.retired and self.circuit.admits(now_s)

    @property
    def burden(self) -> float:
        return self.load + self.foreign

    def enter(self, attempt: object, cost: float, on_lost: Callable[[str], None]) -> None:
        self.in_flight += 1
        self.load += cost
        self.attempts[attempt] = on_lost
        self.circuit.enter()

    def leave(self, attempt: object, cost: float) -> None:
        self.in_flight -= 1
        self.load = self.load - cost if self.in_flight else 0.0
        del self.attempts[attempt]

    def looked_at(self, vitals: Vitals, now_s: float) -> None:
        """Judges what a probe found; a worker that is stuck or gone loses its attempts."""
        restarted = vitals.restarts > self._restarts
        self._restarts = max(vitals.restarts, self._restarts)
        if restarted:
            self.on_restart()
        moved = vitals.generated_tokens != self._tokens or vitals.generated_tokens is None or not vitals.running
        self._tokens = vitals.generated_tokens
        if moved or self._moved_s is None:
            self._moved_s = now_s
        stuck = now_s - self._moved_s > self.settings.stall_s
        self.foreign = max(0.0, vitals.running + vitals.waiting - self.in_flight)
        if not vitals.ready or stuck:
            self.unready(f"no token in {now_s - self._moved_s:.0f} s" if stuck else vitals.why, lost=stuck)
        else:
            self.ready, self.why = True, ""

    def unready(self, why: str, *, lost: bool) -> None:
        """No new requests; when it is lost, what it has is given up too."""
        self.ready, self.why = False, why
        if lost:
            self.foreign = 0.0
            for give_up in list(self.attempts.values()):
                give_up(why)
