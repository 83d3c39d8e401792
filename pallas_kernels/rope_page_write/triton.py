"""Norms, rotation and page write in Pallas-Triton: one pass over a step's queries, keys and values.

In: Heads, one layer's pages, slots, checked by api.py. Out: rotated queries, and the pages, in place. A program takes
a few tokens and the heads of one kv head, so that angles are loaded once for all of them. `Turner` is also what the
decode kernel of paged attention turns its queries and keys with. It does not know what attention does with them.

This is the lowering JAX 0.11 deprecates: the op is bound by memory and by launches (docs/adr/0026).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.rope_page_write.heads import Heads, replaced

TOKENS = 16  # a program, at most
Q, K = 0, 1  # rows of the norms


def rope_page_write(
    heads: Heads, k_pages: jax.Array, v_pages: jax.Array, slots: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See api.rope_page_write."""
    refuse(heads, k_pages)
    tokens = heads.cos.shape[0]
    inputs = (*heads.arrays, k_pages, v_pages, slots)
    block = min(TOKENS, pl.next_power_of_2(tokens))
    q = jax.ShapeDtypeStruct((tokens, heads.N, heads.H), heads.dtype)
    pages = jax.ShapeDtypeStruct(k_pages.shape, k_pages.dtype)
    first = len(heads.arrays)
    return pl.pallas_call(
        functools.partial(_kernel, heads=heads, block=block),
        name="rope_page_write",
        grid=(pl.cdiv(tokens, block), heads.K),
        in_specs=[pl.no_block_spec] * len(inputs),
        out_specs=[pl.no_block_spec] * 3,
        out_shape=[q, pages, pages],
        input_output_aliases={first: 1, first + 1: 2},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(*inputs)


def refuse(heads: Heads, k_pages: jax.Array) -> None:
    """NotImplementedError for what this implementation does not do."""
    if heads.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"heads must be bfloat16 or float16, got {jnp.dtype(heads.dtype).name}")
    if k_pages.dtype != heads.dtype:
        raise NotImplementedError(f"pages must be {jnp.dtype(heads.dtype).name} like the heads, got {k_pages.dtype}")
    if heads.H > 256:
        raise NotImplementedError(f"head dim {heads.H} needs more registers than a program has; at most 256")


@dataclass(frozen=True)
class Turner:
    """Loads tiles of heads from a kernel's references, normed and rotated; all indices and masks broadcast."""

    refs: Any  # Heads of references in place of arrays
    col: jax.Array  # column of a head, along the tile's last axis

    @property
    def half(self) -> int:
        return self.refs.H // 2

    def angles(self, token: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """f32 cosines, and sines with the sign that a column's partner takes."""
        col, half = self.col, self.half
        angle = jnp.where(col < half, col, col - half)
        cos = plt.load(self.refs.cos.at[token, angle], mask=mask, other=0.0)
        sin = plt.load(self.refs.sin.at[token, angle], mask=mask, other=0.0)
        return cos, jnp.where(col < half, -sin, sin)

    def plain(self, token: jax.Array, head: jax.Array, mask: jax.Array, col: jax.Array | None = None) -> jax.Array:
        """A tile in the model's dtype, neither normed nor rotated."""
        lane = head * self.refs.H + (self.col if col is None else col)
        if not self.refs.parts:
            return plt.load(self.refs.qkv.at[token, lane], mask=mask, other=0.0)
        total = plt.load(self.refs.qkv.at[0, token, lane], mask=mask, other=0.0)
        for part in range(1, self.refs.parts):
            total += plt.load(self.refs.qkv.at[part, token, lane], mask=mask, other=0.0)
        if self.refs.bias is not None:
            lane = jnp.broadcast_to(lane, mask.shape)  # a mask is no wider than its indices
            total += plt.load(self.refs.bias.at[lane], mask=mask, other=0.0).astype(jnp.float32)
        return total.astype(self.refs.dtype)

    def turned(
        self, token: jax.Array, head: jax.Array, norm: int, mask: jax.Array, angles: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        """A tile normed, if the model does that, and rotated."""
        col, half, refs = self.col, self.half, self.refs
        partner = jnp.where(col < half, col + half, col - half)
        x = self.plain(token, head, mask).astype(jnp.float32)
        y = self.plain(token, head, mask, partner).astype(jnp.float32)
        if refs.norms is not None:
            mean = (x * x).sum(axis=-1, keepdims=True) / refs.H
            scale = lax.rsqrt(mean + refs.eps)
            inside = col < refs.H

            def scaled(values: jax.Array, col: jax.Array) -> jax.Array:
                # A row of its own index array: mixing integers and arrays is beyond the interpreter.
                weight = plt.load(refs.norms.at[jnp.full_like(col, norm), col], mask=inside, other=0.0)
                return (values * scale * weight.astype(jnp.float32)).astype(refs.dtype).astype(jnp.float32)

            x, y = scaled(x, col), scaled(y, partner)
        cos, sin = angles
        return (x * cos + y * sin).astype(refs.dtype)


def _kernel(*arrays: Any, heads: Heads, block: int) -> None:
    count = len(heads.arrays)
    slots, q_out, k_pages, v_pages = arrays[count + 2 :]  # the pages as inputs are the same memory
    refs, head, group = replaced(heads, arrays[:count]), pl.program_id(1), heads.N // heads.K
    token = (pl.program_id(0) * block + jnp.arange(block))[:, None]
    col = jnp.arange(max(16, pl.next_power_of_2(heads.H)))[None, :]
    here = token < heads.cos.shape[0]
    inside = here & (col < heads.H)
    turner = Turner(refs, col)
    angles = turner.angles(token, inside)

    def one_query(member: jax.Array, _: None) -> None:
        query = head * group + member
        plt.store(q_out.at[token, query, col], turner.turned(token, query, Q, inside, angles), mask=inside)

    lax.fori_loop(0, group, one_query, None)
    P, _, page_size, _ = k_pages.shape
    slot = plt.load(slots.at[token], mask=here, other=-1)
    live = (slot >= 0) & (slot < P * page_size)
    # Dropped tokens point outside: the interpreter writes old values back through masked stores.
    page, offset = jnp.where(live, slot // page_size, P), jnp.where(live, slot % page_size, 0)
    key = turner.turned(token, heads.N + head, K, inside, angles)
    plt.store(k_pages.at[page, head, offset, col], key, mask=live & inside)
    value = turner.plain(token, heads.N + heads.K + head, inside)
    plt.store(v_pages.at[page, head, offset, col], value, mask=live & inside)
