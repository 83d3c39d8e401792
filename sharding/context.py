"""Context parallelism: the keys of every sequence spread page by page over devices, their attentions merged.

In: page tables and slots of the whole pool. Out: this device's part of them, and merged outputs. Page p lies on device
p mod n as its page p div n, so that any sequence is spread evenly and a causal prefill is balanced. In a step of many
tokens each device does the products of its share of the tokens; in a decode step all do all. Inside shard_map only;
knows nothing of layers or schedules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


class OwnKeys(NamedTuple):
    """What this device holds of each row's keys, their order kept."""

    table: Int[Array, "R W"]  # own pages, moved together to the front
    visible: Int[Array, " T"]  # how many own keys each query sees


@dataclass(frozen=True)
class Context:
    """`devices` along mesh axis `axis`."""

    devices: int
    axis: str = "seq"

    def shares(self, tokens: int, also: int = 1) -> bool:
        """Whether so many tokens can be dealt out, each share in `also` further parts."""
        return tokens % (self.devices * also) == 0

    def own(self, x: Array) -> Array:
        """This device's share along the first dim."""
        share = x.shape[0] // self.devices
        return lax.dynamic_slice_in_dim(x, lax.axis_index(self.axis) * share, share)

    def all(self, x: Array) -> Array:
        return lax.all_gather(x, self.axis, axis=0, tiled=True)

    def slots(self, slots: Int[Array, " T"], page_size: int, own_pages: int) -> Int[Array, " T"]:
        """Slots in this device's pages; the first slot past them for tokens that are not its own."""
        page = slots // page_size
        mine = (page % self.devices == lax.axis_index(self.axis)) & (page < own_pages * self.devices)
        return jnp.where(mine, page // self.devices * page_size + slots % page_size, own_pages * page_size)

    def keys(
        self,
        page_table: Int[Array, "R W"],
        kv_lens: Int[Array, " R"],
        rows: Int[Array, " T"],
        positions: Int[Array, " T"],
        page_size: int,
    ) -> OwnKeys:
        """Of queries at these positions; a position -1 sees nothing."""
        column = jnp.arange(page_table.shape[1], dtype=jnp.int32)
        mine = (page_table % self.devices == lax.axis_index(self.axis)) & (column * page_size < kv_lens[:, None])
        order = jnp.argsort(~mine, axis=1, stable=True)
        table = jnp.take_along_axis(page_table, order, axis=1) // self.devices
        before = jnp.cumsum(mine, axis=1, dtype=jnp.int32) - mine.astype(jnp.int32)  # own pages before each column
        at = jnp.maximum(positions, 0) // page_size
        partly = jnp.where(mine[rows, at], positions % page_size + 1, 0)
        visible = jnp.where(positions >= 0, before[rows, at] * page_size + partly, 0)
        return OwnKeys(table, visible)

    def merge(self, out: Float[Array, "T N H"], lse: Float[Array, "T N"], share: bool) -> Float[Array, "T N H"]:
        """The attention over all devices' keys; of this device's share of the queries, if so asked."""
        weight = jnp.exp(lse - lax.pmax(lse, self.axis))
        weighted = jnp.concatenate([out * weight[..., None], weight[..., None]], axis=-1)
        if share:
            total = lax.psum_scatter(weighted, self.axis, scatter_dimension=0, tiled=True)
        else:
            total = lax.psum(weighted, self.axis)
        return total[..., :-1] / total[..., -1:]
