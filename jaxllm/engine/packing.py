"""A model's matrices lie in memory twice where a config asks for it: once in 12 bits, for decode steps of few rows.

In: the resolved config and the homes of each replica. Out: homes that say so, or a ConfigError with the reason why it
cannot be; once weights are there, the same with their twins. Knows nothing of how twins are made or read.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxllm.config import ConfigError, EngineConfig
from jaxllm.graph.kv_cache import page_dtype
from jaxllm.graph.layers import whole as layers
from jaxllm.graph.models.decoder import Params
from jaxllm.graph.spread import Home, held_bytes
from jaxllm.graph.weights.packed import KEY, PackingError, begin, refusal, with_twins, without_twins
from pallas_kernels.decode_layers import cuda

log = logging.getLogger(__name__)


def with_packed(
    config: EngineConfig, replicas: list[tuple[Home, ...]], whole: tuple[int, int] | None
) -> list[tuple[Home, ...]]:
    """`whole`: decode steps of which numbers of rows are one op, the only one that reads twins."""
    if not config.model.packed_weights:
        return replicas
    why = _refusal(config, replicas[0], whole)
    if why is not None:
        raise ConfigError(f"model.packed_weights = true: {why}")
    log.info("weights in 12 bits for decode steps of %s", _rows())
    return [tuple(dataclasses.replace(home, packed=True) for home in homes) for homes in replicas]


def begin_packing(shapes: Sequence[Params]) -> None:
    """What makes twins is compiled while weights are loaded."""
    for own in shapes:
        begin(without_twins(own))


def packed(config: EngineConfig, homes: Sequence[Home], params: list[Params]) -> list[Params]:
    """Loaded weights with their twins, if these homes have them. ConfigError where these weights cannot be packed."""
    if not homes[0].packed:
        return params
    try:
        return jax.block_until_ready([with_twins(own) for own in params])
    except PackingError as error:
        raise ConfigError(f"model.packed_weights = true: {error}") from None


def packed_bytes(params: Params) -> int:
    """Of the twins among these arrays or shapes, on one device."""
    return held_bytes(params[KEY]) if KEY in params else 0


def _refusal(config: EngineConfig, homes: tuple[Home, ...], whole: tuple[int, int] | None) -> str | None:
    home, dtype, kernels = homes[0], jnp.dtype(config.model.dtype), config.compile.kernels
    gpu = home.device.platform == "gpu"
    if len(homes) > 1 or (home.placement is not None and (config.mesh.seq > 1 or config.mesh.attention_data)):
        return f"not on a mesh of {config.mesh}"
    if home.placement is not None and kernels != "launched":
        return 'where devices share layers, only with compile.kernels = "launched"'
    if config.scheduler.deterministic:
        return "scheduler.deterministic = true has no decode steps"
    few = [rows for rows in config.compile.decode_buckets if whole and whole[0] <= rows <= whole[1]]
    if whole is None:
        return f'compile.kernels = "{kernels}" runs no decode step as one op here; "layers" does'
    if not set(few).intersection(layers.PACKED_ROWS):
        return f"no decode bucket has {_rows()}"
    if page_dtype(config.cache.kv_dtype, config.model.dtype) == jnp.float8_e4m3fn:
        return "pages of keys and values are fp8"
    if gpu and home.model.head_dim != cuda.HEAD:
        return f"no kernel takes heads of {home.model.head_dim}"
    return refusal(home.model, home.shapes(dtype))


def _rows() -> str:
    return f"{layers.PACKED_ROWS.start} to {layers.PACKED_ROWS.stop - 1} rows"
