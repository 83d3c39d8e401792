"""Qwen1.5-MoE and Qwen2-MoE: biases on q, k and v, a gated shared expert as well. Declares differences only."""

from __future__ import annotations

from jaxllm.graph.models.family import Family, qwen2_moe_experts, windows_of_even_layers

FAMILY = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    qkv_bias=True,
    reads_qkv_bias=True,
    windows=windows_of_even_layers,
    experts=qwen2_moe_experts,
)
