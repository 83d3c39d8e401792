"""The jit boundary: every function the request path runs on the device, pure over plain pytrees.

In: parameters, KV pages, per-row sampling state and packed inputs. Out: hidden states, tokens, log-probabilities
and the same state, updated in place by donation. Knows nothing of sequences or policies; what a request can change is
an array argument here, so nothing a client sends may cause a compile.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxllm.core import MAX_LOGPROBS
from jaxllm.graph import sampling
from jaxllm.graph.inputs import StepInputs, StepShape, unpack, unpack_samples
from jaxllm.graph.kv_cache import KVCache, scales_of
from jaxllm.graph.layers.attention import Attend
from jaxllm.graph.layers.chain import chained
from jaxllm.graph.layers.joined import joined
from jaxllm.graph.layers.whole import Through, sharing, through_all
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import Decoder, Onward, Params, merge, plainly
from jaxllm.graph.weights import packed as twins
from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.decode_chain.api import decode_chain
from pallas_kernels.norm.api import add_norm
from pallas_kernels.page_write.api import page_write
from pallas_kernels.paged_attention.api import paged_attention, paged_attention_decode
from pallas_kernels.partial_attention.api import partial_attention
from pallas_kernels.rope_page_write.api import rope_page_write
from pallas_kernels.rope_page_write.heads import Heads
from pallas_kernels.rope_page_write.reference import separated
from sharding.collectives import ALONE, Exchange
from sharding.context import Context
from sharding.placement import Placement

# Layers of one shape share one trace of these: an unrolled model is traced once a layer kind, not once a layer.
_decode = jax.jit(decode_attention, static_argnames=("scale", "window", "implementation"))
_narrow_decode = jax.jit(paged_attention_decode, static_argnames=("scale", "window", "implementation"))
_ragged = jax.jit(paged_attention, static_argnames=("scale", "window", "uniform", "implementation"))
_turn_and_write = jax.jit(rope_page_write, static_argnames="implementation")
_write = jax.jit(page_write)
_separated = jax.jit(separated)
_partial = jax.jit(partial_attention, static_argnames=("scale", "implementation"))
_chain = jax.jit(decode_chain, static_argnames=("eps",))
_add_norm = jax.jit(add_norm, static_argnames=("which", "eps", "implementation"))
LOGPROB_BLOCK = 128  # prompt positions whose logits exist at one time


class SampleMode(enum.StrEnum):
    """What the batch's most demanding row asks of the sampler. GREEDY is part of every step."""

    GREEDY = "greedy"
    RANDOM = "random"  # temperature, masks, biases and penalties
    SAMPLE = "sample"  # and top_k, top_p, min_p
    LOGPROBS = "logprobs"


SAMPLER_MODES = tuple(mode for mode in SampleMode if mode is not SampleMode.GREEDY)  # an executable of its own each


class Sampled(NamedTuple):
    """One entry a row. Token -1: the row's logits held NaN or infinity."""

    token_ids: Int[Array, " B"]
    logprobs: Float[Array, " B"] | None = None
    ranks: Int[Array, " B"] | None = None
    top_ids: Int[Array, "B n"] | None = None
    top_logprobs: Float[Array, "B n"] | None = None


def _among(rows: tuple[int, int] | None, shape: StepShape) -> bool:
    """Decode steps of so many rows, ends included."""
    return rows is not None and shape.decode and rows[0] <= shape.rows <= rows[1]


@dataclass(frozen=True)
class Graph:
    """A model as static structure plus the cache geometry its steps are traced for."""

    graphdef: Any
    config: ModelConfig
    page_size: int
    num_pages: int
    # Pin jnp attention and single products: to tell a kernel's fault from the model's.
    reference_attention: bool = False
    chained: tuple[int, int] | None = None  # decode steps of so many rows, ends included: one op between attentions
    whole: tuple[int, int] | None = None  # of so many: one op for all layers, if it takes the model
    whole_by: str | None = None  # that op's implementation, if not the first that accepts
    uniform: bool = False  # bits of a token in a step with prompts do not depend on how many of its row come along
    parts: bool = False  # products of a few rows stay partial sums until a kernel adds them up: not yet measured
    # Where the model is spread; `graphdef` is then one shard's, `config` the whole's.
    placement: Placement | None = None

    def model(self, params: Params) -> Decoder:
        """The module around these arrays; merging costs trace time only."""
        return merge(self.graphdef, twins.without_twins(params))

    def exchange(self, shape: StepShape | None = None) -> Exchange:
        """How the shards meet: in a step of this shape, or at the head."""
        if self.placement is None:
            return ALONE
        if shape is None or shape.decode:
            return self.placement.exchange(None if shape is None else shape.rows, decode=True)
        share = self.context is not None and self.context.shares(shape.tokens)
        return self.placement.exchange(shape.tokens // self.placement.config.seq if share else shape.tokens)

    def onward(self, exchange: Exchange, shape: StepShape) -> Onward:
        """What is done between two attentions: shards of a layer must meet on the way."""
        if exchange is not ALONE:
            return functools.partial(plainly, exchange=exchange)
        pinned = {"implementation": "reference"} if self.reference_attention else {}
        onward = functools.partial(joined, functools.partial(_add_norm, **pinned), self.parts)
        if not _among(self.chained, shape):
            return onward
        return functools.partial(chained, _chain, onward)

    @property
    def shards(self) -> int:
        """How many parts have rows and pages of their own; what there is of each row lies one after another's."""
        return 1 if self.placement is None else self.placement.config.attention_shards

    @property
    def context(self) -> Context | None:
        """Set where the keys of a sequence are spread over devices."""
        return None if self.placement is None else self.placement.context

    def dealt(self, shape: StepShape) -> tuple[Callable[[Array], Array], Callable[[Array], Array], bool]:
        """How this step's tokens are dealt out for the products, and brought together again; and whether they are."""
        context = self.context
        if context is None or shape.decode or not context.shares(shape.tokens):
            return (lambda x: x), (lambda x: x), False
        return context.own, context.all, True

    def logits_sharding(self, alone: jax.sharding.Sharding) -> jax.sharding.Sharding:
        """Of [R, V] logits, given that of everything on one device."""
        return alone if self.placement is None else self.placement.sharding("logits")


def paged_attend(graph: Graph, inputs: StepInputs, kv: KVCache, share: bool = False) -> Attend:
    """The attention callback of serving: write this step's keys and values to their pages, then read the pages.

    `kv` is updated in place as the layers go by, so after the model call it holds the new pages. With `share`, each
    device along the context's axis comes with its share of the tokens.
    """
    if graph.context is not None:
        return context_attend(graph, graph.context, inputs, kv, share)
    scale = graph.config.attention_scale
    pinned = ("reference", "reference", "reference_wide") if graph.reference_attention else (None, None, None)
    decode, turn, ragged = pinned

    def attend(layer: int, heads: Heads) -> Array:
        window, scales = graph.config.windows[layer], scales_of(kv[layer][0], graph.config.kv_scales_of(layer))
        how = {"scale": scale, "window": window}
        one = inputs.query_starts is None
        if one and not scales:
            rows = inputs.page_table, inputs.kv_lens
            out, *pages = _decode(heads, *kv[layer], *rows, **how, implementation=decode)
            kv[layer] = pages[0], pages[1]
            return out
        if scales:  # narrow pages: rotation and their own write, each by itself
            q, k, v = _separated(heads)
            kv[layer] = _write(*kv[layer], k, v, inputs.slots, **scales)
        else:
            q, *pages = _turn_and_write(heads, *kv[layer], inputs.slots, implementation=turn)
            kv[layer] = pages[0], pages[1]
        if one:
            rows = inputs.page_table, inputs.kv_lens
            return _narrow_decode(q, *kv[layer], *rows, **how, implementation=decode, **scales)
        args = inputs.page_table, inputs.kv_lens, inputs.query_starts
        return _ragged(q, *kv[layer], *args, **how, uniform=graph.uniform, implementation=ragged, **scales)

    return attend


def context_attend(graph: Graph, context: Context, inputs: StepInputs, kv: KVCache, share: bool) -> Attend:
    """The same where every device holds some of each row's keys."""
    own_pages, page_size = kv[0][0].shape[0], graph.page_size
    slots = context.slots(inputs.slots, page_size, own_pages)
    live = inputs.slots < graph.num_pages * page_size
    positions = jnp.where(live, inputs.positions, -1)
    keys = context.keys(inputs.page_table, inputs.kv_lens, inputs.rows, positions, page_size)
    scale, pinned = graph.config.attention_scale, "reference" if graph.reference_attention else None

    def attend(layer: int, heads: Heads) -> Array:
        q, k, v = _separated(heads)
        if share:
            q, k, v = context.all(q), context.all(k), context.all(v)
        scales = scales_of(kv[layer][0], graph.config.kv_scales_of(layer))
        kv[layer] = _write(*kv[layer], k, v, slots, **scales)
        seen = keys.table, inputs.rows, keys.visible
        how = {"scale": scale, "query_starts": inputs.query_starts, "implementation": pinned}
        out, lse = _partial(q, *kv[layer], *seen, **how, **scales)
        return context.merge(out, lse, share).astype(q.dtype)

    return attend


class Stepped(NamedTuple):
    """What a step gives, and the state it was given, updated in place."""

    token_ids: Int[Array, " R"]  # greedy; -1: the row's logits held NaN or infinity
    kv: KVCache
    page_table: Int[Array, "S1 W"]
    last_tokens: Int[Array, " S1"]
    logits: Float[Array, "R V"]  # of each row's last token
    hidden: Float[Array, "T D"] | None  # of every token; None after a decode step
    load: Int[Array, "Lx E"] | None = None  # tokens each expert got, by sparse layer; None where it is not measured


def step(
    graph: Graph,
    shape: StepShape,
    params: Params,
    kv: KVCache,
    page_table: Int[Array, "S1 W"],
    last_tokens: Int[Array, " S1"],
    logits: Float[Array, "R V"],
    packed: Int[Array, " n"],
    x: Float[Array, "T D"] | None = None,
) -> Stepped:
    """One pass over the step's tokens, and each row's most likely next token, which the next step may read.

    `logits` is the memory of an earlier step's: donated, so that the new ones come to the same address. `x` is what the
    pipeline stage before passed on; without it this is the whole model.
    """
    del logits
    size = {"page_size": graph.page_size, "num_pages": graph.num_pages}
    inputs, table = unpack(shape, packed, last_tokens, page_table, **size)
    logits, kv, hidden, chosen = forward(graph, shape, params, kv, inputs, x)
    tokens, bad = graph.exchange().greedy(logits)
    last_tokens = last_tokens.at[inputs.state_rows].set(tokens)
    load = expert_load(graph, shape, inputs, chosen)
    hidden = None if shape.decode else hidden
    return Stepped(jnp.where(bad, -1, tokens), kv, table, last_tokens, logits, hidden, load)


def forward(
    graph: Graph,
    shape: StepShape,
    params: Params,
    kv: KVCache,
    inputs: StepInputs,
    x: Float[Array, "T D"] | None = None,
) -> tuple[Float[Array, "R V"], KVCache, Float[Array, "T D"] | None, list[Int[Array, "t k"]]]:
    """The logits of each row's last token, the pages, every token's hidden state, and the experts that tokens chose.

    Hidden states are None where the head is in one kernel with the layers: in decode.
    """
    kv = list(kv)
    model = graph.model(params)
    own, together, share = graph.dealt(shape)
    exchange = graph.exchange(shape)
    x = model.begin(own(inputs.token_ids), exchange) if x is None else x
    groups = sharing(exchange) if graph.context is None and _among(graph.whole, shape) else None
    packed = params.get(twins.KEY)
    done = None if groups is None else through_all(model, x, inputs, kv, groups, graph.whole_by, packed)
    if done is None:
        attend, onward = paged_attend(graph, inputs, kv, share), graph.onward(exchange, shape)
        done = Through(model.through(x, own(inputs.positions), attend, onward, exchange), False, kv)
    logits, kv, hidden = done.out, done.kv, None
    if not done.headed:
        hidden, last = together(model.end(done.out, exchange)), inputs.last_token
        logits = model.logits(hidden if last is None else hidden[last])
    return logits, kv, hidden, model.chosen()


def expert_load(
    graph: Graph, shape: StepShape, inputs: StepInputs, chosen: list[Int[Array, "t k"]]
) -> Int[Array, "Lx E"] | None:
    """How many tokens chose each expert, padding left out: one small sum for all layers."""
    if not chosen or graph.config.experts is None:
        return None
    own, _, share = graph.dealt(shape)
    exchange = graph.exchange(shape)
    ids, live = exchange.measured(jnp.stack(chosen), own(inputs.slots < graph.num_pages * graph.page_size))
    every = jnp.arange(graph.config.experts.count, dtype=jnp.int32)
    counts = exchange.total(((ids[..., None] == every) & live[:, None, None]).sum(axis=(1, 2), dtype=jnp.int32))
    return jax.lax.psum(counts, graph.context.axis) if share and graph.context is not None else counts


def pass_on(
    graph: Graph,
    shape: StepShape,
    params: Params,
    kv: KVCache,
    page_table: Int[Array, "S1 W"],
    carry: Int[Array, " S1"] | Float[Array, "T D"],
    packed: Int[Array, " n"],
) -> tuple[Float[Array, "T D"], KVCache, Int[Array, "S1 W"]]:
    """A pipeline stage before the last: from the rows' last tokens, or the stage before, to the stage behind."""
    starts = jnp.issubdtype(carry.dtype, jnp.integer)
    last_tokens = carry if starts else jnp.zeros(1, jnp.int32)
    size = {"page_size": graph.page_size, "num_pages": graph.num_pages}
    inputs, table = unpack(shape, packed, last_tokens, page_table, **size)
    kv, model, exchange = list(kv), graph.model(params), graph.exchange(shape)
    own, _, share = graph.dealt(shape)
    x = model.begin(own(inputs.token_ids), exchange) if starts else carry
    attend, onward = paged_attend(graph, inputs, kv, share), graph.onward(exchange, shape)
    return model.through(x, own(inputs.positions), attend, onward, exchange), kv, table


def sample(
    exchange: Exchange,
    mode: SampleMode,
    counts: UInt[Array, "S1 V"],
    last_tokens: Int[Array, " S1"],
    logits: Float[Array, "B V"],
    packed: Int[Array, "B columns"],
    bias_ids: Int[Array, "B Nb"],
    bias: Float[Array, "B Nb"],
    mask: UInt[Array, "B Vw"],
) -> tuple[Sampled, UInt[Array, "S1 V"], Int[Array, " S1"]]:
    """Each row's next token as its request asks for it, in place of the step's greedy one."""
    sampled, tokens, counts = draw(exchange, mode, counts, logits, packed, bias_ids, bias, mask)
    return sampled, counts, last_tokens.at[unpack_samples(packed)["row"]].set(tokens)


def draw(
    exchange: Exchange,
    mode: SampleMode,
    counts: UInt[Array, "S1 V"],
    logits: Float[Array, "B V"],
    packed: Int[Array, "B columns"],
    bias_ids: Int[Array, "B Nb"],
    bias: Float[Array, "B Nb"],
    mask: UInt[Array, "B Vw"],
    position: Int[Array, " B"] | None = None,
) -> tuple[Sampled, Int[Array, " B"], UInt[Array, "S1 V"]]:
    """What rows sampled, and the tokens that go on, those of bad rows too. `position`: other ones than were packed."""
    columns = unpack_samples(packed)
    if position is not None:
        columns["position"] = position
    as_key = jnp.stack([columns.pop("key0"), columns.pop("key1")], axis=1)
    keys = jax.lax.bitcast_convert_type(as_key, jnp.uint32)
    inputs = sampling.SampleInputs(keys=keys, bias_ids=bias_ids, bias=bias, mask=mask, **columns)
    top = MAX_LOGPROBS if mode is SampleMode.LOGPROBS else 0
    tokens, logprob, rank, top_ids, top_logprobs, counts, bad = sampling.sample(
        exchange.vocabulary(logits), inputs, counts, num_logprobs=top, truncates=mode is not SampleMode.RANDOM
    )
    told = jnp.where(bad, -1, tokens)
    if mode is not SampleMode.LOGPROBS:
        return Sampled(told), tokens, counts
    return Sampled(told, logprob, rank, top_ids, top_logprobs), tokens, counts


def set_counts(
    counts: UInt[Array, "S1 V"],
    row: Int[Array, " one"],
    token_ids: Int[Array, " C"],
    n: Int[Array, " one"],
    in_prompt: Bool[Array, " one"],
    fresh: Bool[Array, " one"],
) -> UInt[Array, "S1 V"]:
    """Each shard's own row: see sampling.set_counts."""
    return sampling.set_counts(counts, row[0], token_ids, n[0], in_prompt[0], fresh[0])


def prompt_logprobs(
    graph: Graph, params: Params, hidden: Float[Array, "T D"], targets: Int[Array, " T"]
) -> tuple[Float[Array, " T"], Int[Array, " T"], Int[Array, "T n"], Float[Array, "T n"]]:
    """Log-probability and rank of targets[t] given the tokens up to t, and the most likely tokens there.

    Blocks of positions take turns, so that the [T, V] logits never exist at one time.
    """
    model, exchange, total = graph.model(params), graph.exchange(), hidden.shape[0]
    block = min(LOGPROB_BLOCK, total)

    def one_block(args: tuple[Array, Array]) -> tuple[Array, Array, Array, Array]:
        return sampling.token_logprobs(exchange.vocabulary(model.logits(args[0])), args[1], MAX_LOGPROBS)

    pad = -total % block
    rows = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, block, hidden.shape[1])
    wanted = jnp.pad(targets, (0, pad)).reshape(-1, block)
    outputs = jax.lax.map(one_block, (rows, wanted))
    logprob, rank, ids, top = (x.reshape(-1, *x.shape[2:])[:total] for x in outputs)
    return logprob, rank, ids, top
