"""The routed feed-forward block: a router picks each token's experts; a shared expert may serve all tokens.

In and out: hidden states [..., D]. Router logits, probabilities and the weighted sum are f32. Which device holds which
expert, and how tokens are brought together by expert, is not known here: `pallas_kernels.grouped_matmul` does that.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxllm.graph.layers.linear import project
from jaxllm.graph.layers.mlp import MLP
from jaxllm.graph.layers.parameter import parameter
from jaxllm.graph.models.config import ExpertsConfig, ModelConfig
from pallas_kernels.grouped_matmul.api import route, routed_mlp
from sharding.collectives import ALONE, Exchange

# Layers of one shape share one trace.
_route = jax.jit(route, static_argnames=("k", "norm_topk"))
_routed_mlp = jax.jit(routed_mlp, static_argnames="elsewhere")


class MoE(nnx.Module):
    """Leaves: router [E, D], experts_gate_up [E, 2F, D], experts_down [E, D, F]; by config shared (an MLP) and its
    gate, shared_gate [1, D]."""

    def __init__(self, config: ModelConfig, experts: ExpertsConfig, dtype: DTypeLike, rngs: nnx.Rngs | None) -> None:
        self.experts = experts
        E, D, F = experts.count, config.d_model, experts.d_ff
        self.router = parameter((E, D), (None, "embed"), dtype, rngs)
        self.experts_gate_up = parameter((E, 2 * F, D), ("expert", "gate_up", "embed"), dtype, rngs)
        self.experts_down = parameter((E, D, F), ("expert", "embed", "ffn"), dtype, rngs)
        shared = bool(experts.shared_d_ff)
        dense = dataclasses.replace(config, d_ff=experts.shared_d_ff or config.d_ff, mlp_bias=False)
        self.shared = MLP(dense, dtype, rngs) if shared else None
        self.shared_gate = parameter((1, D), (None, "embed"), dtype, rngs) if shared else None

    def __call__(self, x: Float[Array, "... D"], exchange: Exchange = ALONE) -> Float[Array, "... D"]:
        tokens = x.reshape(-1, x.shape[-1])
        logits = project(tokens, self.router[...])
        ids, weights = _route(logits, k=self.experts.per_token, norm_topk=self.experts.norm_topk)
        gate_up, down = self.experts_gate_up[...], self.experts_down[...]
        elsewhere = gate_up.shape[0] < self.experts.count  # other devices hold experts too
        ids = exchange.own_experts(ids, gate_up.shape[0])
        out = _routed_mlp(tokens, gate_up, down, ids, weights, elsewhere=elsewhere).reshape(x.shape)
        if self.shared is None or self.shared_gate is None:
            return out
        share = jax.nn.sigmoid(project(x, self.shared_gate[...]))
        return (out.astype(jnp.float32) + share * self.shared(x).astype(jnp.float32)).astype(x.dtype)
