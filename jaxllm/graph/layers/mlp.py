"""The gated feed-forward block: down(silu(gate x) * up x), gate and up merged in one matrix.

In and out: hidden states [..., D]. silu and the product are formed in f32 and cast once.
"""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxllm.graph.layers.linear import gated, linear
from jaxllm.graph.layers.parameter import parameter
from jaxllm.graph.models.config import ModelConfig


class MLP(nnx.Module):
    """Leaves: gate_up [2F, D] (rows: all of gate, then up), down [D, F], and by config gate_up_bias, down_bias."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs | None) -> None:
        d_model, d_ff = config.d_model, config.d_ff
        self.gate_up = parameter((2 * d_ff, d_model), ("gate_up", "embed"), dtype, rngs)
        self.down = parameter((d_model, d_ff), ("embed", "ffn"), dtype, rngs)
        self.gate_up_bias = parameter((2 * d_ff,), ("gate_up",), dtype, rngs, "zeros") if config.mlp_bias else None
        self.down_bias = parameter((d_model,), ("once",), dtype, rngs, "zeros") if config.mlp_bias else None

    @jax.named_scope("mlp")
    def hidden(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """What `down` takes."""
        return gated(x, self.gate_up[...], None if self.gate_up_bias is None else self.gate_up_bias[...])

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return linear(self.hidden(x), self.down[...], None if self.down_bias is None else self.down_bias[...])
