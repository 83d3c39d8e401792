"""Llama 2 and 3.x: optional biases, every rope kind, no windows. Declares differences only."""

from __future__ import annotations

from jaxllm.graph.models.family import Family

FAMILY = Family(name="llama", architecture="LlamaForCausalLM", attention_bias=True, mlp_bias=True)
