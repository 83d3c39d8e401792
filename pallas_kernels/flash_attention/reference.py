"""Causal attention of packed sequences in plain jnp: paged attention's reference over pages of one key.

In: arguments checked by api.py. Out: attention outputs. It holds a table of rows times keys, so it is for tests and for
what no kernel takes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import reference


def flash_attention(
    q: jax.Array,  # [T, N, H]
    k: jax.Array,  # [S, K, H]
    v: jax.Array,
    query_starts: jax.Array,  # i32[R + 1]
    key_starts: jax.Array,  # i32[R + 1]
    *,
    aligned: bool = False,
    **options: Any,
) -> Any:
    """See api.flash_attention."""
    del aligned
    table = key_starts[:-1, None] + jnp.arange(k.shape[0], dtype=jnp.int32)
    lens = key_starts[1:] - key_starts[:-1]
    return reference.paged_attention(q, k[:, :, None], v[:, :, None], table, lens, query_starts, **options)
