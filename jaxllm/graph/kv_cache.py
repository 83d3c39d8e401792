"""The keys and values of every layer: device arrays of pages, and their size in bytes before they exist.

In: a model's shape, a page size, a page count. Out: one (k_pages, v_pages) pair a layer, each [P, K, page_size, H].
Knows nothing of which sequence owns which page.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Device = Any  # jax.Device, which type checkers take for a variable
LayerPages = tuple[Float[Array, "P K page H"], Float[Array, "P K page H"]]
KVCache = list[LayerPages]


@dataclass(frozen=True)
class KVCacheSpec:
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_pages: int
    dtype: jnp.dtype

    @property
    def bytes_per_page(self) -> int:
        """Over all layers, keys and values."""
        per_token = 2 * self.num_kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize
        return self.num_layers * self.page_size * per_token

    def with_pages(self, num_pages: int) -> KVCacheSpec:
        return dataclasses.replace(self, num_pages=num_pages)

    def repeated(self, devices: int) -> KVCacheSpec:
        """From the kv heads of one device to those of all."""
        return dataclasses.replace(self, num_kv_heads=self.num_kv_heads * devices)

    def shapes(self, sharding: jax.sharding.Sharding) -> list[Any]:
        """What `allocate` gives, before it exists."""
        leaf = jax.ShapeDtypeStruct(self.page_shape, self.dtype, sharding=sharding)
        return [(leaf, leaf)] * self.num_layers

    @property
    def page_shape(self) -> tuple[int, int, int, int]:
        return self.num_pages, self.num_kv_heads, self.page_size, self.head_dim


def page_dtype(kv_dtype: str, dtype: DTypeLike) -> jnp.dtype:
    """What pages hold when the setting is `kv_dtype` and the model computes in `dtype`."""
    return jnp.dtype(jnp.float8_e4m3fn if kv_dtype == "fp8" else dtype)


def scales_of(pages: Array, scales: tuple[float, float]) -> dict[str, Array]:
    """What e4m3 pages are read and written with: f32[K] of keys and of values; nothing for wider pages."""
    if pages.dtype != jnp.float8_e4m3fn:
        return {}
    keys, values = (jnp.full((pages.shape[1],), scale, jnp.float32) for scale in scales)
    return {"k_scale": keys, "v_scale": values}


def allocate(shapes: list[Any]) -> KVCache:
    """Zeroed pages made where they will lie; never staged through the host."""
    leaf = shapes[0][0]  # layers are alike
    zeros = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)
    return [(zeros(), zeros()) for _ in shapes]
