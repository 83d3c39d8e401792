"""A decode step's attention as two ops one after the other: through whatever kernels they have, or in plain jnp.

In: Heads, pages, page tables, lengths, checked by api.py. Out: as there. It does not know what the ops choose.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.api import paged_attention_decode
from pallas_kernels.rope_page_write.api import rope_page_write
from pallas_kernels.rope_page_write.heads import Heads


def apart(
    heads: Heads,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    *,
    implementation: str | None = None,  # of the two
    **options: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The two ops one after the other."""
    P, _, page_size, _ = k_pages.shape
    position = jnp.maximum(kv_lens - 1, 0)
    page = jnp.take_along_axis(page_table, (position // page_size)[:, None], axis=1)[:, 0]
    slots = jnp.where(kv_lens > 0, page * page_size + position % page_size, P * page_size)
    q, k_pages, v_pages = rope_page_write(heads, k_pages, v_pages, slots, implementation=implementation)
    rows = page_table, kv_lens
    out = paged_attention_decode(q, k_pages, v_pages, *rows, implementation=implementation, **options)
    return out, k_pages, v_pages


def decode_attention(*arrays: Any, **options: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same in plain jnp, wherever it runs."""
    return apart(*arrays, implementation="reference", **options)
