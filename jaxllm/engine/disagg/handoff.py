"""What passes from where prompts are computed to where tokens are: blocks of pages, first tokens, failures.

In: a request and the pages that the decode side has already. Out: Items, in any order but for one rule: what is said of
a key that was taken back is ignored. Knows nothing of devices, sockets or schedules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from jaxllm.core import Request, RowResult, Sequence


class Key(NamedTuple):
    """One attempt at one sequence's prompt: a sequence that lost its pages on the way is awaited under a new key."""

    request_id: str
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  # tuple.index, which nobody wants of a key
    turn: int


class Pages(Protocol):
    """[L, 2, N, K, page, H] on a device, or on its way there: a jax.Array to all but tests."""

    @property
    def nbytes(self) -> int: ...

    def is_ready(self) -> bool: ...

    def block_until_ready(self) -> object: ...


@dataclass(frozen=True)
class PageBlock:
    """Pages of some layers: `entries` name whose they are, and which of its pages."""

    layers: range
    entries: SequenceOf[tuple[Key, int]]
    pages: Pages  # where the decode side's pages are; N >= len(entries)


@dataclass(frozen=True)
class FirstToken:
    """The prompt is computed; its last pages may still be on their way."""

    key: Key
    result: RowResult
    num_cached: int  # prompt tokens that the prefill side did not have to compute


@dataclass(frozen=True)
class PrefillFailed:
    key: Key
    error: str  # for the user


@dataclass(frozen=True)
class PrefillRestarted:
    """Nothing that was said of it counts any more: it is computed again."""

    key: Key


Item = PageBlock | FirstToken | PrefillFailed | PrefillRestarted


class Prefills(Protocol):
    """What computes prompts: engines in this process, or peers in others."""

    def check_fits(self, request: Request) -> None:
        """Raises RequestError for a prompt that can never be computed there."""
        ...

    def begin(self, key: Key, sequence: Sequence, first_page: int) -> None:
        """Compute the sequence's prompt; the pages before `first_page` are not wanted."""
        ...

    def cancel(self, key: Key) -> None:
        """It is not wanted any more, or all of it has come."""
        ...

    def landed(self, block: PageBlock) -> None:
        """The block's memory is needed no more."""
        ...

    def turn(self, wait: bool) -> list[Item]:
        """Goes on with everything; `wait`: there is nothing else to do until an item comes."""
        ...

    @property
    def moving(self) -> bool:
        """Pages here are held for blocks that are under way, though nobody may want them any more."""
        ...

    def stats(self) -> dict[str, float]: ...

    def forget_cached(self) -> None:
        """Cached pages that no running sequence holds are not to be found again."""
        ...

    def check(self) -> None:
        """Raises AssertionError when the books do not balance."""
        ...


def twin(sequence: Sequence) -> Sequence:
    """The same sequence as the prefill side sees it: it ends with its first token.

    Seed, position, mask and penalties are the prompt's own, so the token is the one the sequence would have got.
    """
    params = sequence.request.params
    short = params.replace(max_tokens=1, min_tokens=min(1, params.min_tokens))
    return Sequence(dataclasses.replace(sequence.request, params=short), sequence.index, grammar=sequence.grammar)
