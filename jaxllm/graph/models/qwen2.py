"""Qwen2 and Qwen2.5: biases on q, k and v; windows on the upper layers when switched on. Declares differences only."""

from __future__ import annotations

from jaxllm.graph.models.family import Family, windows_of_upper_layers

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    qkv_bias=True,
    windows=windows_of_upper_layers,
)
