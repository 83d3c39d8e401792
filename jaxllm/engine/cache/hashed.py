"""Prefix cache by hash: a full page is found again by what it holds and everything before it.

In: sequences. Out: pages that already hold their first tokens. Knows nothing of scheduling or devices.

A page's key is sha256(parent key, its token ids); the first page's parent is sha256(salt), so that a key stands for
the salt and every token up to the page's end. sha256 because a collision would show one user another's answer: the
key must be beyond what a client can construct. Eviction takes the page released longest ago; sequences release their
pages last page first, so that a prefix outlives its continuations.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field

from jaxllm.core import Sequence
from jaxllm.engine.cache.pages import PagePool
from jaxllm.engine.cache.prefix import CacheStats


@dataclass(slots=True)
class _Chain:
    """Keys of a sequence's full pages: they depend on its tokens only, so they outlive preemption."""

    root: bytes
    keys: list[bytes] = field(default_factory=list)
    num_acquired: int = 0  # pages that came from a match at this admission
    num_inserted: int = 0  # pages in the index, the matched ones included


class PrefixCache:
    """Satisfies PrefixIndex."""

    enabled = True

    def __init__(self, pool: PagePool) -> None:
        self.stats = CacheStats()
        self._pool = pool
        self._page_size = pool.page_size
        self._pack = struct.Struct(f"<{pool.page_size}q").pack
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._chains: dict[Sequence, _Chain] = {}

    def match(self, sequence: Sequence) -> list[int]:
        wanted = (len(sequence.tokens) - 1) // self._page_size
        keys = self._hash(sequence, wanted).keys
        pages: list[int] = []
        for number in range(wanted):
            page = self._pages.get(keys[number])
            if page is None:
                break
            pages.append(page)
        return pages

    def acquire(self, sequence: Sequence, pages: list[int]) -> None:
        self._pool.share(pages)
        chain = self._hash(sequence, 0)
        chain.num_acquired = chain.num_inserted = len(pages)
        if sequence.num_preempted == 0:  # a resumed sequence mostly finds itself: that is not reuse
            hit_tokens = len(pages) * self._page_size
            self.stats.hit_tokens += hit_tokens
            self.stats.miss_tokens += sequence.num_prompt - hit_tokens

    def insert(self, sequence: Sequence) -> None:
        full = sequence.num_computed // self._page_size
        chain = self._hash(sequence, full)
        for number in range(chain.num_inserted, full):
            key, page = chain.keys[number], sequence.pages[number]
            # Two sequences may have computed the same tokens side by side: the first page stays the known one.
            if key not in self._pages:
                self._pages[key], self._keys[page] = page, key
                self._pool.keep(page)
        chain.num_inserted = max(full, chain.num_inserted)

    def evict(self, count: int) -> int:
        # Listed first: dropping a page takes it out of what cached() iterates over.
        pages = [page for page, _ in zip(self._pool.cached(), range(count))]
        for page in pages:
            self._forget(page)
        self.stats.evicted_pages += len(pages)
        return len(pages)

    def release(self, sequence: Sequence) -> None:
        self._chains.pop(sequence, None)

    def discard(self, sequence: Sequence) -> None:
        chain = self._chains.pop(sequence, None)
        if chain is None:
            return
        for page in sequence.pages[chain.num_acquired :]:
            if page in self._keys:
                self._forget(page)

    def check(self) -> None:
        assert len(self._pages) == len(self._keys), "a page has two keys"
        for key, page in self._pages.items():
            assert self._keys.get(page) == key, f"page {page} is indexed under another key"
            assert self._pool.kept(page), f"page {page} is indexed and not kept"
        for page in self._pool.cached():
            assert page in self._keys, f"page {page} is cached and not indexed"

    def _hash(self, sequence: Sequence, count: int) -> _Chain:
        """The sequence's chain with at least `count` keys; each page is hashed once in the sequence's life."""
        chain = self._chains.get(sequence)
        if chain is None:
            salt = sequence.request.cache_salt.encode("utf-8", "surrogatepass")
            chain = self._chains[sequence] = _Chain(hashlib.sha256(salt).digest())
        keys, size, tokens = chain.keys, self._page_size, sequence.tokens
        parent = keys[-1] if keys else chain.root
        for number in range(len(keys), count):
            parent = hashlib.sha256(parent + self._pack(*tokens[number * size : (number + 1) * size])).digest()
            keys.append(parent)
        return chain

    def _forget(self, page: int) -> None:
        del self._pages[self._keys.pop(page)]
        self._pool.drop(page)


class NoPrefixCache:
    """Satisfies PrefixIndex by never finding anything."""

    enabled = False

    def __init__(self) -> None:
        self.stats = CacheStats()

    def match(self, sequence: Sequence) -> list[int]:
        return []

    def acquire(self, sequence: Sequence, pages: list[int]) -> None:
        pass

    def insert(self, sequence: Sequence) -> None:
        pass

    def evict(self, count: int) -> int:
        return 0

    def release(self, sequence: Sequence) -> None:
        pass

    def discard(self, sequence: Sequence) -> None:
        pass

    def check(self) -> None:
        pass
