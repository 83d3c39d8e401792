"""Prefix cache as a radix tree at page grain: a path from a tenant's root spells the tokens that its pages hold.

In: sequences. Out: pages that already hold their first tokens. Knows nothing of scheduling or devices.

One node is one full page, found among its parent's children by the page's tokens themselves: no digest, so no collision
to think of, and a salt is a root of its own. Pages of running sequences are pinned by their holders in the pool.
Eviction takes the page released longest ago with everything below it; sequences release their pages last page first,
so that is a leaf unless what is below was computed by another sequence side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from jaxllm.core import Sequence
from jaxllm.engine.cache.pages import PagePool
from jaxllm.engine.cache.prefix import CacheStats

NO_PAGE = -1  # of a root


@dataclass(slots=True, eq=False)
class _Node:
    page: int
    parent: _Node | None
    key: tuple[int, ...]  # the tokens the page holds
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)


@dataclass(slots=True)
class _Path:
    """Where a sequence stands in the tree since its admission."""

    nodes: list[_Node]
    num_acquired: int  # nodes that came from the match


class RadixCache:
    """Satisfies PrefixIndex."""

    enabled = True

    def __init__(self, pool: PagePool) -> None:
        self.stats = CacheStats()
        self._pool = pool
        self._page_size = pool.page_size
        self._roots: dict[str, _Node] = {}  # by salt; kept while something hangs below
        self._nodes: dict[int, _Node] = {}  # by page
        self._paths: dict[Sequence, _Path] = {}

    def match(self, sequence: Sequence) -> list[int]:
        return [node.page for node in self._walk(sequence)]

    def acquire(self, sequence: Sequence, pages: list[int]) -> None:
        nodes = [self._nodes[page] for page in pages]
        self._pool.share(pages)
        self._paths[sequence] = _Path(nodes, len(nodes))
        if sequence.num_preempted == 0:  # a resumed sequence mostly finds itself: that is not reuse
            hit_tokens = len(pages) * self._page_size
            self.stats.hit_tokens += hit_tokens
            self.stats.miss_tokens += sequence.num_prompt - hit_tokens

    def insert(self, sequence: Sequence) -> None:
        path, size, tokens = self._paths[sequence], self._page_size, sequence.tokens
        while path.nodes and self._nodes.get(path.nodes[-1].page) is not path.nodes[-1]:
            path.nodes.pop()  # evicted meanwhile: it was another sequence's page
        path.num_acquired = min(path.num_acquired, len(path.nodes))
        node = path.nodes[-1] if path.nodes else self._root(sequence)
        for number in range(len(path.nodes), sequence.num_computed // size):
            key = tuple(tokens[number * size : (number + 1) * size])
            child = node.children.get(key)
            if child is None:
                page = sequence.pages[number]
                child = node.children[key] = self._nodes[page] = _Node(page, node, key)
                self._pool.keep(page)
            path.nodes.append(child)  # maybe another sequence's page with the same tokens: that one stays the known one
            node = child

    def evict(self, count: int) -> int:
        freed = 0
        while freed < count:
            page = next(self._pool.cached(), None)
            if page is None:
                break
            before = self._pool.num_free
            self._forget(self._nodes[page])
            freed += self._pool.num_free - before
        self.stats.evicted_pages += freed
        return freed

    def release(self, sequence: Sequence) -> None:
        self._paths.pop(sequence, None)

    def discard(self, sequence: Sequence) -> None:
        path = self._paths.pop(sequence, None)
        if path is None:
            return
        own = set(sequence.pages)
        for node in path.nodes[path.num_acquired :]:
            if node.page in own and self._nodes.get(node.page) is node:
                self._forget(node)
                return  # with all that is below

    def check(self) -> None:
        seen = 0
        for salt, root in self._roots.items():
            assert root.children, f"the root of salt {salt!r} is empty"
            for node in _below(root):
                seen += 1
                assert self._nodes.get(node.page) is node, f"page {node.page} is in two places of the tree"
                assert self._pool.kept(node.page), f"page {node.page} is in the tree and not kept"
                assert node.parent is not None
                assert node.parent.children[node.key] is node
        assert seen == len(self._nodes), "a page is known that the tree does not hold"
        for page in self._pool.cached():
            assert page in self._nodes, f"page {page} is cached and not in the tree"

    def _walk(self, sequence: Sequence) -> Iterator[_Node]:
        """The known pages of the sequence's tokens, all but the last token at most."""
        node, size, tokens = self._roots.get(sequence.request.cache_salt), self._page_size, sequence.tokens
        for start in range(0, (len(tokens) - 1) // size * size, size):
            node = node.children.get(tuple(tokens[start : start + size])) if node is not None else None
            if node is None:
                return
            yield node

    def _root(self, sequence: Sequence) -> _Node:
        return self._roots.setdefault(sequence.request.cache_salt, _Node(NO_PAGE, None, ()))

    def _forget(self, top: _Node) -> None:
        """Take a node out with everything below it: what is below cannot be reached without it."""
        assert top.parent is not None
        for node in (top, *_below(top)):
            del self._nodes[node.page]
            self._pool.drop(node.page)
        del top.parent.children[top.key]
        if top.parent.page == NO_PAGE and not top.parent.children:
            self._roots = {salt: root for salt, root in self._roots.items() if root is not top.parent}


def _below(top: _Node) -> Iterator[_Node]:
    stack = list(top.children.values())
    while stack:
        node = stack.pop()
        yield node
        stack += node.children.values()
