"""All layers of a dense decoder for one decode step: argument checks, then the best implementation that accepts.

In: the residual stream after the embedding, each layer's weights stored [out, in] and its pages, page tables, lengths,
rotations, and the final norm and head if these are wanted too. Out: the residual stream after the last layer, or the
logits, and the pages with this step's keys and values. A row's bits depend neither on the other rows nor on how many
there are, where a kernel says so. Knows no embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels import bf12
from pallas_kernels.dispatch import dispatch, imported, register
from pallas_kernels.quant_matmul import packing

_ROOM = "pallas_kernels.decode_layers"
register("decode_layers", "cuda", imported(f"{_ROOM}.cuda:decode_layers"), platforms=("gpu",))
register("decode_layers", "launched", imported(f"{_ROOM}.launched:decode_layers"), platforms=("gpu",))
register("decode_layers", "wide", imported(f"{_ROOM}.wide:decode_layers"), platforms=("gpu",))
register("decode_layers", "cuda_emulated", imported(f"{_ROOM}.emulated:decode_layers"), ("interpret",))
register("decode_layers", "launched_emulated", imported(f"{_ROOM}.emulated:launched_layers"), ("interpret",))
register("decode_layers", "wide_emulated", imported(f"{_ROOM}.emulated:wide_layers"), ("interpret",))
# Not on a GPU: where the kernel declines, the layers one by one are faster.
register("decode_layers", "reference", imported(f"{_ROOM}.reference:decode_layers"), platforms=("cpu",))

Pages = tuple[jax.Array, jax.Array]  # keys and values of a layer, each [P, K, page_size, H]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Few:
    """A weight [outputs, inputs] in few bits: scale * q, as quant_matmul takes it, or bf16 without loss."""

    # e4m3[N, K], or words i32[N / 64, K / 64, 8 or 4, 128] of int8 or int4 as packing.py lays them, or words
    # i32[N / 64, K / 64, 4, 388] of bf16 as bf12.py does, of gate_up with its rows in turns.
    values: jax.Array
    scale: jax.Array | None  # f32[N]; of int4 bf16 or f16 [K / group, N]; of bf12 None

    @property
    def kind(self) -> str:
        """fp8, int8, int4 or bf12."""
        if self.values.dtype != jnp.int32:
            return "fp8"
        if self.values.shape[3] == bf12.WORDS:
            return "bf12"
        return "int8" if self.values.shape[2] == packing.rows_of(8) else "int4"

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = self.values.shape
        return sizes if len(sizes) == 2 else (sizes[0] * packing.TILE, sizes[1] * packing.TILE)

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        if self.scale is None or self.kind != "int4":
            return self.shape[1]
        return self.shape[1] // self.scale.shape[0]

    def check(self, name: str) -> None:
        """ValueError for values or scales that are none of the above."""
        tiles = [(packing.rows_of(bits), packing.LANES) for bits in (4, 8)] + [(bf12.TILE // bf12.SLAB, bf12.WORDS)]
        packed = self.values.ndim == 4 and self.values.shape[2:] in tiles
        if not (packed if self.values.dtype == jnp.int32 else self.values.dtype == jnp.float8_e4m3fn):
            raise ValueError(f"{name}: need e4m3[N, K] or packed words, got {self.values.dtype}{self.values.shape}")
        N, K = self.shape
        if self.scale is None or self.kind == "bf12":
            good = self.scale is None and self.kind == "bf12"
        elif self.kind == "int4":
            good = self.scale.dtype in (jnp.bfloat16, jnp.float16) and self.scale.shape[1:] == (N,)
            good = good and K % self.scale.shape[0] == 0
        else:
            good = self.scale.dtype == jnp.float32 and self.scale.shape == (N,)
        if not good:
            scales = "no scales" if self.scale is None else f"scales {self.scale.dtype}{self.scale.shape}"
            raise ValueError(f"{name}: {self.kind}[{N}, {K}] with {scales}")


Weight = jax.Array | Few


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerWeights:
    qkv: Weight  # [(N + 2K) * H, D]: q, then k, then v
    o: Weight  # [D, N * H]
    norms: jax.Array  # [2, D]: attention's, the feed-forward block's
    gate_up: Weight  # [2F, D]: all of gate, then up
    down: Weight  # [D, F]
    qkv_bias: jax.Array | None = None  # [(N + 2K) * H]
    o_bias: jax.Array | None = None  # [D]
    qk_norms: jax.Array | None = None  # [2, H]

    @property
    def matrices(self) -> tuple[Weight, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Head:
    norm: jax.Array  # [D]
    table: Weight  # [V, D]


def decode_layers(
    x: jax.Array,  # [B, D]
    layers: Sequence[LayerWeights],
    pages: Sequence[Pages],
    page_table: jax.Array,  # i32[B, W]
    kv_lens: jax.Array,  # i32[B], this step's token included; 0 = padding
    cosines: jax.Array,  # f32[B, H / 2]
    sines: jax.Array,
    *,
    eps: float,
    scale: float,
    head: Head | None = None,
    groups: tuple[tuple[int, ...], ...] = (),
    implementation: str | None = None,
    platform: str | None = None,
) -> tuple[jax.Array, list[Pages]]:
    """-> (x[B, D], or f32 logits[B, V] with a head; pages), these in place where the caller donates them. Padding rows
    come out as anything.

    Every layer is alike: full attention, SwiGLU. Entries of the page table behind a row's pages may hold anything.
    `groups`, inside shard_map: ids of devices that share the layers, in rank order. Each has some heads, with their
    pages, and some of F; what o and down give is summed over the group, in rank order.
    """
    B, D = x.shape
    if not layers or len(layers) != len(pages):
        raise ValueError(f"need one or more layers, each with its pages; got {len(layers)} and {len(pages)}")
    _, K, _, H = pages[0][0].shape
    NH, F = layers[0].o.shape[1], layers[0].down.shape[1]
    wanted = {
        "qkv": (NH + 2 * K * H, D),
        "o": (D, NH),
        "norms": (2, D),
        "gate_up": (2 * F, D),
        "down": (D, F),
        "qkv_bias": (NH + 2 * K * H,),
        "o_bias": (D,),
        "qk_norms": (2, H),
    }
    for number, (layer, own) in enumerate(zip(layers, pages, strict=True)):
        for name, shape in wanted.items():
            array, first = getattr(layer, name), getattr(layers[0], name)
            if (array is None) != (first is None) or (array is not None and array.shape != shape):
                got = None if array is None else list(array.shape)
                raise ValueError(f"layer {number}: {name} must be {list(shape)} as in layer 0, got {got}")
        for each in layer.matrices:
            if isinstance(each, Few):
                each.check(f"layer {number}")
        if any(each.shape != pages[0][0].shape for each in own):
            raise ValueError(f"layer {number}: pages must be {list(pages[0][0].shape)} as in layer 0")
    if head is not None and isinstance(head.table, Few):
        head.table.check("head")
    if head is not None and (head.norm.shape != (D,) or len(head.table.shape) != 2 or head.table.shape[1] != D):
        raise ValueError(f"head: need norm[{D}] and table[V, {D}], got {head.norm.shape} and {head.table.shape}")
    if page_table.ndim != 2 or page_table.shape[0] != B or kv_lens.shape != (B,):
        raise ValueError(f"need page_table[{B}, W] and kv_lens[{B}], got {page_table.shape} and {kv_lens.shape}")
    if page_table.dtype != jnp.int32 or kv_lens.dtype != jnp.int32:
        raise ValueError(f"page_table and kv_lens must be i32, got {page_table.dtype} and {kv_lens.dtype}")
    if cosines.shape != (B, H // 2) or sines.shape != (B, H // 2):
        raise ValueError(f"cosines and sines must be [{B}, {H // 2}], got {cosines.shape} and {sines.shape}")
    run = dispatch("decode_layers", implementation=implementation, platform=platform)
    rows = page_table, kv_lens, cosines, sines
    return run(x, layers, pages, *rows, eps=eps, scale=scale, head=head, groups=groups)
