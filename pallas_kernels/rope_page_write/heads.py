"""What a layer's projection leaves for its attention: queries, keys and values side by side, and what turns them.

In: arrays. Out: the same, checked. Knows neither pages nor which tokens these are.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Heads:
    """Before norms and rotation. `...` is T where kernels are meant; the reference takes any leading dims.

    Products may come in f32 parts that are still to be summed; the bias then goes on top before the one rounding.
    """

    qkv: jax.Array  # [..., (N + 2K) * H], all of q, then k, then v; or f32[S, ..., (N + 2K) * H]: partial sums
    cos: jax.Array  # f32[..., H / 2], of each token's position
    sin: jax.Array
    norms: jax.Array | None = None  # [2, H]: RMS norms of the heads of q and of k
    bias: jax.Array | None = None  # [(N + 2K) * H], with partial sums only: otherwise it is in them
    K: int = field(kw_only=True, metadata={"static": True})  # kv heads
    eps: float = field(default=1e-6, kw_only=True, metadata={"static": True})
    dtype: Any = field(kw_only=True, metadata={"static": True})  # the model's, to which everything is rounded

    @property
    def H(self) -> int:
        return 2 * self.cos.shape[-1]

    @property
    def N(self) -> int:
        return self.qkv.shape[-1] // self.H - 2 * self.K

    @property
    def parts(self) -> int:
        """How many partial sums make the products; 0: they are whole."""
        return self.qkv.shape[0] if len(self.qkv.shape) > len(self.cos.shape) else 0

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """Those that are there, in the order of fields."""
        return tuple(array for array in (self.qkv, self.cos, self.sin, self.norms, self.bias) if array is not None)

    def check(self) -> None:
        """ValueError, with the shapes, for arrays that do not fit each other."""
        cos, qkv, H = self.cos, self.qkv, self.H
        if cos.ndim < 2 or 0 in cos.shape or cos.shape != self.sin.shape or cos.dtype != jnp.float32:
            raise ValueError(
                f"cos and sin must be f32[T, H / 2] alike, got {cos.dtype}{list(cos.shape)}, {list(self.sin.shape)}"
            )
        lead = qkv.shape[1:-1] if self.parts else qkv.shape[:-1]
        if lead != cos.shape[:-1] or qkv.shape[-1] % H or self.N < 1 or self.N % self.K:
            raise ValueError(
                f"qkv must be [T, (N + 2K) * H], or [S, T, ...] in parts, with T = {cos.shape[0]}, K = {self.K} that "
                f"divides N, H = {H}; got {list(qkv.shape)}"
            )
        if qkv.dtype != (jnp.float32 if self.parts else self.dtype):
            raise ValueError(f"qkv must be {jnp.dtype(self.dtype).name}, or float32 in parts; got {qkv.dtype}")
        if self.norms is not None and self.norms.shape != (2, H):
            raise ValueError(f"norms must be [2, H] = [2, {H}], got {list(self.norms.shape)}")
        if self.bias is not None and (self.bias.shape != qkv.shape[-1:] or not self.parts):
            raise ValueError(f"bias [{qkv.shape[-1]}] goes with qkv in parts, got {list(self.bias.shape)}")


def replaced(heads: Heads, arrays: tuple[Any, ...]) -> Heads:
    """`heads` with these in place of its `arrays`: references of a kernel, say."""
    qkv, cos, sin, *rest = arrays
    norms = rest.pop(0) if heads.norms is not None else None
    return dataclasses.replace(heads, qkv=qkv, cos=cos, sin=sin, norms=norms, bias=rest[0] if rest else None)
