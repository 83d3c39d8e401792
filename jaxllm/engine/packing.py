"""Whether a model's matrices lie in memory twice, once in 12 bits without loss, for decode steps of few rows.

In: the resolved config and the homes of each replica. Out: homes that say so, or a ConfigError with the reason where it
was asked for and cannot be; once weights are there, the same with their twins. Where it cannot be, one line says why
and everything goes on as without. Knows nothing of how twins are made or read.
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
from jaxllm.graph.weights.packed import KEY, PackingError, begin, refusal, with_shapes, with_twins, without_twins
from pallas_kernels.decode_layers import cuda

log = logging.getLogger(__name__)
MOST_SHARE = 0.15  # of a device's memory that twins take by themselves
LEAST_WIDTH = (
    4096  # of the residual stream: 8B gains, at 1,024 steps of 0.6B took 11 to 15% longer; none between was timed
)
GIB = 2**30


def with_packed(
    config: EngineConfig, replicas: list[tuple[Home, ...]], whole: tuple[int, int] | None
) -> list[tuple[Home, ...]]:
    """`whole`: decode steps of which numbers of rows are one op, the only one that reads twins."""
    asked = config.model.packed_weights
    if asked is False:
        return replicas
    why = _refusal(config, replicas[0], whole)
    if why is not None and asked:
        raise ConfigError(f"model.packed_weights = true: {why}")
    if why is not None:
        log.info("weights in 12 bits for decode steps: none, %s", why)
        return replicas
    log.info("weights in 12 bits for decode steps of %s", _rows())
    return [tuple(dataclasses.replace(home, packed=True) for home in homes) for homes in replicas]


def begin_packing(shapes: Sequence[Params]) -> None:
    """What makes twins is compiled while weights are loaded."""
    for own in shapes:
        begin(without_twins(own))


def packed(config: EngineConfig, homes: Sequence[Home], params: list[Params]) -> list[Params]:
    """Loaded weights with their twins, if these homes have them; without where these weights cannot be packed."""
    if not homes[0].packed:
        return params
    try:
        return jax.block_until_ready([with_twins(own) for own in params])
    except PackingError as error:
        if config.model.packed_weights:
            raise ConfigError(f"model.packed_weights = true: {error}") from None
        log.warning("weights in 12 bits for decode steps: none, %s", error)
        return params


def packed_bytes(params: Params) -> int:
    """Of the twins among these arrays or shapes, on one device."""
    return held_bytes(params[KEY]) if KEY in params else 0


def _refusal(config: EngineConfig, homes: tuple[Home, ...], whole: tuple[int, int] | None) -> str | None:
    home, dtype, kernels = homes[0], jnp.dtype(config.model.dtype), config.compile.kernels
    gpu = home.device.platform == "gpu"
    if not gpu and config.model.packed_weights is None:
        return f"on a {home.device.platform} they are made only where model.packed_weights = true"
    if len(homes) > 1 or (home.placement is not None and (config.mesh.seq > 1 or config.mesh.attention_data)):
        return f"not on a mesh of {config.mesh}"
    if home.placement is not None and (config.model.packed_weights is None or kernels != "launched"):
        return 'where devices share layers, only told so and with compile.kernels = "launched"'
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
    if config.model.packed_weights is None and home.model.d_model < LEAST_WIDTH:
        return f"a residual stream of {home.model.d_model} numbers, fewer than {LEAST_WIDTH}"
    shapes = home.shapes(dtype)
    return refusal(home.model, shapes) or _too_large(config, home, shapes)


def _rows() -> str:
    return f"{layers.PACKED_ROWS.start} to {layers.PACKED_ROWS.stop - 1} rows"


def _too_large(config: EngineConfig, home: Home, shapes: Params) -> str | None:
    stats = home.own_device.memory_stats() if home.device.platform == "gpu" else None
    if config.model.packed_weights or not stats:
        return None
    size, most = packed_bytes(with_shapes(shapes)), MOST_SHARE * stats["bytes_limit"]
    over = f"they would take {size / GIB:.2f} GiB, more than {MOST_SHARE:.0%} of the device's memory"
    return over if size > most else None
