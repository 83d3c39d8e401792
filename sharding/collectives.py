"""What devices that share a model exchange inside a step, as the model sees it: four verbs.

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


class Exchange(ABC):
    """How the shards of a model meet.

    The residual stream is x; `enter(x)` is what a column-split product reads, `leave(partial)` makes a row-split
    product's partial sums part of the residual stream again. With `scatter` the residual stream itself is spread along
    its first dim.
    """

    scatter: bool

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
    def vocabulary(self, logits: Float[Array, "... Vlocal"]) -> Float[Array, "... V"]:
        """The logits of all of the vocabulary, in its order."""

    @abstractmethod
    def greedy(self, logits: Float[Array, "B Vlocal"]) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
        """The token with the largest logit, the lowest among ties, and which rows hold a logit that is not finite."""


@dataclass(frozen=True)
class Alone(Exchange):
    """One device holds all of the model."""

    scatter: bool = False

    def lookup(self, table: Float[Array, "V D"], ids: Int[Array, "*lead"]) -> Float[Array, "... D"]:
        return table.at[ids].get(mode="clip")

    def enter(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return x

    def leave(self, partial: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return partial

    def own_experts(self, ids: Int[Array, "T k"], held: int) -> Int[Array, "T k"]:
        return ids

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


def all_reduce(
    x: Float[Array, "*shape"],
    axes: str | tuple[str, ...],
    groups: tuple[tuple[int, ...], ...] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "*shape"]:
    """The sum over the devices along `axes`, the same bits on each of them. Inside shard_map only."""
    return api.all_reduce(x, axes, groups, implementation=implementation)
