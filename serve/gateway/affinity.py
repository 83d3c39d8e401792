"""Which worker has probably computed this prompt's beginning: prompts in, a chain of block hashes out; and a memory.

The chain's n-th hash names the first n blocks of a prompt, whoever sent it being part of the name: callers with other
keys never share a name, as engines never share their pages. The memory says which worker last took a block. A prompt
that no worker has seen goes where its first block points on the ring, so that gateways that know nothing agree.
Knows nothing of loads, health or HTTP.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import Any

import orjson

POINTS = 64  # on the ring, of each worker


def prompt_bytes(body: dict[str, Any]) -> bytes:
    """What an engine would compute first to last: tools, then messages; or the prompt. Empty when there is none."""
    found = body.get("messages", body.get("input", body.get("prompt", body.get("text"))))
    if isinstance(found, str):
        found = [found]
    if isinstance(found, list):
        head = [body[name] for name in ("system", "instructions", "tools") if body.get(name)]
        parts = [item.encode() if isinstance(item, str) else orjson.dumps(item) for item in (*head, *found[:4096])]
        return b"\0".join(parts)
    return b""


class Hasher:
    def __init__(self, salt: str, block_bytes: int, max_blocks: int) -> None:
        self._key = hashlib.blake2b(salt.encode(), digest_size=32).digest()
        self._block_bytes, self._max_blocks = block_bytes, max_blocks

    def chain(self, prompt: bytes, owner: bytes) -> list[int]:
        """Hashes of the prompt's whole blocks; of all of it when it is shorter than one."""
        size = self._block_bytes
        digest = hashlib.blake2b(owner, key=self._key, digest_size=8).digest()
        found = []
        for start in range(0, max(size, min(len(prompt) // size, self._max_blocks) * size), size):
            digest = hashlib.blake2b(prompt[start : start + size], key=digest, digest_size=8).digest()
            found.append(int.from_bytes(digest))
        return found


class Ring:
    """Consistent hashing: adding or losing a worker moves only that worker's share."""

    def __init__(self, names: Sequence[str]) -> None:
        points = sorted((self._point(f"{name}#{i}"), name) for name in names for i in range(POINTS))
        self._keys = [point for point, _ in points]
        self._names = [name for _, name in points]

    @staticmethod
    def _point(text: str) -> int:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())

    def order(self, key: int) -> list[str]:
        """Every worker once, the nearest first."""
        at = bisect_right(self._keys, key)
        return list(dict.fromkeys(self._names[at:] + self._names[:at]))


class Memory:
    """block hash -> the worker that last took it; the least recently used blocks are forgotten."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._owners: dict[int, str] = {}  # in the order of their last use
        self.blocks: Counter[str] = Counter()  # of each worker

    def __len__(self) -> int:
        return len(self._owners)

    def owner(self, chain: Sequence[int]) -> tuple[str | None, int]:
        """Who took the longest known beginning, and its length in blocks."""
        for known in range(len(chain), 0, -1):
            owner = self._owners.get(chain[known - 1])
            if owner is not None:
                return owner, known
        return None, 0

    def remember(self, chain: Sequence[int], name: str) -> None:
        for block in reversed(chain):  # a beginning is younger than what follows it, and is forgotten after it
            before = self._owners.pop(block, None)
            if before != name:
                if before is not None:
                    self.blocks[before] -= 1
                self.blocks[name] += 1
            self._owners[block] = name
        while len(self._owners) > self._capacity:
            forgotten = next(iter(self._owners))
            self.blocks[self._owners.pop(forgotten)] -= 1

    def forget(self, name: str) -> None:
        """The worker started anew: its cache is empty."""
        self._owners = {block: owner for block, owner in self._owners.items() if owner != name}
        self.blocks[name] = 0
