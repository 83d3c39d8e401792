"""Scales of keys and values in e4m3 pages: those a checkpoint brings, else 1; and what no scale of 1 can hold.

In: a directory, a model, the setting cache.kv_dtype; leaves as they are loaded. Out: a ModelConfig with a pair a layer
(none where pages are as wide as the model), and complaints. docs/adr/0042 says why 1. Knows nothing of pages.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.config import ConfigError
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.weights.tensor_file import VIEWS, TensorFileError, open_file

E4M3_MAX = 448.0
SUFFIXES = (".k_scale", ".v_scale")
# Below "model.layers.<i>.self_attn.", as compressed-tensors, ModelOpt and vLLM write them.
NAMES = (("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale"), ("attn.k_scale", "attn.v_scale"))
Pairs = tuple[tuple[float, float], ...]


def with_scales(model: ModelConfig, directory: Path, kv_dtype: str) -> ModelConfig:
    """The model with the scales its pages need."""
    if kv_dtype != "fp8":
        return model
    return dataclasses.replace(model, kv_scales=read(directory, model.num_layers))


def read(directory: Path, num_layers: int) -> Pairs:
    """A pair a layer. Raises ConfigError for scales of some layers only, or that are not positive numbers."""
    found: dict[str, float] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            file = open_file(path)
        except TensorFileError:
            continue  # the loader says what is wrong with it
        for name, tensor in file.tensors.items():
            if name.endswith(SUFFIXES):
                value = file.view(tensor).astype(np.float64).reshape(-1) if tensor.dtype in VIEWS else np.zeros(0)
                if value.size != 1 or not math.isfinite(value[0]) or value[0] <= 0:
                    raise ConfigError(f"{path.name}: {name} must be one positive number; leave cache.kv_dtype at auto")
                found[name] = float(value[0])
    if not found:
        return ((1.0, 1.0),) * num_layers
    pairs = []
    for layer in range(num_layers):
        own = [tuple(found.get(f"model.layers.{layer}.self_attn.{name}") for name in names) for names in NAMES]
        pair = next((pair for pair in own if None not in pair), None)
        if pair is None:
            raise ConfigError(f"{directory}: no k_scale and v_scale of layer {layer}, though other layers have them")
        pairs.append((float(pair[0] or 1.0), float(pair[1] or 1.0)))
    return tuple(pairs)


def complaint(model: ModelConfig, path: tuple[str | int, ...], leaf: Any) -> str | None:
    """Why a layer's keys or values would be cut off: a bias alone comes near the largest number of e4m3."""
    if not model.kv_scales or path[-1] != "qkv_bias":
        return None
    keys_and_values = jnp.abs(leaf[model.num_heads * model.head_dim :]).reshape(2, -1).max(axis=1)
    for what, largest, scale in zip(("keys", "values"), keys_and_values, model.kv_scales_of(int(path[1]))):
        if float(largest) > E4M3_MAX / 2 * scale:
            return (
                f"cache.kv_dtype = 'fp8': the {what} of layer {path[1]} have a bias of {float(largest):.0f}, and e4m3 "
                f"with scale {scale:g} ends at {E4M3_MAX * scale:.0f}; set it to auto"
            )
    return None
