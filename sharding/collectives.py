"""What devices that share a model exchange inside a step, as the model sees it: a few verbs.

In: this device's part of a sum, of the vocabulary, of the tokens. Out: what the next product needs. `ALONE` is one
device and does nothing; `Spread` runs inside a shard_map over the named mesh axes. Objects are static: they take part
in no trace and hold no array. Knows nothing of layers, pages or what a model is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.all_reduce import api
from pallas_kernels.sampling.api import greedy
from pallas_kernels.sampling.reference import first_argmax
from sharding.dispatch import Dispatch


class Exchange(ABC):
    """How the shards of a model meet.

    The residual stream is x; `enter(x)` is what a column-split product reads, `leave(partial)` makes a row-split
    product's partial sums part of the residual stream again. With `scatter` the residual stream itself is spread along
    its first dim. Where `apart`, experts do not read what `enter` gives: they read `near(x)`, and `far(partial)` makes
    their sums part of the residual stream; with `dispatch`, tokens go from there to their experts' devices one by one.
    """

    scatter: bool
    dispatch: Dispatch | None
    apart: bool

    @abstractmethod
    def lookup(self, table: Float[Array, "V D"], ids: Int[Array, "*lead"]) -> Float[Array, "... D"]:
        """Rows of a vocabulary-split table, to be given to `leave`."""

    @abstractmethod
    def enter(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]: ...

    @abstractmethod
    def leave(self, partial: Float[Array, "... D"]) -> Float[Array, "... D"]: ...

    @abstractmethod
    def own_experts(self, ids: Int[Array, "T k"], held: int) -> Int[Array, "T k"]:
        """Experts by this device's numbering, of which it holds `held`; those of others fall outside it."""

    @abstractmethod
    def near(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]: ...

    @abstractmethod
    def far(self, partial: Float[Array, "... D"]) -> Float[Array, "... D"]: ...

    @abstractmethod
    def measured(self, ids: Int[Array, "L t k"], live: Bool[Array, " T"]) -> tuple[Array, Array]:
        """Of the experts that were chosen here and the step's tokens that are no padding: those to be counted here."""

    @abstractmethod
    def total(self, counts: Int[Array, "L E"]) -> Int[Array, "L E"]:
        """Of what all devices counted."""

    @abstractmethod
    def vocabulary(self, logits: Float[Array, "... Vlocal"]) -> Float[Array, "... V"]:
        """The logits of all of the vocabulary, in its order."""

    @abstractmethod
    def greedy(self, logits: Float[Array, "B Vlocal"]) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
        """The token with the largest logit, the lowest among ties, and which rows hold a logit that is not finite."""


@dataclass(frozen=True)
class Alone(Exchange):
    """One device holds all of the model."""

    scatter: bool = False
    dispatch: Dispatch | None = None
    apart: bool = False

    def lookup(self, table: Float[Array, "V D"], ids: Int[Array, "*lead"]) -> Float[Array, "... D"]:
        return table.at[ids].get(mode="clip")

    def enter(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return x

    def leave(self, partial: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return partial

    def own_experts(self, ids: Int[Array, "T k"], held: int) -> Int[Array, "T k"]:
        return ids

    def near(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return x

    def far(self, partial: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return partial

    def measured(self, ids: Int[Array, "L t k"], live: Bool[Array, " T"]) -> tuple[Array, Array]:
        return ids, live

    def total(self, counts: Int[Array, "L E"]) -> Int[Array, "L E"]:
        return counts

    def vocabulary(self, logits: Float[Array, "... V"]) -> Float[Array, "... V"]:
        return logits

    def greedy(self, logits: Float[Array, "B V"]) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
        return greedy(logits)


ALONE = Alone()


@dataclass(frozen=True)
class Spread(Exchange):
    """Shards along `axes`, the last one fastest; `scatter` also spreads the residual stream along its first dim."""

    axes: tuple[str, ...]
    scatter: bool = False
    groups: tuple[tuple[int, ...], ...] | None = None  # ids of the devices that meet, in the order of `axes`
    implementation: str | None = None  # of all_reduce: None lets the dispatch choose
    dispatch: Dispatch | None = None
    apart: bool = False

    @property
    def _beside(self) -> tuple[str, ...]:
        """The axes that cut one expert."""
        return tuple(axis for axis in self.axes if axis != "expert")

    def lookup(self, table: Float[Array, "Vlocal D"], ids: Int[Array, "*lead"]) -> Float[Array, "... D"]:
        local = ids - lax.axis_index(self.axes) * table.shape[0]
        mine = (local >= 0) & (local < table.shape[0])
        return jnp.where(mine[..., None], table.at[local].get(mode="clip"), jnp.zeros((), table.dtype))

    def enter(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return lax.all_gather(x, self.axes, axis=0, tiled=True) if self.scatter else x

    def leave(self, partial: Float[Array, "... D"]) -> Float[Array, "... D"]:
        if self.scatter:
            return lax.psum_scatter(partial, self.axes, scatter_dimension=0, tiled=True)
        return all_reduce(partial, self.axes, self.groups, implementation=self.implementation)

    def own_experts(self, ids: Int[Array, "T k"], held: int) -> Int[Array, "T k"]:
        return ids - lax.axis_index("expert") * held if "expert" in self.axes else ids

    def near(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return lax.all_gather(x, self._beside, axis=0, tiled=True) if self._beside else x

    def far(self, partial: Float[Array, "... D"]) -> Float[Array, "... D"]:
        if not self._beside:
            return partial
        return lax.psum_scatter(partial, self._beside, scatter_dimension=0, tiled=True)

    def measured(self, ids: Int[Array, "L t k"], live: Bool[Array, " T"]) -> tuple[Array, Array]:
        return ids, live if self.dispatch is None else self.dispatch.own(live)

    def total(self, counts: Int[Array, "L E"]) -> Int[Array, "L E"]:
        return counts if self.dispatch is None else self.dispatch.total(counts)

    def vocabulary(self, logits: Float[Array, "... Vlocal"]) -> Float[Array, "... V"]:
        return lax.all_gather(logits, self.axes, axis=logits.ndim - 1, tiled=True)

    def greedy(self, logits: Float[Array, "B Vlocal"]) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
        shard, shards = lax.axis_index(self.axes), lax.axis_size(self.axes)
        token = (first_argmax(logits) + shard * logits.shape[1]).astype(jnp.float32)  # exact: below 2^24
        bad = (~jnp.isfinite(logits).all(axis=1)).astype(jnp.float32)
        # A sum with zeros is a gather: it goes where the layers' sums go, inside the step's graph.
        mine = jnp.stack([jnp.where(bad > 0, 0.0, logits.max(axis=1)), token, bad])
        found = jnp.where(jnp.arange(shards, dtype=jnp.int32)[:, None, None] == shard, mine, 0.0)
        found = all_reduce(found, self.axes, self.groups, implementation=self.implementation)  # [shards, 3, B]
        first = first_argmax(found[:, 0].T)  # shards follow the vocabulary's order, so the first is the lowest token
        chosen = jnp.take_along_axis(found[:, 1], first[None], axis=0)[0]
        return chosen.astype(jnp.int32), found[:, 2].any(axis=0)


SUMMED_MOST_BYTES = 1 << 20  # up to here a sum with zeros, inside the step's graph, is faster than a gather


@dataclass(frozen=True)
class AttentionData(Exchange):
    """Every shard along `expert` has tokens of its own, and all but the experts; `inner`: how one shard's devices meet.

    Without `dispatch` every device sees the tokens of all shards and sums are taken over `axes`: all devices.
    """

    inner: Exchange
    axes: tuple[str, ...]
    scatter: bool = False
    groups: tuple[tuple[int, ...], ...] | None = None
    implementation: str | None = None
    dispatch: Dispatch | None = None
    summed_most_bytes: int = SUMMED_MOST_BYTES
    apart: bool = True

    def lookup(self, table: Float[Array, "V D"], ids: Int[Array, "*lead"]) -> Float[Array, "... D"]:
        return self.inner.lookup(table, ids)

    def enter(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.inner.enter(x)

    def leave(self, partial: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.inner.leave(partial)

    def own_experts(self, ids: Int[Array, "T k"], held: int) -> Int[Array, "T k"]:
        return ids - lax.axis_index("expert") * held

    def near(self, x: Float[Array, "T D"]) -> Float[Array, "nT D"]:
        own = self.inner.enter(x)
        if self.dispatch is not None:
            return own
        shards = lax.axis_size("expert")
        if shards * own.nbytes > self.summed_most_bytes:
            return lax.all_gather(own, "expert", axis=0, tiled=True)
        room = jnp.zeros((shards * own.shape[0], own.shape[1]), own.dtype)
        mine = lax.dynamic_update_slice_in_dim(room, own, lax.axis_index("expert") * own.shape[0], 0)
        if len(self.axes) > 1:  # all devices of a shard have its tokens: one of them brings them
            mine = jnp.where(lax.axis_index(self.axes[1:]) == 0, mine, jnp.zeros((), own.dtype))
        return all_reduce(mine, self.axes, self.groups, implementation=self.implementation)

    def far(self, partial: Float[Array, "nT D"]) -> Float[Array, "T D"]:
        if self.dispatch is not None:
            return self.inner.leave(partial)
        if self.scatter or partial.nbytes > self.summed_most_bytes:
            return self.inner.leave(lax.psum_scatter(partial, "expert", scatter_dimension=0, tiled=True))
        return self._own(all_reduce(partial, self.axes, self.groups, implementation=self.implementation), 0)

    def _own(self, x: Array, dim: int) -> Array:
        share = x.shape[dim] // lax.axis_size("expert")
        return lax.dynamic_slice_in_dim(x, lax.axis_index("expert") * share, share, dim)

    def measured(self, ids: Int[Array, "L t k"], live: Bool[Array, " T"]) -> tuple[Array, Array]:
        return ids if self.dispatch is not None else self._own(ids, 1), live

    def total(self, counts: Int[Array, "L E"]) -> Int[Array, "L E"]:
        return lax.psum(counts, "expert")

    def vocabulary(self, logits: Float[Array, "... Vlocal"]) -> Float[Array, "... V"]:
        return self.inner.vocabulary(logits)

    def greedy(self, logits: Float[Array, "B Vlocal"]) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
        return self.inner.greedy(logits)


def all_reduce(
    x: Float[Array, "*shape"],
    axes: str | tuple[str, ...],
    groups: tuple[tuple[int, ...], ...] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "*shape"]:
    """The sum over the devices along `axes`, the same bits on each of them. Inside shard_map only."""
    return api.all_reduce(x, axes, groups, implementation=implementation)
