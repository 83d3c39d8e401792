"""What a decoder-only transformer is made of: sizes, rope, windows, biases. No JAX here.

In: numbers, or a Hugging Face config.json (transformers 4 or 5). Out: a frozen, checked ModelConfig, the only
description the decoder, the weight loader and the KV cache share. Families differ only in how they fill it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxllm.graph.models.fields import refuse
from jaxllm.graph.models.quantised import StoredQuantisation

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; fields beyond `theta` and `kind` only matter to the kinds named beside them."""

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0  # linear, llama3, yarn
    original_context_length: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None = from factor, mscale and mscale_all_dim
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: correction range rounded outward to whole dimensions


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Routed feed-forward: each token goes to its `per_token` most likely experts, weighted by their probabilities."""

    count: int
    per_token: int
    d_ff: int  # of one expert
    norm_topk: bool = False  # the chosen probabilities are scaled to sum to 1
    shared_d_ff: int = 0  # of an expert that every token passes, times a gate of its own; 0 = none
    copies: int = (
        0  # most slots one expert's weights lie in, by a table in each layer; 0 = no table: expert e in slot e
    )

    def __post_init__(self) -> None:
        for name in ("count", "per_token", "d_ff"):
            if getattr(self, name) < 1:
                raise refuse(f"experts.{name}", getattr(self, name), "must be an integer >= 1")
        if self.per_token > self.count:
            raise refuse("experts.per_token", self.per_token, f"must be at most experts.count ({self.count})")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of one model. Raises ConfigError when they do not fit together."""

    family: str = "llama"
    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()  # one entry a layer; () = no layer has a window
    kv_scales: tuple[tuple[float, float], ...] = ()  # of keys and values in e4m3 pages, a layer; () = all 1
    experts: ExpertsConfig | None = None
    sparse_layers: tuple[bool, ...] = ()  # which layers route to experts; () = all if there are experts
    context_length: int = 2048
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    activation: Literal["silu"] = "silu"
    dtype: str | None = None  # what the checkpoint says it is stored in
    stored: StoredQuantisation | None = None  # its matrices, where they are quantised already

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff"):
            if getattr(self, name) < 1:
                raise refuse(name, getattr(self, name), "must be an integer >= 1")
        if self.num_heads % self.num_kv_heads:
            raise refuse("num_heads", self.num_heads, f"must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise refuse("head_dim", self.head_dim, "must be even: rope turns pairs")
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if len(self.windows) != self.num_layers:
            raise refuse("windows", self.windows, f"must have num_layers ({self.num_layers}) entries")
        if self.kv_scales and len(self.kv_scales) != self.num_layers:
            raise refuse("kv_scales", self.kv_scales, f"must have num_layers ({self.num_layers}) entries")
        if not self.sparse_layers:
            object.__setattr__(self, "sparse_layers", (self.experts is not None,) * self.num_layers)
        if len(self.sparse_layers) != self.num_layers:
            raise refuse("sparse_layers", self.sparse_layers, f"must have num_layers ({self.num_layers}) entries")
        if self.experts is None and any(self.sparse_layers):
            raise refuse("sparse_layers", self.sparse_layers, "must all be false: there are no experts")

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5

    def kv_scales_of(self, layer: int) -> tuple[float, float]:
        return self.kv_scales[layer] if self.kv_scales else (1.0, 1.0)

    @staticmethod
    def from_hf(raw: Mapping[str, object], file: str = "config.json") -> ModelConfig:
        """From the parsed config.json of any family in the registry."""
        from jaxllm.graph.models.registry import read_config  # the registry's families import this module

        return read_config(raw, file)

    @staticmethod
    def from_directory(directory: str | Path) -> ModelConfig:
        file = Path(directory) / "config.json"
        return ModelConfig.from_hf(read_json(file), str(file))


def read_json(file: Path) -> dict[str, object]:
    """A JSON object from a file, or a ConfigError saying why there is none."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise refuse("file", str(file), f"cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise refuse("file", str(file), f"is not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise refuse("file", str(file), "must hold a JSON object")
    return raw
