"""All-to-all between devices that hold different experts: tokens go to the experts they chose, sums come back.

In, inside shard_map: this device's share of the tokens, for each of them the slots of its experts (slot s lies on
device s // held) and their weights. Out: on each device the tokens that any of its experts got, and afterwards each
token's sum on the device it came from. A token travels once to each device that holds any of its experts, with the
list of those; what comes back is that device's weighted sum, and a token's sums are added in the order of devices: its
bits depend on no other token. No token is ever dropped: a device can be sent every token there is, once, so its buffer
has a row for each, the memory an all-gather takes. Knows nothing of layers, of products, or of who chose the experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt

# Of the rule below. Assumed until benchmarks/expert_exchange.py has run on GPUs of one host.
LINK_BYTES_PER_S = 3.5e11  # one H200 to all others over NVLink, one direction
EXTRA_S = 40e-6  # what sorting, sizes and a third exchange cost more than one all-gather and one reduce-scatter


class Way(NamedTuple):
    """How the tokens of one step meet their experts, and why so."""

    all_to_all: bool
    why: str


def choose(setting: str, tokens: int, devices: int, per_token: int, row_bytes: int) -> Way:
    """For `tokens` tokens on each of so many devices. By sums, each device sees every token; all-to-all, its own ones.

    Only where tokens are dealt out is there anything to send: `tokens` = 0 says that every device has all of them.
    """
    if devices == 1 or tokens == 0:
        return Way(False, "every device has every token: each does its own experts, one sum brings them together")
    if setting != "auto":
        return Way(setting == "all_to_all", f"mesh.expert_exchange = {setting!r}")
    reached = (devices - 1) * (1 - (1 - 1 / devices) ** per_token)  # other devices a token is sent to, on average
    saved_s = 2 * tokens * (devices - 1 - reached) * row_bytes / LINK_BYTES_PER_S
    rows = f"{tokens} tokens a device go to {reached:.2f} of {devices - 1} others"
    what = f"{rows}: all-to-all saves {saved_s * 1e6:.0f} us of sending and costs {EXTRA_S * 1e6:.0f} us"
    return Way(saved_s > EXTRA_S, what)


class Parcel(NamedTuple):
    """What a device's experts are given. Rows past those that came have no expert."""

    tokens: Float[Array, "C D"]
    slots: Int[Array, "C k"]  # by this device's numbering; -1: another device's
    weights: Float[Array, "C k"]


class Sent(NamedTuple):
    """What is needed to bring the sums back."""

    sizes: Int[Array, "n n"]  # tokens that device i sent to device j
    goes: Array  # bool[t, n]: whether a token went to a device
    row: Int[Array, "t n"]  # and as which row of all that this device sent
    room: int  # most rows that a device sends


@dataclass(frozen=True)
class Dispatch:
    """Between `devices` along mesh axis `axis`. `ragged` needs a platform that has lax.ragged_all_to_all."""

    devices: int
    ragged: bool
    axis: str = "expert"

    def own(self, x: Array) -> Array:
        """This device's share of what lies along the tokens."""
        share = x.shape[0] // self.devices
        return lax.dynamic_slice_in_dim(x, lax.axis_index(self.axis) * share, share)

    def total(self, x: Array) -> Array:
        """What is counted on each device's share, of all."""
        return lax.psum(x, self.axis)

    def send(
        self, tokens: Float[Array, "t D"], slots: Int[Array, "t k"], weights: Float[Array, "t k"], held: int
    ) -> tuple[Parcel, Sent]:
        """Every token to the devices of its slots, each of which holds `held`."""
        (t, k), n = slots.shape, self.devices
        device = jnp.arange(n, dtype=jnp.int32)
        mine = (slots // held)[:, None, :] == device[:, None]  # [t, n, k]
        goes = mine.any(axis=2)
        counts = goes.sum(axis=0, dtype=jnp.int32)
        sizes = lax.all_gather(counts, self.axis)
        before = jnp.cumsum(goes, axis=0, dtype=jnp.int32) - goes.astype(jnp.int32)
        room = t * min(n, k)
        row = jnp.where(goes, _starts(counts) + before, room)
        pair = jnp.arange(t * n, dtype=jnp.int32)
        flat = jnp.zeros(room, jnp.int32).at[row.reshape(-1)].set(pair, mode="drop")
        token, to = flat // n, flat % n
        theirs = slots.at[token].get(mode="clip") - (to * held)[:, None]
        theirs = jnp.where((theirs >= 0) & (theirs < held), theirs, -1)
        letters = _join(tokens[token], theirs, weights[token])
        came = self._exchange(letters, sizes, n * t, t)
        x, slots, weights = _split(came, k, tokens.dtype)
        live = jnp.arange(n * t, dtype=jnp.int32) < sizes[:, lax.axis_index(self.axis)].sum()
        return Parcel(x, jnp.where(live[:, None], slots, -1), weights), Sent(sizes, goes, row, room)

    def back(self, sums: Float[Array, "C D"], sent: Sent) -> Float[Array, "t D"]:
        """Each token's sums, from the devices it went to, added in the order of devices in f32."""
        t, n = sent.goes.shape
        came = self._exchange(_as_bits(sums), sent.sizes.T, sent.room, t)
        found = _as_floats(came, sums.dtype)
        total = jnp.zeros((t, sums.shape[1]), jnp.float32)
        for device in range(n):
            part = found.at[sent.row[:, device]].get(mode="clip").astype(jnp.float32)
            total += jnp.where(sent.goes[:, device, None], part, 0.0)
        return total.astype(sums.dtype)

    def _exchange(
        self, rows: UInt[Array, "r W"], sizes: Int[Array, "n n"], room: int, most: int
    ) -> UInt[Array, "room W"]:
        """sizes[i, j] rows from device i to j, at most `most`; a device's own lie by receiver, what comes by sender."""
        me = lax.axis_index(self.axis)
        if self.ragged:
            out = jnp.zeros((room, rows.shape[1]), rows.dtype)
            put = _starts(sizes.T).T[me]  # where each receiver has room for ours
            return lax.ragged_all_to_all(
                rows, out, _starts(sizes[me]), sizes[me], put, sizes[:, me], axis_name=self.axis
            )
        place = jnp.arange(most, dtype=jnp.int32)
        padded = rows.at[_starts(sizes[me])[:, None] + place].get(mode="clip")  # [n, most, W]
        came = lax.all_to_all(padded, self.axis, split_axis=0, concat_axis=0)
        ends = jnp.cumsum(sizes[:, me], dtype=jnp.int32)
        place = jnp.arange(room, dtype=jnp.int32)
        source = jnp.minimum(jnp.searchsorted(ends, place, side="right").astype(jnp.int32), self.devices - 1)
        return came.at[source, place - _starts(sizes[:, me])[source]].get(mode="clip")


def _starts(sizes: Int[Array, "... n"]) -> Int[Array, "... n"]:
    return jnp.cumsum(sizes, axis=-1, dtype=jnp.int32) - sizes


def _as_bits(x: Float[Array, "r D"]) -> UInt[Array, "r W"]:
    """Whole words travel as they are; floats that are no numbers might not. D is even where numbers have two bytes."""
    each = 4 // x.dtype.itemsize
    return lax.bitcast_convert_type(x.reshape(x.shape[0], -1, each) if each > 1 else x, jnp.uint32)


def _as_floats(bits: UInt[Array, "r W"], dtype: jnp.dtype) -> Float[Array, "r D"]:
    return lax.bitcast_convert_type(bits, dtype).reshape(bits.shape[0], -1)


def _join(x: Float[Array, "r D"], slots: Int[Array, "r k"], weights: Float[Array, "r k"]) -> UInt[Array, "r W"]:
    """One row a token, so that one exchange carries all: its hidden state, then its slots and weights."""
    parts = (lax.bitcast_convert_type(part, jnp.uint32) for part in (slots, weights))
    return jnp.concatenate([_as_bits(x), *parts], axis=1)


def _split(rows: UInt[Array, "r W"], k: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    width = rows.shape[1] - 2 * k
    slots = lax.bitcast_convert_type(rows[:, width : width + k], jnp.int32)
    weights = lax.bitcast_convert_type(rows[:, width + k :], jnp.float32)
    return _as_floats(rows[:, :width], dtype), slots, weights


def copies_of(ids: Int[Array, "t k"], table: Int[Array, "E c1"]) -> Int[Array, "t k"]:
    """The slot of one copy of each expert. `table`: for each expert how many copies it has, then their slots.

    Which copy follows from the token's own experts, so that neither its place in the batch nor others change its bits.
    """
    rows = table[ids]
    turn = ids.sum(axis=1, keepdims=True, dtype=jnp.int32) % rows[..., 0]
    return jnp.take_along_axis(rows[..., 1:], turn[..., None], axis=-1)[..., 0]


def moved(leaf: Array, source: Int[Array, " S"], axis: str, devices: int) -> Array:
    """A leaf of experts whose slot s gets what slot source[s] holds, bit for bit, one slot a device at a time.

    Beside the old and the new leaf it takes 2 x devices experts of memory.
    """
    held, me = leaf.shape[0], lax.axis_index(axis)
    wanted = source.reshape(devices, held)

    def one(j: Array, out: Array) -> Array:
        asked = wanted[:, j]  # by each device
        parcel = leaf.at[jnp.where(asked // held == me, asked % held, 0)].get(mode="clip")
        came = lax.all_to_all(parcel, axis, split_axis=0, concat_axis=0)
        return lax.dynamic_update_index_in_dim(out, came[asked[me] // held], j, 0)

    return lax.fori_loop(0, held, one, jnp.zeros_like(leaf))
