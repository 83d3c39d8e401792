"""Who goes first: ordering keys of sequences, and a queue that keeps sequences in that order.

In: a sequence and its place in the order of arrival. Out: a key; the smaller goes first, the greatest is preempted
first. Knows nothing of pages, rows or budgets.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator

from jaxllm.core import Sequence

Key = tuple[int, ...]
Policy = Callable[[Sequence, int], Key]


def fcfs(sequence: Sequence, arrival: int) -> Key:
    """First come, first served."""
    return (arrival,)


def priority(sequence: Sequence, arrival: int) -> Key:
    """The lower Request.priority first; ties by arrival."""
    return sequence.request.priority, arrival


def longest_prefix(sequence: Sequence, arrival: int) -> Key:
    """First come, first served, except that the scheduler admits those first whose prefix is cached the longest."""
    return (arrival,)


POLICIES: dict[str, Policy] = {"fcfs": fcfs, "priority": priority, "longest_prefix": longest_prefix}


class SequenceQueue:
    """Sequences ordered by key. Keys are distinct: arrival numbers are."""

    def __init__(self) -> None:
        self._keys: list[Key] = []
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __getitem__(self, index: int) -> Sequence:
        return self._sequences[index]

    def push(self, key: Key, sequence: Sequence) -> None:
        place = bisect_left(self._keys, key)
        self._keys.insert(place, key)
        self._sequences.insert(place, sequence)

    def remove(self, key: Key) -> None:
        place = bisect_left(self._keys, key)
        if place == len(self._keys) or self._keys[place] != key:
            raise KeyError(key)
        del self._keys[place], self._sequences[place]

    def check(self) -> None:
        assert all(a < b for a, b in zip(self._keys, self._keys[1:], strict=False)), "a queue is out of order"
        assert len(self._keys) == len(self._sequences)
