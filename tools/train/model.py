"""The two bundled models' shapes, and the decoder's forward pass and loss as training wants them.

In: bf16 parameters and rows of token ids. Out: a weighted mean loss. Knows nothing of data, optimizers or files.
The layers are the serving decoder's own; only the embedding's gradient and what is kept for the backward pass
are training's.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.graph.layers.rope import rotations
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import Decoder, Params, merge, split
from pallas_kernels.norm.reference import rms_norm
from pallas_kernels.rope_page_write.heads import Heads
from pallas_kernels.rope_page_write.reference import separated

type Remat = Literal["none", "layer"]

MAIN = ModelConfig(
    family="qwen3", vocab_size=8192, num_layers=12, d_model=384, num_heads=6, num_kv_heads=2, head_dim=64, d_ff=1024,
    tie_embeddings=True, qk_norm=True, context_length=2048, eos_token_ids=(8178, 8176),
)  # fmt: skip
DRAFT = ModelConfig(
    family="qwen3", vocab_size=8192, num_layers=4, d_model=192, num_heads=3, num_kv_heads=1, head_dim=64, d_ff=576,
    tie_embeddings=True, qk_norm=True, context_length=2048, eos_token_ids=(8178, 8176),
)  # fmt: skip
TINY = ModelConfig(
    family="qwen3", vocab_size=8192, num_layers=2, d_model=64, num_heads=2, num_kv_heads=1, head_dim=32, d_ff=128,
    tie_embeddings=True, qk_norm=True, context_length=2048, eos_token_ids=(8178, 8176),
)  # fmt: skip
CONFIGS = {"first-light": MAIN, "first-light-draft": DRAFT, "tiny": TINY}


def initial(config: ModelConfig, seed: int) -> tuple[nnx.GraphDef[Decoder], Params]:
    """f32 parameters to start from; what a layer adds to the residual starts smaller the deeper the model is."""
    graphdef, params = split(Decoder(config, rngs=nnx.Rngs(seed), dtype=jnp.float32))
    scale = 1 / math.sqrt(2 * config.num_layers)
    for layer in params["layers"].values():
        layer["attention"]["o"] = layer["attention"]["o"] * scale
        layer["mlp"]["down"] = layer["mlp"]["down"] * scale
    return graphdef, params


def parameter_count(params: Params) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


@jax.custom_vjp
def look_up(table: Float[Array, "V D"], token_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    return table.at[token_ids].get(mode="clip")


def _look_up_forward(table: jax.Array, token_ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return look_up(table, token_ids), (table, token_ids)


def _look_up_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
    # A scatter-add would round after every one of thousands of additions to a common token's row.
    table, token_ids = saved
    hot = jax.nn.one_hot(token_ids.reshape(-1), table.shape[0], dtype=gradient.dtype)
    flat = gradient.reshape(-1, gradient.shape[-1])
    summed = jax.lax.dot_general(hot, flat, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return summed.astype(table.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def causal_attention(config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Dense causal attention over whole rows [B, T, heads, H]; the flash kernel of cuDNN on a GPU."""
    if jax.default_backend() == "gpu":
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, scale=config.attention_scale, implementation="cudnn"
        )
    length = q.shape[1]
    return masked_attention(config, q, k, v, jnp.tri(length, dtype=jnp.bool_)[None])


def masked_attention(config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """Attention of q [B, T, N, H] over k, v [B, S, K, H] where `visible` [B or 1, T, S]; softmax in f32."""
    grouped = q.reshape(*q.shape[:2], config.num_kv_heads, -1, config.head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * config.attention_scale
    scores = jnp.where(visible[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


def hidden_states(model: Decoder, token_ids: Int[Array, "B T"], remat: Remat = "none") -> Float[Array, "B T D"]:
    config = model.config
    positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1], dtype=jnp.int32), token_ids.shape)
    turned = rotations(positions, config.rope, config.head_dim)
    assert model.embed is not None, "training takes whole models"
    assert model.final_norm is not None, "training takes whole models"
    x = look_up(model.embed[...], token_ids)

    def attend(layer: int, heads: Heads) -> jax.Array:
        return causal_attention(config, *separated(heads))

    for number, layer in enumerate(model.layers):
        graphdef, state = nnx.split(layer)

        def run(state: Any, x: jax.Array, graphdef: Any = graphdef, number: int = number) -> jax.Array:
            layer = nnx.merge(graphdef, state)
            return layer.leave(x, layer.attention.mix(layer.enter(x), number, turned, attend, x.dtype))

        x = (jax.checkpoint(run) if remat == "layer" else run)(state, x)
    return rms_norm(x, model.final_norm[...], config.norm_eps)


def token_losses(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], z_loss: float = 0.0
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Cross-entropy per token, and the same plus `z_loss` times the squared log-partition."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - chosen
    return loss, loss + z_loss * jnp.square(log_z)


def forward(
    graphdef: nnx.GraphDef[Decoder], params: Params, token_ids: Int[Array, "B T"], remat: Remat = "none"
) -> Float[Array, "B T V"]:
    model = merge(graphdef, params)
    return model.logits(hidden_states(model, token_ids, remat))


def narrow(params: Params) -> Params:
    """The bf16 copy that the forward pass computes with."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
