"""Pages from one KV cache to another: some layers at a time they are taken out here and put in there.

In: pages of two caches with their shardings, page numbers. Out: blocks [L, 2, N, K, page, H] with the model's own kv
heads, whatever shards lie on either side; and the other cache with them in place, by donation. Everything is compiled
before the first move. Knows nothing of sequences, processes or when to move what.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float, Int

from jaxllm.graph.compile import Executables, compile_jobs
from jaxllm.graph.kv_cache import KVCache, LayerPages
from jaxllm.graph.traces import Job
from sharding.axes import Block

Pages = Float[Array, "L 2 N K page H"]


@dataclass(frozen=True)
class Layout:
    """How a cache's pages lie: which of the model's kv heads is where along the heads' dim, and on which devices."""

    heads: tuple[int, ...]
    shards: int
    sharding: Sharding

    @staticmethod
    def of(kv: KVCache, num_kv_heads: int) -> Layout:
        pages = kv[0][0]
        shards = pages.shape[1] // pages.sharding.shard_shape(pages.shape)[1]
        held = Block("num_kv_heads", num_kv_heads, may_repeat=True).units(shards)
        return Layout(tuple(map(int, held.reshape(-1))), shards, pages.sharding)

    @property
    def whole(self) -> Sharding:
        """On every device, all of it."""
        on = self.sharding
        return NamedSharding(on.mesh, PartitionSpec()) if isinstance(on, NamedSharding) else on

    def block(self, other: Layout | None) -> Sharding:
        """Of a block on this side, when it goes to or comes from `other`: cut alike on both, or whole. None: a host."""
        alike = other is not None and (other.heads, other.shards) == (self.heads, self.shards)
        plain = self.heads == tuple(range(len(self.heads)))
        if not (alike and plain and isinstance(self.sharding, NamedSharding)):
            return self.whole
        return NamedSharding(self.sharding.mesh, PartitionSpec(None, None, None, self.sharding.spec[1]))


def block_sizes(most: int) -> tuple[int, ...]:
    """1, 2, 4 ... pages, up to `most`: what a block holds in vain is sent and put too."""
    return tuple(itertools.takewhile(lambda size: size <= most, (2**i for i in itertools.count())))


def layer_groups(num_layers: int, at_once: int) -> tuple[range, ...]:
    """Layers that move together."""
    return tuple(range(first, min(first + at_once, num_layers)) for first in range(0, num_layers, at_once))


def _laid_out(x: Array, sharding: Sharding) -> Array:
    """One device needs no telling."""
    return jax.lax.with_sharding_constraint(x, sharding) if isinstance(sharding, NamedSharding) else x


def _take(
    first: tuple[int, ...] | None, sharding: Sharding, layers: list[LayerPages], pages: Int[Array, " N"]
) -> Pages:
    def of(cache: Array) -> Array:
        found = jnp.take(cache, pages, axis=0, mode="clip")
        return found if first is None else found[:, np.array(first)]

    return _laid_out(jnp.stack([jnp.stack([of(k), of(v)]) for k, v in layers]), sharding)


def _put(
    heads: tuple[int, ...] | None,
    sharding: Sharding,
    layers: list[LayerPages],
    block: Pages,
    pages: Int[Array, " N"],
) -> list[LayerPages]:
    block = block if heads is None else block[:, :, :, np.array(heads)]
    put = lambda cache, new: _laid_out(cache.at[pages].set(new, mode="drop"), sharding)  # noqa: E731
    return [(put(k, block[i, 0]), put(v, block[i, 1])) for i, (k, v) in enumerate(layers)]


@dataclass(frozen=True)
class PageTaker:
    """Copies pages out of a cache."""

    executables: Executables
    groups: tuple[range, ...]
    sizes: tuple[int, ...]
    whole: Sharding

    @staticmethod
    def compiled(kv: KVCache, num_kv_heads: int, at_once: int, target: Layout | None, *, most: int) -> PageTaker:
        """`target`: where blocks go from here; None: to a host."""
        own, groups, sizes = Layout.of(kv, num_kv_heads), layer_groups(len(kv), at_once), block_sizes(most)
        plain = own.heads == tuple(range(num_kv_heads))
        first = None if plain else tuple(own.heads.index(head) for head in range(num_kv_heads))
        function = functools.partial(_take, first, own.block(target))
        jobs = [
            Job(("take", len(group), size), function, ([_shapes(kv[layer]) for layer in group], _ids(size, own.whole)))
            for size, group in _kinds(sizes, groups)
        ]
        return PageTaker(compile_jobs(jobs, len(jobs), None), groups, sizes, own.whole)

    def __call__(self, kv: KVCache, group: range, pages: Sequence[int]) -> jax.Array:
        size = next(size for size in self.sizes if size >= len(pages))
        ids = np.zeros(size, np.int32)
        ids[: len(pages)] = pages
        call = self.executables.table["take", len(group), size]
        return call([kv[layer] for layer in group], jax.device_put(ids, self.whole))


@dataclass(frozen=True)
class PagePutter:
    """Copies blocks into a cache, in place."""

    executables: Executables
    groups: tuple[range, ...]
    sizes: tuple[int, ...]
    whole: Sharding
    block: Sharding  # where blocks must lie before they are put
    num_pages: int

    @staticmethod
    def compiled(kv: KVCache, num_kv_heads: int, at_once: int, source: Layout | None, *, most: int) -> PagePutter:
        """`source`: where blocks come from; None: from a host."""
        own, groups, sizes = Layout.of(kv, num_kv_heads), layer_groups(len(kv), at_once), block_sizes(most)
        heads = None if own.heads == tuple(range(num_kv_heads)) else own.heads
        function = functools.partial(_put, heads, own.sharding)
        num_pages, _, *page = kv[0][0].shape
        jobs, sharding = [], own.block(source)
        for size, group in _kinds(sizes, groups):
            shape = len(group), 2, size, num_kv_heads, *page
            block = jax.ShapeDtypeStruct(shape, kv[0][0].dtype, sharding=sharding)
            args = [_shapes(kv[layer]) for layer in group], block, _ids(size, own.whole)
            jobs.append(Job(("put", len(group), size), function, args, donated=(0,)))
        return PagePutter(compile_jobs(jobs, len(jobs), None), groups, sizes, own.whole, sharding, num_pages)

    def __call__(self, kv: KVCache, group: range, block: jax.Array, pages: Sequence[int | None]) -> KVCache:
        """The cache with the block's pages at these page numbers; None: that page of the block is dropped."""
        ids = np.full(block.shape[2], self.num_pages, np.int32)
        ids[: len(pages)] = [self.num_pages if page is None else page for page in pages]
        call = self.executables.table["put", len(group), block.shape[2]]
        new = call([kv[layer] for layer in group], block, jax.device_put(ids, self.whole))
        return [*kv[: group.start], *new, *kv[group.stop :]]


def _kinds(sizes: Sequence[int], groups: Sequence[range]) -> Iterator[tuple[int, range]]:
    """A block size and a group of each length: others are alike."""
    return itertools.product(sizes, {len(group): group for group in groups}.values())


def _shapes(pages: LayerPages) -> Any:
    return tuple(jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=one.sharding) for one in pages)


def _ids(size: int, sharding: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), jnp.int32, sharding=sharding)
