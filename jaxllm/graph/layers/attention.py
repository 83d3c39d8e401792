"""The projections around attention: one merged qkv matrix in, one output matrix, optional biases and qk-norms.

In: hidden states, rotations, and `attend`, which does the attention itself. Out: hidden states. Knows nothing of
pages, batches, masks or windows: whoever passes `attend` does.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxllm.graph.layers.linear import linear
from jaxllm.graph.layers.norm import rms_norm
from jaxllm.graph.layers.parameter import parameter
from jaxllm.graph.layers.rope import rotate
from jaxllm.graph.models.config import ModelConfig

# attend(layer, q[..., N, H], k[..., K, H], v[..., K, H]) -> [..., N, H]
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
Rotations = tuple[jax.Array, jax.Array]


class Attention(nnx.Module):
    """Leaves: qkv [(N+2K)H, D] (rows: q, then k, then v), o [D, NH], and by config qkv_bias, o_bias, qk_norms."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs | None) -> None:
        self.config = config
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        rows, d_model = q_rows + 2 * kv_rows, config.d_model
        self.qkv = parameter((rows, d_model), ("qkv", "embed"), dtype, rngs)
        self.o = parameter((d_model, q_rows), ("embed", "heads"), dtype, rngs)
        self.qkv_bias = parameter((rows,), ("qkv",), dtype, rngs, "zeros") if config.qkv_bias else None
        self.o_bias = parameter((d_model,), ("once",), dtype, rngs, "zeros") if config.o_bias else None
        self.qk_norms = (
            parameter((2, config.head_dim), (None, "head_dim"), dtype, rngs, "ones") if config.qk_norm else None
        )

    @jax.named_scope("attention")
    def project(self, x: Float[Array, "... D"]) -> Float[Array, "... R"]:
        """Queries, keys and values of normed hidden states, merged, before norms and rotation."""
        return linear(x, self.qkv[...], None if self.qkv_bias is None else self.qkv_bias[...])

    @jax.named_scope("attention")
    def mix(
        self, qkv: Float[Array, "... R"], layer: int, rotations: Rotations, attend: Attend
    ) -> Float[Array, "... NH"]:
        """Attention between tokens, its heads side by side."""
        config = self.config
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        lead = qkv.shape[:-1]
        q = qkv[..., :q_rows].reshape(*lead, config.num_heads, config.head_dim)
        k = qkv[..., q_rows : q_rows + kv_rows].reshape(*lead, config.num_kv_heads, config.head_dim)
        v = qkv[..., q_rows + kv_rows :].reshape(*lead, config.num_kv_heads, config.head_dim)
        if self.qk_norms is not None:
            norms = self.qk_norms[...]
            q, k = rms_norm(q, norms[0], config.norm_eps), rms_norm(k, norms[1], config.norm_eps)
        return attend(layer, rotate(q, *rotations), rotate(k, *rotations), v).reshape(*lead, q_rows)

    @jax.named_scope("attention")
    def output(self, mixed: Float[Array, "... NH"]) -> Float[Array, "... D"]:
        return linear(mixed, self.o[...], None if self.o_bias is None else self.o_bias[...])
