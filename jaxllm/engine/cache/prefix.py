"""What the scheduler asks of a prefix cache. Hashed and radix caches answer to the same five calls.

In: sequences. Out: pages that already hold the keys and values of a sequence's first tokens. Knows nothing of
budgets, rows or policies. Pages are reserved and returned through the PagePool; a cache only marks pages as kept,
drops them, and remembers what they hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from jaxllm.core import Sequence


@dataclass
class CacheStats:
    hit_tokens: int = 0
    miss_tokens: int = 0
    evicted_pages: int = 0


class PrefixIndex(Protocol):
    """Life of a sequence: match and acquire at each admission, insert as pages fill, release or discard at the end."""

    stats: CacheStats

    @property
    def enabled(self) -> bool:
        """False when nothing is ever found, so that nobody waits for a hit."""
        ...

    def match(self, sequence: Sequence) -> list[int]:
        """Pages of the longest known prefix of `sequence.tokens`; at least one token is left to compute.

        Takes nothing: the pages may go with the next eviction unless acquired first.
        """
        ...

    def acquire(self, sequence: Sequence, pages: list[int]) -> None:
        """The sequence is admitted and holds `pages` (a match, maybe empty) from now on."""
        ...

    def insert(self, sequence: Sequence) -> None:
        """Remembers the sequence's pages that `num_computed` tokens fill and that are not remembered yet."""
        ...

    def evict(self, count: int) -> int:
        """Makes up to `count` cached pages free, least useful first; returns how many."""
        ...

    def release(self, sequence: Sequence) -> None:
        """The sequence has ended: drops what is known about it, not its pages."""
        ...

    def discard(self, sequence: Sequence) -> None:
        """The sequence has failed: also forgets every page that it put in. Call while it still holds its pages."""
        ...

    def check(self) -> None:
        """Raises AssertionError when index and pool disagree."""
        ...
