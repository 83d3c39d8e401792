"""The decoder-only transformer all families share, as a Flax description and as pure functions of a pytree.

In: token ids, positions, `attend`, a callback that does the attention of one layer, `onward`, one that does all that
lies between two attentions, and `exchange`, through which the shards of a spread model meet. Out: final hidden states,
and f32 logits for the ones asked for. Knows nothing of pages, batches, ranks or sampling, nor where weights come from:
`abstract(config)` gives their shapes, `axes(config)` their logical axes, and a step merges a plain pytree of arrays
into `graphdef` inside its trace.

    graphdef, shapes = abstract(config, dtype)
    model = merge(graphdef, params)                  # in the trace
    hidden = model(token_ids, positions, attend)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxllm.graph.layers.attention import Attend, Attention
from jaxllm.graph.layers.linear import project
from jaxllm.graph.layers.mlp import MLP
from jaxllm.graph.layers.moe import MoE
from jaxllm.graph.layers.parameter import parameter
from jaxllm.graph.layers.rope import rotations
from jaxllm.graph.models.config import ModelConfig
from pallas_kernels.norm.reference import rms_norm
from sharding.collectives import ALONE, Exchange

Params = dict[Any, Any]  # nested plain dict; keys are attribute names and layer numbers, leaves are arrays


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual. Leaves: norms [2, D], attention, mlp."""

    def __init__(self, config: ModelConfig, layer: int, dtype: DTypeLike, rngs: nnx.Rngs | None) -> None:
        self.norm_eps = config.norm_eps
        self.norms = parameter((2, config.d_model), (None, "embed"), dtype, rngs, "ones")
        self.attention = Attention(config, dtype, rngs)
        experts = config.experts if config.sparse_layers[layer] else None
        self.mlp = MLP(config, dtype, rngs) if experts is None else MoE(config, experts, dtype, rngs)

    def enter(self, x: Float[Array, "... D"], exchange: Exchange = ALONE) -> Float[Array, "... R"]:
        """Everything before attention: queries, keys and values."""
        return self.attention.project(exchange.enter(rms_norm(x, self.norms[...][0], self.norm_eps)))

    def leave(
        self, x: Float[Array, "... D"], mixed: Float[Array, "... NH"], exchange: Exchange = ALONE
    ) -> Float[Array, "... D"]:
        """Everything after attention: the hidden states the next layer sees."""
        x = x + exchange.leave(self.attention.output(mixed))
        normed = rms_norm(x, self.norms[...][1], self.norm_eps)
        if isinstance(self.mlp, MoE):
            return x + self.mlp(normed, exchange)
        return x + exchange.leave(self.mlp(exchange.enter(normed)))


# onward(layer, the next layer or None, x[..., D], attention's output[..., NH]) -> the next x, and the next qkv or None
Onward = Callable[[Layer, Layer | None, jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]


def plainly(
    layer: Layer, following: Layer | None, x: jax.Array, mixed: jax.Array, exchange: Exchange = ALONE
) -> tuple[jax.Array, jax.Array | None]:
    """From one attention to the next, a product at a time."""
    x = layer.leave(x, mixed, exchange)
    return x, None if following is None else following.enter(x, exchange)


@dataclass(frozen=True)
class Ends:
    """Which ends of the model a part of its layers brings with it: the embedding, the final norm and head."""

    first: bool = True
    last: bool = True


WHOLE = Ends()


class Decoder(nnx.Module):
    """Leaves: embed [V, D], layers, final_norm [D], and head [V, D] when untied; of a part, only those of its `ends`.

    Without `rngs` the leaves are ShapeDtypeStructs: a description. With them, arrays to start training from.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs | None = None,
        dtype: DTypeLike = jnp.bfloat16,
        ends: Ends = WHOLE,
    ) -> None:
        self.config = config
        table = (config.vocab_size, config.d_model)
        tied = ends.last and config.tie_embeddings
        self.embed = parameter(table, ("vocab", "embed"), dtype, rngs) if ends.first or tied else None
        self.layers = nnx.List([Layer(config, layer, dtype, rngs) for layer in range(config.num_layers)])
        self.final_norm = parameter((config.d_model,), ("embed",), dtype, rngs, "ones") if ends.last else None
        self.head = parameter(table, ("vocab", "embed"), dtype, rngs) if ends.last and not tied else None

    def __call__(
        self,
        token_ids: Int[Array, "*lead"],
        positions: Int[Array, "*lead"],
        attend: Attend,
        onward: Onward = plainly,
    ) -> Float[Array, "... D"]:
        """Hidden states after the final norm. Leading dims are free: [T] when serving, [B, T] when training."""
        return self.end(self.through(self.begin(token_ids), positions, attend, onward))

    def begin(self, token_ids: Int[Array, "*lead"], exchange: Exchange = ALONE) -> Float[Array, "... D"]:
        """The residual stream before the first layer."""
        assert self.embed is not None, "a part without its first end"
        return exchange.leave(exchange.lookup(self.embed[...], token_ids))

    def through(
        self,
        x: Float[Array, "... D"],
        positions: Int[Array, "*lead"],
        attend: Attend,
        onward: Onward = plainly,
        exchange: Exchange = ALONE,
    ) -> Float[Array, "... D"]:
        """The residual stream after this model's layers. An `onward` that is given knows the exchange."""
        turned = rotations(positions, self.config.rope, self.config.head_dim)
        layers = list(self.layers)
        qkv: jax.Array | None = layers[0].enter(x, exchange)
        for number, (layer, following) in enumerate(zip(layers, [*layers[1:], None], strict=True)):
            assert qkv is not None, "only the last layer has no next"
            x, qkv = onward(layer, following, x, layer.attention.mix(qkv, number, turned, attend, x.dtype))
        return x

    def end(self, x: Float[Array, "... D"], exchange: Exchange = ALONE) -> Float[Array, "... D"]:
        """Hidden states from the residual stream after the last layer."""
        assert self.final_norm is not None, "a part without its last end"
        return exchange.enter(rms_norm(x, self.final_norm[...], self.config.norm_eps))

    def chosen(self) -> list[Int[Array, "T k"]]:
        """The experts that each token took in this pass, of every layer that measures them."""
        blocks = [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)]
        return [block.chosen[...] for block in blocks if block.copies is not None]

    @jax.named_scope("logits")
    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Of the vocabulary that this model's head holds."""
        table = self.embed if self.head is None else self.head
        assert table is not None, "a part without its last end"
        return project(hidden, table[...])


def split(model: Decoder) -> tuple[nnx.GraphDef[Decoder], Params]:
    """A model as a static description and a plain pytree of its leaves."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef[Decoder], params: Params) -> Decoder:
    """The model over these leaves. Cheap; meant to be called inside a trace."""
    return nnx.merge(graphdef, params)


def abstract(
    config: ModelConfig, dtype: DTypeLike = jnp.bfloat16, ends: Ends = WHOLE
) -> tuple[nnx.GraphDef[Decoder], Params]:
    """The description and the shapes of every leaf; no array is made."""
    return split(Decoder(config, dtype=dtype, ends=ends))


def _metadata(config: ModelConfig, name: str, ends: Ends = WHOLE) -> Params:
    state = nnx.state(Decoder(config, ends=ends))
    flat = [(path, variable.get_metadata(name)) for path, variable in nnx.to_flat_state(state)]
    tree: Params = {}
    for path, value in flat:
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return tree


def axes(config: ModelConfig, ends: Ends = WHOLE) -> Params:
    """The logical axis names of every leaf, a tuple where `abstract` has a shape."""
    return _metadata(config, "out_sharding", ends)


def fills(config: ModelConfig) -> Params:
    """How every leaf starts in a fresh model: "normal", "ones" or "zeros"."""
    return _metadata(config, "fill")
