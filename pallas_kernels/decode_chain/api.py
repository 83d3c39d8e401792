"""Everything between two attentions of a dense decoder: argument checks, then the best implementation that accepts.

In: attention's output, the residual stream and weights stored [out, in]. Out: the residual stream after the layer, and
the next layer's merged queries, keys and values. Sums are f32; results have the inputs' dtype. A layer's two norm
weights come as one array, because XLA keeps a kernel that gets a slice out of its CUDA graphs. This module knows no
model and no heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from pallas_kernels.dispatch import dispatch, imported, register

_ROOM = "pallas_kernels.decode_chain"
register("decode_chain", "cuda", imported(f"{_ROOM}.cuda:decode_chain"), platforms=("gpu",))
register("decode_chain", "cuda_emulated", imported(f"{_ROOM}.emulated:decode_chain"), ("interpret",))
# Not on a GPU: products one by one do better there than the reference.
register("decode_chain", "reference", imported(f"{_ROOM}.reference:decode_chain"), platforms=("cpu",))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense:
    """The weights of a layer's second part."""

    o: jax.Array  # [D, O]
    norms: jax.Array  # [2, D]; the second is the feed-forward block's
    gate_up: jax.Array  # [2F, D]: all of gate, then up
    down: jax.Array  # [D, F]
    o_bias: jax.Array | None = None  # [D]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Following:
    """The weights of the next layer's first part."""

    norms: jax.Array  # [2, D]; the first is attention's
    qkv: jax.Array  # [Q, D]
    bias: jax.Array | None = None  # [Q]


def decode_chain(
    x: jax.Array,  # [T, D]
    mixed: jax.Array,  # [T, O]
    layer: Dense,
    following: Following | None,
    *,
    eps: float,
    implementation: str | None = None,
    platform: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """x' = x + o(mixed); x'' = x' + down(silu(gate) * up) of norm(x'); qkv(norm(x'')) -> (x''[T, D], qkv[T, Q])."""
    T, D = x.shape
    F = layer.down.shape[1]
    shapes: dict[str, tuple[jax.Array, tuple[int, ...]]] = {
        "mixed": (mixed, (T, mixed.shape[-1])),
        "o": (layer.o, (D, mixed.shape[-1])),
        "norms": (layer.norms, (2, D)),
        "gate_up": (layer.gate_up, (2 * F, D)),
        "down": (layer.down, (D, F)),
    }
    if layer.o_bias is not None:
        shapes["o_bias"] = layer.o_bias, (D,)
    if following is not None:
        Q = following.qkv.shape[0]
        shapes |= {"next norms": (following.norms, (2, D)), "next qkv": (following.qkv, (Q, D))}
        if following.bias is not None:
            shapes["next bias"] = following.bias, (Q,)
    for name, (array, wanted) in shapes.items():
        if array.shape != wanted or 0 in wanted:
            raise ValueError(f"{name} must be {list(wanted)} for x {list(x.shape)}, got {list(array.shape)}")
    run = dispatch("decode_chain", implementation=implementation, platform=platform)
    return run(x, mixed, layer, following, eps=eps)
