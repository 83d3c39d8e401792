"""Ways to do the attention a Decoder asks for, as the parity tests plug them in.

A Cache holds per-layer arrays; `attend(config, cache, positions)` gives the callback, which replaces the arrays in
the list `cache` as it goes. A new way is a class with these two methods and one line in WAYS.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.rope_page_write.api import rope_page_write
from pallas_kernels.rope_page_write.reference import separated


def causal(config):
    """No cache: queries [..., T, N, H] see the keys of the same call, as in training."""

    def attend(layer, heads):
        q, k, v = separated(heads)
        positions = jnp.arange(q.shape[-3])
        return softmax_attention(config, layer, q, k, v, positions)

    return attend


def softmax_attention(config, layer, q, k, v, positions):
    """q [..., T, N, H] at these positions over keys [..., S, K, H] at positions 0, 1, 2, ..."""
    group = config.num_heads // config.num_kv_heads
    k, v = (jnp.repeat(x, group, axis=-2) for x in (k, v))
    scores = jnp.einsum("...tnh,...snh->...nts", q, k, preferred_element_type=jnp.float32) * config.attention_scale
    columns = jnp.arange(k.shape[-3])
    visible = columns <= positions[:, None]
    if config.windows[layer] is not None:
        visible &= columns > positions[:, None] - config.windows[layer]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("...nts,...snh->...tnh", weights.astype(v.dtype), v)


class Dense:
    """One array a layer, indexed by position."""

    def cache(self, config, length, dtype):
        empty = jnp.zeros((length, config.num_kv_heads, config.head_dim), dtype)
        return [(empty, empty)] * config.num_layers

    def attend(self, config, cache, positions):
        def attend(layer, heads):
            q, k, v = separated(heads)
            cache[layer] = tuple(old.at[positions].set(new) for old, new in zip(cache[layer], (k, v)))
            return softmax_attention(config, layer, q, *cache[layer], positions)

        return attend


class Paged:
    """Pages of four tokens in a shuffled order, every unused value NaN, every unused table entry poisoned."""

    page_size = 4

    def cache(self, config, length, dtype):
        num_pages = 2 * -(-length // self.page_size)
        self.table = np.random.default_rng(0).permutation(num_pages)[: num_pages // 2].astype(np.int32)
        empty = jnp.full((num_pages, config.num_kv_heads, self.page_size, config.head_dim), jnp.nan, dtype)
        return [(empty, empty)] * config.num_layers

    def attend(self, config, cache, positions):
        slots = jnp.asarray(self.table)[positions // self.page_size] * self.page_size + positions % self.page_size
        kv_lens = positions[-1:] + 1
        used = jnp.arange(len(self.table)) < -(-kv_lens // self.page_size)
        table = jnp.where(used, jnp.asarray(self.table), -123456)[None]

        def attend(layer, heads):
            how = {"scale": config.attention_scale, "window": config.windows[layer]}
            if len(positions) == 1:
                out, *pages = decode_attention(heads, *cache[layer], table, kv_lens, **how)
                cache[layer] = tuple(pages)
                return out
            q, *pages = rope_page_write(heads, *cache[layer], slots)
            cache[layer] = tuple(pages)
            starts = jnp.array([0, len(positions)], jnp.int32)
            return paged_attention(q, *cache[layer], table, kv_lens, starts, **how)

        return attend


WAYS = {"dense": Dense, "paged": Paged}
