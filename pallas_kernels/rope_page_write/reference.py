"""Norms, rotation and page write in plain jnp: what the kernels must agree with, and what runs where none accepts.

In: Heads, checked by api.py. Out: queries, keys and values of their own, or pages. Every rounding to the model's dtype
stands where it stands in the kernels: after the product, after the norm, after the rotation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.norm.reference import rms_norm, summed
from pallas_kernels.page_write.reference import page_write
from pallas_kernels.rope_page_write.heads import Heads


def separated(heads: Heads) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q[..., N, H], k[..., K, H], v[..., K, H]: q and k normed and rotated."""
    qkv = summed(heads.qkv, heads.cos.ndim, heads.bias, heads.dtype)
    lead, H = qkv.shape[:-1], heads.H
    q_rows, kv_rows = heads.N * H, heads.K * H
    q = qkv[..., :q_rows].reshape(*lead, heads.N, H)
    k = qkv[..., q_rows : q_rows + kv_rows].reshape(*lead, heads.K, H)
    v = qkv[..., q_rows + kv_rows :].reshape(*lead, heads.K, H)
    if heads.norms is not None:
        q, k = rms_norm(q, heads.norms[0], heads.eps), rms_norm(k, heads.norms[1], heads.eps)
    return rotate(q, heads.cos, heads.sin), rotate(k, heads.cos, heads.sin), v


@jax.named_scope("rope")
def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x[..., heads, H] by the angles of [..., H/2]; pairs are (i, i + H/2), as Hugging Face stores q and k."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rope_page_write(
    heads: Heads, k_pages: jax.Array, v_pages: jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See api.rope_page_write."""
    q, k, v = separated(heads)
    return q, *page_write(k_pages, v_pages, k, v, slots)
