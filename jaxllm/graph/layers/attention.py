"""The projections around attention: one merged qkv matrix in, one output matrix, optional biases and qk-norms.

In: hidden states, rotations, and `attend`, which does the attention itself, norms and rotation of its heads included,
so that kernels may do them on the way. Out: hidden states. Knows nothing of pages, batches, masks or windows: whoever
passes `attend` does.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxllm.graph.layers.linear import linear
from jaxllm.graph.layers.parameter import parameter
from jaxllm.graph.models.config import ModelConfig
from pallas_kernels.rope_page_write.heads import Heads

# attend(layer, heads of [...] tokens) -> [..., N, H]; `separated(heads)` gives q, k and v ready to attend
Attend = Callable[[int, Heads], jax.Array]
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
        self, qkv: Float[Array, "... R"], layer: int, rotations: Rotations, attend: Attend, dtype: DTypeLike
    ) -> Float[Array, "... NH"]:
        """Attention between tokens, its heads side by side. `qkv` is what `project` gives, or f32 parts of it."""
        config, (cos, sin) = self.config, rotations
        norms = None if self.qk_norms is None else self.qk_norms[...]
        bias = None if self.qkv_bias is None or qkv.ndim == cos.ndim else self.qkv_bias[...]
        heads = Heads(qkv, cos, sin, norms, bias, K=config.num_kv_heads, eps=config.norm_eps, dtype=jnp.dtype(dtype))
        return attend(layer, heads).reshape(*cos.shape[:-1], config.num_heads * config.head_dim)

    @jax.named_scope("attention")
    def output(self, mixed: Float[Array, "... NH"]) -> Float[Array, "... D"]:
        return linear(mixed, self.o[...], None if self.o_bias is None else self.o_bias[...])
