"""Who may add to the queue now: a bound on sequences, one on waiting prompt tokens, and a rate for each tenant.

In: a request's slots and tokens. Out: nothing, or ApiError 429 that says when to come again. Knows nothing of HTTP.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from serve.errors import ApiError

MAX_TENANTS = 10_000


@dataclass
class Admission:
    max_slots: int  # the batch's rows and the queue's places
    max_waiting_tokens: int
    slots: int = 0
    waiting_tokens: int = 0
    rejected: int = 0

    def check_slots(self, slots: int) -> None:
        """Before any work is spent on a request."""
        if self.slots + slots > self.max_slots:
            self.rejected += 1
            room = max(0, self.max_slots - self.slots)
            message = f"the queue is full: {slots} sequences asked for, room for {room}; try again later"
            if slots > self.max_slots:
                message = f"{slots} sequences in one request: at most {self.max_slots} are taken"
                raise ApiError(400, message, param="n", code="too_many_sequences")
            raise ApiError(429, message, code="queue_full", retry_after_s=1)

    def enter(self, slots: int, tokens: int) -> None:
        self.check_slots(slots)
        if self.waiting_tokens and self.waiting_tokens + tokens > self.max_waiting_tokens:
            self.rejected += 1
            message = f"{self.waiting_tokens} prompt tokens wait already; try again later"
            raise ApiError(429, message, code="queue_full", retry_after_s=2)
        self.slots += slots
        self.waiting_tokens += tokens

    def started(self, tokens: int) -> None:
        self.waiting_tokens -= tokens

    def leave(self, slots: int) -> None:
        self.slots -= slots


@dataclass
class _Bucket:
    level: float
    at_s: float


@dataclass
class RateLimit:
    """`per_minute` units a minute for each tenant, a minute's worth at once at most; 0 = no limit."""

    per_minute: int
    what: str
    _buckets: OrderedDict[str, _Bucket] = field(default_factory=OrderedDict)

    def spend(self, tenant: str, units: float) -> None:
        if not self.per_minute:
            return
        now = time.monotonic()
        bucket = self._buckets.get(tenant)
        if bucket is None:
            bucket = self._buckets[tenant] = _Bucket(float(self.per_minute), now)
            if len(self._buckets) > MAX_TENANTS:
                self._buckets.popitem(last=False)
        rate = self.per_minute / 60
        bucket.level = min(float(self.per_minute), bucket.level + (now - bucket.at_s) * rate)
        bucket.at_s = now
        if bucket.level < min(units, self.per_minute):
            wait = (min(units, self.per_minute) - bucket.level) / rate
            message = f"over the rate of {self.per_minute} {self.what} a minute"
            raise ApiError(429, message, code="rate_limited", retry_after_s=wait)
        bucket.level -= units
