"""Mistral 7B and Nemo: one sliding window for all layers or none; head_dim stands alone. Declares differences only."""

from __future__ import annotations

from jaxllm.graph.models.family import Family, windows_everywhere

FAMILY = Family(name="mistral", architecture="MistralForCausalLM", windows=windows_everywhere)
