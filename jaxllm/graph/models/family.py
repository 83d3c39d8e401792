"""What a family declares, and the reading all families share.

In: the fields of a config.json and a Family's declared differences. Out: a ModelConfig. A family says which of
Hugging Face's optional keys it has and what an absent one means; keys it does not declare are ignored, as
transformers ignores them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from jaxllm.graph.models.config import ExpertsConfig, ModelConfig, RopeConfig, RopeKind
from jaxllm.graph.models.fields import MISSING, Fields, refuse
from jaxllm.graph.models.quantised import read_stored

DTYPES = ("bfloat16", "float16", "float32")
Windows = tuple[int | None, ...]
Experts = tuple[ExpertsConfig | None, tuple[bool, ...]]  # and which layers route to them


def no_windows(fields: Fields, num_layers: int) -> Windows:
    return (None,) * num_layers


def windows_of_upper_layers(fields: Fields, num_layers: int) -> Windows:
    """Qwen's rule: by `layer_types`, else layers from `max_window_layers` up; all under `use_sliding_window`."""
    allowed = ("full_attention", "sliding_attention")
    window = fields.integer("sliding_window", 4096) if fields.boolean("use_sliding_window", False) else None
    first = fields.integer("max_window_layers", 28, low=0)
    kinds = fields.strings("layer_types")
    if kinds is None:
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if len(kinds) != num_layers:
        raise fields.error("layer_types", list(kinds), f"must have num_hidden_layers ({num_layers}) entries")
    for kind in kinds:
        if kind not in allowed:
            raise fields.error("layer_types", kind, f"every entry must be one of {', '.join(allowed)}")
        if kind == "sliding_attention" and window is None:
            raise fields.error("layer_types", kind, "needs use_sliding_window = true and a sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def windows_everywhere(fields: Fields, num_layers: int) -> Windows:
    """Mistral's rule: one `sliding_window` for all layers; null means none, absent means Mistral 7B's 4096."""
    if "sliding_window" in fields.raw and not fields.has("sliding_window"):
        return (None,) * num_layers
    return (fields.integer("sliding_window", 4096),) * num_layers


def windows_of_even_layers(fields: Fields, num_layers: int) -> Windows:
    """Qwen2-MoE's rule: by `layer_types`, else every other layer below `max_window_layers`; all when switched on."""
    if fields.strings("layer_types") is not None:
        return windows_of_upper_layers(fields, num_layers)
    window = fields.integer("sliding_window", 4096) if fields.boolean("use_sliding_window", False) else None
    end = fields.integer("max_window_layers", 28, low=0)
    return tuple(window if layer % 2 == 0 and layer < end else None for layer in range(num_layers))


def one_window(fields: Fields, num_layers: int) -> Windows:
    """Mixtral's rule: one `sliding_window` for all layers, if there is one."""
    return (fields.integer("sliding_window") if fields.has("sliding_window") else None,) * num_layers


def one_window_if_on(fields: Fields, num_layers: int) -> Windows:
    """Qwen3-MoE's rule: one `sliding_window` for all layers under `use_sliding_window`."""
    used = fields.boolean("use_sliding_window", False)
    return (fields.integer("sliding_window", 4096) if used else None,) * num_layers


def no_experts(fields: Fields, num_layers: int) -> Experts:
    return None, (False,) * num_layers


def mixtral_experts(fields: Fields, num_layers: int) -> Experts:
    """Mixtral's keys: every layer routes, chosen probabilities are scaled to sum to 1."""
    experts = ExpertsConfig(
        count=fields.integer("num_local_experts", 8),
        per_token=_per_token(fields, 2, fields.integer("num_local_experts", 8)),
        d_ff=fields.integer("intermediate_size"),
        norm_topk=True,
    )
    return experts, (True,) * num_layers


def qwen2_moe_experts(fields: Fields, num_layers: int) -> Experts:
    return _qwen_experts(fields, num_layers, 60, 4, 1408, fields.integer("shared_expert_intermediate_size", 5632))


def qwen3_moe_experts(fields: Fields, num_layers: int) -> Experts:
    return _qwen_experts(fields, num_layers, 128, 8, 768, 0)


def _qwen_experts(fields: Fields, num_layers: int, count: int, per_token: int, d_ff: int, shared_d_ff: int) -> Experts:
    """Qwen's keys: every `decoder_sparse_step`-th layer routes, but those in `mlp_only_layers`. Numbers: defaults."""
    count = fields.integer("num_experts", fields.integer("num_local_experts", count, low=0), low=0)
    step, dense = fields.integer("decoder_sparse_step", 1), fields.integers("mlp_only_layers")
    sparse = tuple(count > 0 and layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))
    if not any(sparse):
        return None, sparse
    experts = ExpertsConfig(
        count=count,
        per_token=_per_token(fields, per_token, count),
        d_ff=fields.integer("moe_intermediate_size", d_ff),
        norm_topk=fields.boolean("norm_topk_prob", False),
        shared_d_ff=shared_d_ff,
    )
    return experts, sparse


def _per_token(fields: Fields, default: int, count: int) -> int:
    per_token = fields.integer("num_experts_per_tok", default)
    if per_token > count:
        raise fields.error("num_experts_per_tok", per_token, f"must be at most the number of experts ({count})")
    return per_token


@dataclass(frozen=True)
class ExpertTensors:
    """Names below "model.layers.<i>." of a routed layer's tensors; {} stands for the expert's number."""

    router: str = "mlp.gate.weight"
    gate: str = "mlp.experts.{}.gate_proj.weight"
    up: str = "mlp.experts.{}.up_proj.weight"
    down: str = "mlp.experts.{}.down_proj.weight"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Declared differences of one model family."""

    name: str  # Hugging Face's model_type
    architecture: str  # Hugging Face's class name, in config.json's `architectures`
    attention_bias: bool = False  # reads `attention_bias`: one switch for q, k, v and o
    mlp_bias: bool = False  # reads `mlp_bias`
    qkv_bias: bool = False  # q, k and v have one, o never
    reads_qkv_bias: bool = False  # unless `qkv_bias` says no
    qk_norm: bool = False
    head_dim: int | None = None  # when the config names none; None = d_model / num_heads
    windows: Callable[[Fields, int], Windows] = no_windows
    experts: Callable[[Fields, int], Experts] = no_experts
    expert_tensors: ExpertTensors = ExpertTensors()

    def read(self, fields: Fields) -> ModelConfig:
        fields.choice("hidden_act", ("silu",), "silu")
        num_layers = fields.integer("num_hidden_layers")
        d_model, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        num_kv_heads = fields.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            allowed = f"must be a multiple of num_key_value_heads ({num_kv_heads})"
            raise fields.error("num_attention_heads", num_heads, allowed)
        attention_bias = self.attention_bias and fields.boolean("attention_bias", False)
        qkv_bias = self.qkv_bias and not (self.reads_qkv_bias and not fields.boolean("qkv_bias", True))
        experts, sparse_layers = self.experts(fields, num_layers)
        bos = fields.token_ids("bos_token_id")
        context_length = fields.integer("max_position_embeddings")
        return ModelConfig(
            family=self.name,
            vocab_size=fields.integer("vocab_size"),
            num_layers=num_layers,
            d_model=d_model,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=self._head_dim(fields, d_model, num_heads),
            d_ff=fields.integer("intermediate_size"),
            norm_eps=fields.number("rms_norm_eps"),
            rope=read_rope(fields, context_length),
            tie_embeddings=fields.boolean("tie_word_embeddings", False),
            qkv_bias=qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=self.mlp_bias and fields.boolean("mlp_bias", False),
            qk_norm=self.qk_norm,
            windows=self.windows(fields, num_layers),
            experts=experts,
            sparse_layers=sparse_layers,
            context_length=context_length,
            eos_token_ids=fields.token_ids("eos_token_id"),
            bos_token_id=bos[0] if bos else None,
            dtype=read_dtype(fields),
            stored=read_stored(fields),
        )

    def _head_dim(self, fields: Fields, d_model: int, num_heads: int) -> int:
        if not fields.has("head_dim") and self.head_dim is None and d_model % num_heads:
            allowed = f"must be a multiple of num_attention_heads ({num_heads}), or head_dim must be given"
            raise fields.error("hidden_size", d_model, allowed)
        head_dim = fields.integer("head_dim", self.head_dim or d_model // num_heads)
        if head_dim % 2:
            raise fields.error("head_dim", head_dim, "must be even: rope turns pairs")
        return head_dim


def read_dtype(fields: Fields) -> str | None:
    """`dtype` as transformers 5 writes it, or `torch_dtype` as transformers 4 did."""
    both = [key for key in ("dtype", "torch_dtype") if fields.has(key)]
    return fields.choice(both[0], DTYPES) if both else None


def read_rope(fields: Fields, context_length: int) -> RopeConfig:
    """`rope_parameters` (transformers 5), or `rope_scaling` beside a top-level `rope_theta` (transformers 4)."""
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.error("partial_rotary_factor", fields.get("partial_rotary_factor"), "must be 1: no partial rope")
    theta = fields.number("rope_theta", RopeConfig.theta)
    older, newer = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    # An empty rope_scaling says nothing, as in transformers.
    scaling = next((place for place in (older, newer) if place and place.raw), Fields({}, fields.file))
    kind_key = "rope_type" if scaling.has("rope_type") or not scaling.has("type") else "type"
    kind = scaling.choice(kind_key, get_args(RopeKind), "default")
    rope = RopeConfig(theta=scaling.number("rope_theta", theta), kind=next(k for k in get_args(RopeKind) if k == kind))
    if kind == "default":
        if any(isinstance(value, dict) for value in scaling.raw.values()):
            raise scaling.error("rope_type", MISSING, "must be given once for the model, not for each layer type")
        return rope
    if scaling.number("partial_rotary_factor", 1.0) != 1.0:
        value = scaling.get("partial_rotary_factor")
        raise scaling.error("partial_rotary_factor", value, "must be 1: no partial rope")
    return _read_scaling(fields, scaling, rope, context_length)


def _read_scaling(fields: Fields, scaling: Fields, rope: RopeConfig, context_length: int) -> RopeConfig:
    if rope.kind == "linear":
        return dataclasses.replace(rope, factor=scaling.number("factor"))
    # Where both places name it, transformers lets the top level win.
    original = fields.integer(
        "original_max_position_embeddings", scaling.integer("original_max_position_embeddings", context_length)
    )
    rope = dataclasses.replace(rope, original_context_length=original)
    if rope.kind == "llama3":
        low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        if low >= high:
            raise scaling.error("low_freq_factor", low, f"must be below high_freq_factor ({high:g})")
        return dataclasses.replace(rope, factor=scaling.number("factor"), low_freq_factor=low, high_freq_factor=high)
    if rope.theta <= 1:
        raise refuse("rope_theta", rope.theta, "must be a number > 1 for yarn", fields.file)

    def optional(key: str) -> float | None:
        return scaling.number(key) if scaling.has(key) else None

    return dataclasses.replace(
        rope,
        factor=scaling.number("factor", context_length / original),
        beta_fast=scaling.number("beta_fast", rope.beta_fast),
        beta_slow=scaling.number("beta_slow", rope.beta_slow),
        attention_factor=optional("attention_factor"),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=scaling.boolean("truncate", True),
    )
