"""Qwen3-MoE: q and k normed per head, routed experts without a shared one. Declares differences only."""

from __future__ import annotations

from jaxllm.graph.models.family import Family, one_window_if_on, qwen3_moe_experts

FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    attention_bias=True,
    qk_norm=True,
    windows=one_window_if_on,
    experts=qwen3_moe_experts,
)
