"""Accounts for the pages of KV memory: which are free, which are held and by how many, which are only cached.

In: page counts and page numbers. Out: page numbers. Knows nothing of tokens, sequences, hashes or device memory.

A page is in exactly one of three states:
  free    nobody wants what it holds;
  held    one or more holders (sequences) use it; a reference count says how many;
  cached  nobody holds it, but the prefix cache keeps it (`keep`) until it is evicted (`drop`).
So free + cached + held = total, always.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class OutOfPages(RuntimeError):
    """More pages were asked for than are free. The caller evicts or preempts first; it never reaches a user."""


class PagePool:
    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a page pool needs num_pages >= 1 and page_size >= 1, got {num_pages} and {page_size}")
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is used first
        self._holders = [0] * num_pages
        self._kept = bytearray(num_pages)
        self._cached: dict[int, None] = {}  # in the order of release: the least recently used page first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_pages - len(self._free) - len(self._cached)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages `num_tokens` tokens fill."""
        return -(-num_tokens // self.page_size)

    def holders(self, page: int) -> int:
        return self._holders[page]

    def kept(self, page: int) -> bool:
        return bool(self._kept[page])

    def allocate(self, count: int) -> list[int]:
        """`count` free pages, now held once."""
        if not 0 <= count <= len(self._free):
            raise OutOfPages(f"{count} pages asked for, {len(self._free)} of {self.num_pages} free")
        if count == 0:
            return []
        pages = self._free[: -count - 1 : -1]
        del self._free[-count:]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each of these held or cached pages."""
        for page in pages:
            if self._holders[page] == 0:
                if page not in self._cached:
                    raise ValueError(f"page {page} is free: only held or cached pages can be shared")
                del self._cached[page]
            self._holders[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """One holder fewer for each page, in this order; the last one out leaves it free, or cached if kept."""
        for page in pages:
            left = self._holders[page] - 1
            if left < 0:
                raise ValueError(f"page {page} is freed more often than it was allocated and shared")
            self._holders[page] = left
            if left == 0:
                if self._kept[page]:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def keep(self, page: int) -> None:
        """The cache wants this held page's contents to outlive its holders."""
        if self._holders[page] == 0:
            raise ValueError(f"page {page} is not held: only a held page can be kept")
        self._kept[page] = 1

    def drop(self, page: int) -> None:
        """The cache forgets the page: free now, or when its last holder leaves."""
        if not self._kept[page]:
            raise ValueError(f"page {page} is not kept")
        self._kept[page] = 0
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)

    def cached(self) -> Iterator[int]:
        """Kept pages that nobody holds, least recently released first."""
        return iter(self._cached)

    def num_unheld(self, pages: Iterable[int]) -> int:
        """How many of these pages sharing would take out of the cached state."""
        return sum(1 for page in pages if self._holders[page] == 0)

    def check(self) -> None:
        """Raises AssertionError when a page is in no state, or in two."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is on the free list twice"
        for page, holders in enumerate(self._holders):
            states = (page in free) + (page in self._cached) + (holders > 0)
            assert states == 1, f"page {page} is in {states} states ({holders} holders)"
            assert page not in free or not self._kept[page], f"page {page} is kept and free"
            assert page not in self._cached or self._kept[page], f"page {page} is cached and not kept"
        assert self.num_free + self.num_cached + self.num_held == self.num_pages
