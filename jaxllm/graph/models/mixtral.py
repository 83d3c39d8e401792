"""Mixtral: experts in every layer, probabilities of the chosen scaled to sum to 1. Declares differences only."""

from __future__ import annotations

from jaxllm.graph.models.family import ExpertTensors, Family, mixtral_experts, one_window

FAMILY = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    windows=one_window,
    experts=mixtral_experts,
    expert_tensors=ExpertTensors(
        router="block_sparse_moe.gate.weight",
        gate="block_sparse_moe.experts.{}.w1.weight",
        up="block_sparse_moe.experts.{}.w3.weight",
        down="block_sparse_moe.experts.{}.w2.weight",
    ),
)
