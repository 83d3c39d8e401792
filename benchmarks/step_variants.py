"""jaxllm's command line with the many small kernels of a step as they were, or as partial sums: for A/B runs.

In: a variant, then a command line of jaxllm. Out: what that command prints. The two ways run the same model on the same
weights; only who norms, rotates, writes, adds and samples differs.

    python -m benchmarks.step_variants before bench latency MODEL --batch 1,32,256
    python -m benchmarks.step_variants after | parts | attention | norms ...

`before` has every op as XLA's fusions, as it was; `attention` and `norms` change only that part; `parts` leaves the
products of a few rows in partial sums. Nothing is kept in a compile cache: its keys know nothing of variants.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.engine import startup
from jaxllm.graph import sampling, steps
from jaxllm.graph.models.decoder import plainly
from pallas_kernels.norm.api import add_norm
from pallas_kernels.paged_attention import mosaic_sm90, triton
from pallas_kernels.paged_attention.api import paged_attention_decode
from pallas_kernels.rope_page_write.api import rope_page_write
from pallas_kernels.rope_page_write.heads import Heads
from serve import cli
from sharding import collectives

VARIANTS = ("before", "after", "attention", "norms", "parts")


def decode_apart(
    heads: Heads, k_pages: jax.Array, v_pages: jax.Array, table: jax.Array, lens: jax.Array, **options: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Norms, rotation and scatters by XLA, then the decode kernel alone."""
    P, _, page_size, _ = k_pages.shape
    position = jnp.maximum(lens - 1, 0)
    page = jnp.take_along_axis(table, (position // page_size)[:, None], axis=1)[:, 0]
    slots = jnp.where(lens > 0, page * page_size + position % page_size, P * page_size)
    q, k_pages, v_pages = rope_page_write(heads, k_pages, v_pages, slots, implementation="reference")
    return paged_attention_decode(q, k_pages, v_pages, table, lens, **options), k_pages, v_pages


def decode_gathered(
    q: jax.Array,
    out: jax.Array,
    tokens: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    table: jax.Array,
    lens: jax.Array,
    **options: Any,
) -> jax.Array:
    """Rows of one query gathered, all 256 attended, and scattered back."""
    decoded = triton.paged_attention_decode(q.at[tokens].get(mode="clip"), k_pages, v_pages, table, lens, **options)
    return out.at[jnp.where(lens > 0, tokens, q.shape[0])].set(decoded, mode="drop")


def change(variant: str) -> None:
    """Put the variant's ways in place of the ones that are there."""
    if variant in ("before", "norms"):
        steps._decode = jax.jit(decode_apart, static_argnames=("scale", "window", "implementation"))
        pinned = functools.partial(rope_page_write, implementation="reference")
        steps._turn_and_write = lambda *arrays, implementation: jax.jit(pinned)(*arrays)
        mosaic_sm90.triton.decode_among = decode_gathered
    if variant in ("before", "attention"):
        reference = functools.partial(add_norm, implementation="reference")
        steps._add_norm = jax.jit(reference, static_argnames=("which", "eps"))
    if variant == "before":
        steps.Graph.onward = lambda self, exchange, shape: plainly
        sampling.api.draw = functools.partial(sampling.api.draw, implementation="reference")
        collectives.greedy = functools.partial(collectives.greedy, implementation="reference")
    if variant == "parts":
        startup.Graph = functools.partial(startup.Graph, parts=True)


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[0] not in VARIANTS:
        print(__doc__)
        return 2
    change(arguments[0])
    cli.main([*arguments[1:], "--set", "cache_dir="])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
