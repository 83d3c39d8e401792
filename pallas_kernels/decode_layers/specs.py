"""Named shapes of whole decode steps, shared by tests and benchmarks: real models' and ones for an emulator.

In: a spec. Out: numpy inputs. This module knows no implementation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import bf12
from pallas_kernels.decode_layers.api import Few, Head, LayerWeights
from pallas_kernels.quant_matmul import packing

EPS = 1e-5
SHARED: dict[str, Callable[[P], P]] = {  # how a layer's weights lie over devices that share it
    "qkv": lambda axis: axis,
    "o": lambda axis: P(None, *axis),
    "norms": lambda axis: P(),
    "gate_up": lambda axis: axis,
    "down": lambda axis: P(None, *axis),
    "qkv_bias": lambda axis: axis,
    "o_bias": lambda axis: P(),
    "qk_norms": lambda axis: P(),
}
MATRICES = ("qkv", "o", "gate_up", "down", "table")


@functools.partial(jax.jit, static_argnames=("kind", "group", "scales"))
def few(weight: jax.Array, kind: str, group: int = 128, scales: str = "bfloat16") -> Few:
    """Rounded to nearest, the largest number of an output (int4: of a group) at the end of the range."""
    wide = weight.astype(jnp.float32)
    if kind == "int4":
        parts = wide.reshape(len(wide), -1, group)
        scale = (jnp.abs(parts).max(axis=2) / 7.5).astype(scales)
        q = jnp.clip(jnp.round(parts / scale.astype(jnp.float32)[:, :, None]), -8, 7).reshape(wide.shape)
        return Few(packing.pack(q.astype(jnp.int8), 4), scale.T)
    most = jnp.abs(wide).max(axis=1)
    if kind == "fp8":
        return Few((wide / (most / 448)[:, None]).astype(jnp.float8_e4m3fn), most / 448)
    return Few(packing.pack(jnp.round(wide / (most / 127)[:, None]).astype(jnp.int8), 8), most / 127)


@functools.partial(jax.jit, static_argnames="turned")
def lossless(weight: jax.Array, turned: bool = False) -> Few:
    """bf12, of gate_up with its rows in turns."""
    return Few(bf12.pack(bf12.in_turns(weight) if turned else weight)[0], None)


@dataclass(frozen=True)
class LayersSpec:
    """`lengths` of the rows, this step's token included; 0 = padding."""

    name: str
    lengths: tuple[int, ...]
    L: int = 2
    D: int = 256
    N: int = 4
    K: int = 2
    F: int = 192
    H: int = 128
    page_size: int = 16
    width: int = 20
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    dtype: str = "bfloat16"
    V: int = 0  # rows of the head; 0: there is none
    kind: str = "bf16"  # of weights: or fp8, int8, int4, bf12
    group: int = 128  # int4: inputs that share a scale
    scales: str = "bfloat16"

    def arguments(self, given: dict[str, Any]) -> tuple[Any, ...]:
        """The op's arguments as JAX arrays: x, layers, pages, page_table, kv_lens, cosines, sines."""
        layers = [
            LayerWeights(**{name: self.stored(name, each) for name, each in own.items()}) for own in given["layers"]
        ]
        pages = [tuple(map(jnp.asarray, pair)) for pair in given["pages"]]
        rows = (jnp.asarray(given[name]) for name in ("page_table", "kv_lens", "cosines", "sines"))
        return jnp.asarray(given["x"]), layers, pages, *rows

    def stored(self, name: str, array: Any) -> Any:
        """As the kernels get it: a matrix in this spec's kind; None stays None."""
        if array is None or self.kind == "bf16" or name not in MATRICES:
            return jax.tree.map(jnp.asarray, array)
        if self.kind == "bf12":
            return lossless(jnp.asarray(array), turned=name == "gate_up")
        return few(jnp.asarray(array), self.kind, self.group, self.scales)

    def dealt(self, layers: list[LayerWeights], ranks: int) -> list[LayerWeights]:
        """Weights whose equal shares, along SHARED, are those of devices that share the layers."""
        q, k = self.N * self.H, self.K * self.H

        def cut(array: Any, *parts: int) -> Any:  # rows of each part in equal shares, a device's one behind the other
            if array is None:
                return None
            pieces = [jnp.split(part, ranks) for part in jnp.split(array, np.cumsum(parts)[:-1].tolist())]
            return jnp.concatenate([piece[rank] for rank in range(ranks) for piece in pieces])

        return [
            replace(
                each,
                qkv=cut(each.qkv, q, k, k),
                qkv_bias=cut(each.qkv_bias, q, k, k),
                gate_up=cut(each.gate_up, self.F, self.F),
            )
            for each in layers
        ]

    def shared_by(self, op: Callable[..., Any], mesh: Mesh, layer: LayerWeights) -> Callable[..., Any]:
        """`op` on every device of the mesh, with its share of the layers and pages; outputs one behind the other."""
        axis, heads = P(*mesh.axis_names), P(None, *mesh.axis_names)
        places: Any = {name: place(axis) for name, place in SHARED.items() if getattr(layer, name) is not None}
        placed = LayerWeights(**places)
        pages = [(heads, heads)] * self.L
        given = P(), [placed] * self.L, pages, *[P()] * 4
        return jax.jit(jax.shard_map(op, mesh=mesh, in_specs=given, out_specs=(axis, pages), check_vma=False))

    def head(self, given: dict[str, Any]) -> Head | None:
        if not self.V:
            return None
        norm, table = given["head"]
        return Head(jnp.asarray(norm), self.stored("table", table))

    def paging(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """int32[B, width], poison behind a row's pages; bool[P, page_size]: what holds something before this step."""
        used = [-(-length // self.page_size) for length in self.lengths]
        order = rng.permutation(sum(used) + 3).astype(np.int32)
        table = np.full((len(self.lengths), self.width), 2**30, np.int32)
        written = np.zeros((len(order), self.page_size), bool)
        for row, (length, end) in enumerate(zip(self.lengths, np.cumsum(used), strict=True)):
            own = order[end - used[row] : end]
            table[row, : len(own)] = own
            slots = np.arange(len(own) * self.page_size) < length - 1  # the last one is this step's
            written[own] = slots.reshape(len(own), self.page_size)
        return table, written

    def inputs(self, seed: int = 0) -> dict[str, Any]:
        """Arguments by name: numpy arrays, weights as dicts."""
        rng = np.random.default_rng(seed)

        def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
            return (rng.standard_normal(shape, np.float32) * scale + shift).astype(jnp.dtype(self.dtype))

        B, wide = len(self.lengths), (self.N + 2 * self.K) * self.H
        layers = [
            {
                "qkv": normal(wide, self.D, scale=self.D**-0.5),
                "o": normal(self.D, self.N * self.H, scale=(self.N * self.H) ** -0.5),
                "norms": normal(2, self.D, scale=0.1, shift=1.0),
                "gate_up": normal(2 * self.F, self.D, scale=self.D**-0.5),
                "down": normal(self.D, self.F, scale=self.F**-0.5),
                "qkv_bias": normal(wide) if self.qkv_bias else None,
                "o_bias": normal(self.D) if self.o_bias else None,
                "qk_norms": normal(2, self.H, scale=0.1, shift=1.0) if self.qk_norm else None,
            }
            for _ in range(self.L)
        ]
        table, written = self.paging(rng)
        shape = (len(written), self.K, self.page_size, self.H)
        nothing = np.array(np.nan, jnp.dtype(self.dtype))
        pages = [
            tuple(np.where(written[:, None, :, None], normal(*shape), nothing) for _ in range(2)) for _ in range(self.L)
        ]
        angles = rng.uniform(0, 6, (B, self.H // 2)).astype(np.float32)
        return {
            "x": normal(B, self.D),
            "layers": layers,
            "pages": pages,
            "page_table": table,
            "kv_lens": np.array(self.lengths, np.int32),
            "cosines": np.cos(angles),
            "sines": np.sin(angles),
            "head": (normal(self.D, scale=0.1, shift=1.0), normal(self.V, self.D, scale=self.D**-0.5)),
        }


_SMALL = LayersSpec("small", (1, 129, 40, 0, 300, 16, 17, 128))
LAYERS_SPECS = (
    _SMALL,
    replace(_SMALL, name="one_row", lengths=(130,)),
    replace(_SMALL, name="biases_qk_norm_deep", lengths=(5, 0, 33), qkv_bias=True, o_bias=True, qk_norm=True, F=2112),
    replace(_SMALL, name="eight_queries_a_key", lengths=(200, 64), N=8, K=1, page_size=64, width=5, L=1, qk_norm=True),
    LayersSpec("long", (2900,), L=1, D=64, N=1, K=1, F=64, page_size=64, width=46),
    replace(_SMALL, name="head", lengths=(33, 0, 5), L=1, V=1003),
    # For the kernel of up to 8; the other one's workers have several segments each.
    replace(_SMALL, name="too_many_rows", lengths=(3, 20, 0) * 4, qk_norm=True),
    replace(_SMALL, name="small_f32", lengths=(3, 20), dtype="float32"),
)

_ODD: dict[str, Any] = dict(lengths=(5, 0, 33), qkv_bias=True, o_bias=True, qk_norm=True)
QUANTISED_SPECS = (
    replace(_SMALL, name="int4", kind="int4", F=384),
    # Three slots, the last of them not full; a block's units end inside a tile.
    replace(_SMALL, name="int4_deep", kind="int4", group=64, F=4224, D=384, **_ODD),
    replace(_SMALL, name="int4_f16", kind="int4", lengths=(130,), group=64, scales="float16", F=256, L=3),
    replace(_SMALL, name="fp8", kind="fp8"),
    replace(_SMALL, name="fp8_deep", kind="fp8", F=3264, D=320, **_ODD),
    replace(_SMALL, name="fp8_head", kind="fp8", lengths=(33, 0, 5), L=1, V=1003),
    replace(_SMALL, name="int8", kind="int8"),
    replace(_SMALL, name="int8_deep", kind="int8", F=3264, D=320, **_ODD),
    replace(_SMALL, name="int8_head", kind="int8", lengths=(33, 0, 5), L=1, V=1024),
)

BF12_SPECS = (
    replace(_SMALL, name="bf12", kind="bf12"),
    replace(_SMALL, name="bf12_deep", kind="bf12", F=3264, D=320, **_ODD),
)
