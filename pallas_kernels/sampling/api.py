"""One token a row from logits: argument checks, then the best implementation that accepts.

In: logits, a key and four parameters a row. Out: tokens. The same row gives the same token whatever its batch.
This module does not know penalties, biases, grammar masks or logprobs: they are in the logits already, a token that
must not be chosen having the logit -inf.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch, imported, register
from pallas_kernels.sampling.reference import sample_from_all

register("sampling", "reference", imported("pallas_kernels.sampling.reference:sample"))


def sample(
    logits: jax.Array,  # f32[B, V]
    keys: jax.Array,  # u32[B, 2]
    temperature: jax.Array,  # f32[B]
    top_k: jax.Array,  # i32[B]
    top_p: jax.Array,  # f32[B]
    min_p: jax.Array,  # f32[B]
    *,
    truncates: bool = True,
    implementation: str | None = None,
    platform: str | None = None,
) -> jax.Array:
    """-> i32[B]. Each row keeps a set of tokens and draws one with probability ~ exp(logit / temperature).

    In this order: min_p drops tokens less likely than min_p times the most likely; top_k (<= 0: off) keeps the k most
    likely of those, and all that tie with the k-th; top_p (1: off) keeps the smallest set of most likely tokens that
    holds top_p of what is left, at least one, and all that tie with its last. Probabilities are after temperature.
    temperature 0 takes the largest logit, the lowest index among ties, and ignores the rest.

    The draw is argmax of logits / temperature + Gumbel noise over the kept tokens. Token v's noise is
    -log(-log(1 - u)), u = (b + 1/2) / 2^32, where b xors the two words of Threefry-2x32 of the block (0, v) under the
    row's key, as jax.random.bits does: every implementation draws the same token, up to rounding.
    `truncates` false: the caller knows that top_k, top_p and min_p are off in every row.
    A row needs one finite logit, and neither NaN nor +inf; otherwise its token is in range and means nothing.
    """
    if logits.ndim != 2 or 0 in logits.shape or logits.dtype != jnp.float32:
        raise ValueError(f"logits must be f32[B, V], not empty, got {logits.dtype}{list(logits.shape)}")
    B = logits.shape[0]
    if keys.shape != (B, 2) or keys.dtype != jnp.uint32:
        raise ValueError(f"keys must be u32[B, 2] = u32[{B}, 2], got {keys.dtype}{list(keys.shape)}")
    for name, array, dtype in (
        ("temperature", temperature, jnp.float32),
        ("top_k", top_k, jnp.int32),
        ("top_p", top_p, jnp.float32),
        ("min_p", min_p, jnp.float32),
    ):
        if array.shape != (B,) or array.dtype != dtype:
            wanted = f"{jnp.dtype(dtype).name}[B] = {jnp.dtype(dtype).name}[{B}]"
            raise ValueError(f"{name} must be {wanted}, got {array.dtype}{list(array.shape)}")
    if not truncates:  # element-wise but for one reduction, which XLA fuses: nothing for a kernel to gain
        return sample_from_all(logits, keys, temperature)
    run = dispatch("sampling", implementation=implementation, platform=platform)
    return run(logits, keys, temperature, top_k, top_p, min_p)
