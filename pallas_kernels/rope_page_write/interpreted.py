"""The GPU kernel of this room under Pallas's interpreter, for tests on a CPU. In and out as the kernel."""

from __future__ import annotations

import jax

from pallas_kernels.rope_page_write import triton
from pallas_kernels.rope_page_write.heads import Heads


def rope_page_write(
    heads: Heads, k_pages: jax.Array, v_pages: jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """triton.rope_page_write, interpreted."""
    return triton.rope_page_write(heads, k_pages, v_pages, slots, interpret=True)
