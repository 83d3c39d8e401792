"""Which family reads which architecture name. A new family is one file and one line here.

In: a parsed config.json. Out: the family it names, or a ConfigError listing the names known.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxllm.graph.models import llama, mistral, mixtral, qwen2, qwen2_moe, qwen3, qwen3_moe
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.family import Family
from jaxllm.graph.models.fields import MISSING, Fields

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    mistral.FAMILY,
    mixtral.FAMILY,
    qwen2_moe.FAMILY,
    qwen3_moe.FAMILY,
)


def find_family(fields: Fields) -> Family:
    """By `architectures`, or by `model_type` where a config names no architecture."""
    architectures = fields.strings("architectures")
    model_type = fields.get("model_type")
    for family in FAMILIES:
        if family.architecture in architectures if architectures else family.name == model_type:
            return family
    if architectures or model_type is MISSING:
        known = ", ".join(family.architecture for family in FAMILIES)
        raise fields.error(
            "architectures", list(architectures) if architectures else MISSING, f"must be one of {known}"
        )
    raise fields.error("model_type", model_type, f"must be one of {', '.join(family.name for family in FAMILIES)}")


def read_config(raw: Mapping[str, object], file: str) -> ModelConfig:
    fields = Fields(raw, file)
    config = find_family(fields).read(fields)
    fields.note_unread()
    return config


def family_named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)
