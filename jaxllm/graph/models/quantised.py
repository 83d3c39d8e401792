"""How a checkpoint says that its weights are already quantised: config.json's `quantization_config`. No JAX here.

In: the Fields of a config.json. Out: a StoredQuantisation, None for plain weights, or a ConfigError naming the key, the
value and what is read here: AWQ (gemm layout) and GPTQ in 4 bits, e4m3 as compressed-tensors and DeepSeek write it.
Which tensors that makes is jaxllm.graph.quant.stored's affair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxllm.graph.models.fields import MISSING, Fields

METHODS = ("awq", "gptq", "fp8", "compressed-tensors")
GROUPS = (32, 64, 128)
BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class StoredQuantisation:
    """What the checkpoint's matrices are."""

    method: Literal["awq", "gptq", "fp8"]
    group: int = 0  # awq, gptq: inputs that share a scale
    reordered: bool = False  # gptq: groups were drawn in another order of inputs (desc_act)
    zero_less_one: bool = False  # gptq: zeros are stored less one (its first format)
    blocks: bool = False  # fp8: a scale a 128 x 128 block
    fixed_inputs: bool = False  # fp8: activations have a scale fixed beforehand


def read_stored(fields: Fields) -> StoredQuantisation | None:
    found = fields.mapping("quantization_config")
    if found is None:
        return None
    method = found.choice("quant_method", METHODS)
    if method == "awq":
        found.choice("version", ("gemm", "GEMM"), "gemm")
        return StoredQuantisation(method="awq", group=_group(found))
    if method == "gptq":
        version = found.choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
        return StoredQuantisation(
            method="gptq",
            group=_group(found),
            reordered=found.boolean("desc_act", False),
            zero_less_one=version == "gptq",
        )
    return _fp8(found) if method == "fp8" else _compressed(found)


def _group(found: Fields) -> int:
    bits = found.integer("bits", 4)
    if bits != 4:
        raise found.error("bits", bits, "must be 4")
    group = found.get("group_size")
    if isinstance(group, bool) or group not in GROUPS:
        raise found.error("group_size", group, f"must be one of {', '.join(map(str, GROUPS))}")
    return next(each for each in GROUPS if each == group)


def _fp8(found: Fields) -> StoredQuantisation:
    block = found.get("weight_block_size")
    if block is not MISSING and block != [BLOCK, BLOCK]:
        raise found.error("weight_block_size", block, f"must be [{BLOCK}, {BLOCK}] or absent")
    fixed = found.choice("activation_scheme", ("dynamic", "static"), "dynamic") == "static"
    return StoredQuantisation(method="fp8", blocks=block is not MISSING, fixed_inputs=fixed)


def _compressed(found: Fields) -> StoredQuantisation:
    found.choice("format", ("float-quantized",))
    groups = found.mapping("config_groups")
    if groups is None or len(groups.raw) != 1:
        raise found.error("config_groups", found.get("config_groups"), "must hold one group, of e4m3 weights")
    group = groups.mapping(next(iter(groups.raw)))
    weights = group.mapping("weights") if group is not None else None
    if group is None or weights is None:
        raise found.error("config_groups", found.get("config_groups"), "must say what its weights are")
    if weights.integer("num_bits") != 8 or weights.choice("type", ("float", "int")) != "float":
        raise weights.error("type", weights.get("type"), "must be float, with num_bits 8")
    blocks = weights.choice("strategy", ("tensor", "channel", "block")) == "block"
    if blocks and weights.get("block_structure") != [BLOCK, BLOCK]:
        raise weights.error("block_structure", weights.get("block_structure"), f"must be [{BLOCK}, {BLOCK}]")
    inputs = group.mapping("input_activations")
    fixed = inputs is not None and not inputs.boolean("dynamic", False)
    return StoredQuantisation(method="fp8", blocks=blocks, fixed_inputs=fixed)
