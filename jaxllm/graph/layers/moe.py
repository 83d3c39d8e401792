"""The routed feed-forward block: a router picks each token's experts; a shared expert may serve all tokens.

In and out: hidden states [..., D]. Router logits, probabilities and the weighted sum are f32. How tokens are brought
together by expert is not known here (`pallas_kernels.grouped_matmul` does that), nor how they get to the device that
holds an expert (`sharding.dispatch`, or a sum that all take part in); a table says in which slots an expert lies.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxllm.graph.layers.linear import project
from jaxllm.graph.layers.mlp import MLP
from jaxllm.graph.layers.parameter import parameter
from jaxllm.graph.models.config import ExpertsConfig, ModelConfig
from pallas_kernels.grouped_matmul.api import route, routed_mlp
from sharding.collectives import ALONE, Exchange
from sharding.dispatch import Dispatch, copies_of

# Layers of one shape share one trace.
_route = jax.jit(route, static_argnames=("k", "norm_topk"))
_routed_mlp = jax.jit(routed_mlp, static_argnames="elsewhere")


class MoE(nnx.Module):
    """Leaves: router [E, D], experts_gate_up [E, 2F, D], experts_down [E, D, F]; by config shared (an MLP) and its
    gate, shared_gate [1, D], and copies [E, 1 + c], a table."""

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
        # Where each expert's weights lie, if they can be moved: how many copies, then their slots.
        table = E, 1 + experts.copies
        self.copies = parameter(table, (None, None), jnp.int32, rngs, "zeros") if experts.copies else None

    def __call__(self, x: Float[Array, "... D"], exchange: Exchange = ALONE) -> Float[Array, "... D"]:
        """From the normed residual stream to what is added to it."""
        if not exchange.apart:
            read = exchange.enter(x)
            return exchange.leave(self._with_shared(read, self._routed(read, exchange)))
        near = exchange.near(x)
        dispatch = exchange.dispatch
        out = exchange.far(self._routed(near, exchange) if dispatch is None else self._sent(near, dispatch))
        if self.shared is None:
            return out
        read = exchange.enter(x)
        return out + exchange.leave(self._with_shared(read, jnp.zeros_like(read)))

    def _choose(self, tokens: Float[Array, "T D"]) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
        """Each token's experts, as the slots of their weights, and its weights for them."""
        logits = project(tokens, self.router[...])
        ids, weights = _route(logits, k=self.experts.per_token, norm_topk=self.experts.norm_topk)
        if self.copies is None:
            return ids, weights
        self.chosen = nnx.Intermediate(ids)  # read by the step, which measures the load
        return copies_of(ids, self.copies[...]), weights

    def _routed(self, x: Float[Array, "... D"], exchange: Exchange) -> Float[Array, "... D"]:
        """This device's part of the sum over each token's experts."""
        tokens = x.reshape(-1, x.shape[-1])
        slots, weights = self._choose(tokens)
        gate_up, down = self.experts_gate_up[...], self.experts_down[...]
        elsewhere = self.copies is not None or gate_up.shape[0] < self.experts.count  # other devices hold experts too
        ids = exchange.own_experts(slots, gate_up.shape[0])
        return _routed_mlp(tokens, gate_up, down, ids, weights, elsewhere=elsewhere).reshape(x.shape)

    def _sent(self, x: Float[Array, "t D"], dispatch: Dispatch) -> Float[Array, "t D"]:
        """The same sums of this device's tokens, by the devices of their experts."""
        slots, weights = self._choose(x)
        gate_up, down = self.experts_gate_up[...], self.experts_down[...]
        parcel, sent = dispatch.send(x, slots, weights, gate_up.shape[0])
        return dispatch.back(_routed_mlp(parcel.tokens, gate_up, down, *parcel[1:], elsewhere=True), sent)

    def _with_shared(self, x: Float[Array, "... D"], out: Float[Array, "... D"]) -> Float[Array, "... D"]:
        if self.shared is None or self.shared_gate is None:
            return out
        share = jax.nn.sigmoid(project(x, self.shared_gate[...]))
        return (out.astype(jnp.float32) + share * self.shared(x).astype(jnp.float32)).astype(x.dtype)
