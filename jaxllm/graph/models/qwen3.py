"""Qwen3 dense: q and k are normed per head before rope; head_dim is 128 unless given. Declares differences only."""

from __future__ import annotations

from jaxllm.graph.models.family import Family, windows_of_upper_layers

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    attention_bias=True,
    qk_norm=True,
    head_dim=128,
    windows=windows_of_upper_layers,
)
