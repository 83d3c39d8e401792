"""Which checkpoint tensors make up which leaf: the Hugging Face names of the Llama layout, which all families use.

In: a ModelConfig. Out: one Part for every tensor a checkpoint must hold, saying which rows of which leaf it fills.
`qkv` and `gate_up` are several tensors stacked by rows; `norms` and `qk_norms` hold one vector a row; leaves of
experts hold one expert's rows after another's. Knows nothing of files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import Params, abstract
from jaxllm.graph.models.registry import family_named

Path = tuple[str | int, ...]

# Leaf of a layer -> the tensors stacked in it, in row order, each named below "model.layers.<i>.".
LAYER_TENSORS: dict[Path, tuple[str, ...]] = {
    ("norms",): ("input_layernorm.weight", "post_attention_layernorm.weight"),
    ("attention", "qkv"): ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ("attention", "qkv_bias"): ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    ("attention", "qk_norms"): ("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    ("attention", "o"): ("self_attn.o_proj.weight",),
    ("attention", "o_bias"): ("self_attn.o_proj.bias",),
    ("mlp", "gate_up"): ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    ("mlp", "gate_up_bias"): ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    ("mlp", "down"): ("mlp.down_proj.weight",),
    ("mlp", "down_bias"): ("mlp.down_proj.bias",),
    ("mlp", "shared", "gate_up"): ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
    ("mlp", "shared", "down"): ("mlp.shared_expert.down_proj.weight",),
    ("mlp", "shared_gate"): ("mlp.shared_expert_gate.weight",),
}
TOP_TENSORS = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
# A buffer that old checkpoints carry, as rope makes its own; what kv_scales.py reads.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", ".k_scale", ".v_scale", ".q_scale")


@dataclass(frozen=True)
class Part:
    """One checkpoint tensor: rows [start, start + rows) of the leaf at `path`, counted through its experts."""

    name: str
    path: Path
    shape: tuple[int, ...]  # in the checkpoint
    start: int
    rows: int


def leaves(tree: Params, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf of a parameter tree with its path, in the tree's own order."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def parts(config: ModelConfig) -> tuple[Part, ...]:
    """Every tensor a checkpoint of this model must hold, those of one leaf next to each other."""
    return tuple(part for path, leaf in leaves(abstract(config)[1]) for part in _parts_of(config, path, leaf.shape))


def _parts_of(config: ModelConfig, path: Path, shape: tuple[int, ...]) -> Iterator[Part]:
    if path[0] != "layers":
        yield Part(TOP_TENSORS[str(path[0])], path, shape, 0, shape[0])
        return
    names = _layer_tensors(config, path[2:])
    rows = [math.prod(shape[:-1] if len(shape) == 3 else shape[:1]) // len(names)] * len(names)
    if path[-1] in ("qkv", "qkv_bias"):
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        rows = [count * config.head_dim for count in heads]
    vectors = path[-1] in ("norms", "qk_norms")
    start = 0
    for name, count in zip(names, rows, strict=True):
        stored = shape[1:] if vectors else (count, *shape[1:][-1:])
        yield Part(f"model.layers.{path[1]}.{name}", path, stored, start, count)
        start += count


def _layer_tensors(config: ModelConfig, path: Path) -> tuple[str, ...]:
    tensors = family_named(config.family).expert_tensors
    experts = range(config.experts.count if config.experts else 0)
    match path:
        case ("mlp", "router"):
            return (tensors.router,)
        case ("mlp", "experts_gate_up"):
            return tuple(name.format(expert) for expert in experts for name in (tensors.gate, tensors.up))
        case ("mlp", "experts_down"):
            return tuple(tensors.down.format(expert) for expert in experts)
    return LAYER_TENSORS[path]


def to_checkpoint(params: Params, config: ModelConfig) -> dict[str, Any]:
    """Leaves cut back into checkpoint tensors by name: the inverse of merging at load, for writing checkpoints."""
    by_path = {path: leaf.reshape(-1, leaf.shape[-1]) if leaf.ndim == 3 else leaf for path, leaf in leaves(params)}
    return {
        part.name: by_path[part.path][part.start : part.start + part.rows].reshape(part.shape) for part in parts(config)
    }
