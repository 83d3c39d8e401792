"""How many KV pages fit: bytes of weights, workspace and pages against the device's limit, before pages exist.

In: the config, the cache geometry, the bytes of weights and workspace. Out: a MemoryPlan that prints its own sum. Knows
nothing of sequences. The workspace is first an upper estimate from shapes, checked against what the compiled
executables say they need before any page is allocated.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from jaxllm.config import EngineConfig
from jaxllm.core import JaxLLMError
from jaxllm.engine import apart
from jaxllm.graph.kv_cache import Device, KVCacheSpec
from jaxllm.graph.models.config import ModelConfig

GIB = 2**30


class DoesNotFitError(JaxLLMError):
    """The model and the least useful cache exceed the device; the message holds the sum and the setting to change."""


@dataclass(frozen=True)
class MemoryPlan:
    limit_bytes: int | None  # None: the platform names no limit (CPU)
    weights_bytes: int
    workspace_bytes: int
    page_bytes: int
    num_pages: int
    page_size: int
    measured_bytes: int = 0  # of the workspace, what the compiled executables ask for
    packed_bytes: int = 0  # of the weights, those that lie there a second time, for decode steps

    @property
    def cache_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    def __str__(self) -> str:
        rows = [("weights", self.weights_bytes), ("workspace", self.workspace_bytes), ("KV pages", self.cache_bytes)]
        lines = [f"  {name:10s} {size / GIB:8.2f} GiB" for name, size in rows]
        limit = "no limit named" if self.limit_bytes is None else f"{self.limit_bytes / GIB:.2f} GiB usable"
        if self.packed_bytes:
            lines[0] += f"  ({self.packed_bytes / GIB:.2f} of it a second time, in 12 bits)"
        if self.measured_bytes:
            lines[1] += f"  (the executables need {self.measured_bytes / GIB:.2f})"
        tokens = self.num_pages * self.page_size
        return "\n".join([f"memory ({limit}):", *lines, f"  {self.num_pages} pages = {tokens:,} tokens"])


def kept_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """The logits that the steps of each decode bucket keep, the rows' counts and pages, and room for small arrays."""
    rows = sum(config.compile.decode_buckets)
    counts = (config.scheduler.max_num_seqs + 1) * model.vocab_size * np.dtype(np.uint16).itemsize
    width = -(-config.model.max_model_len // config.cache.page_size)
    table = (config.scheduler.max_num_seqs + 1) * width * np.dtype(np.int32).itemsize
    return rows * model.vocab_size * np.dtype(np.float32).itemsize + counts + table + apart.BYTES


def estimate_workspace_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """Activations of the widest layer at the token budget, the logits, and the sampler's temporaries."""
    itemsize = np.dtype(np.float32).itemsize
    ffn = 2 * model.d_ff
    if model.experts is not None:  # each choice of a token has an input, a hidden layer and an output of its own
        # A device can be sent every token of all shards of attention.
        each = 2 * model.experts.per_token * (model.d_model + model.experts.d_ff)
        ffn = max(ffn, each * config.mesh.attention_shards)
    widest = 4 * model.d_model + ffn + 2 * (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    activations = config.scheduler.token_budget * widest * itemsize
    sampler = 6 * config.scheduler.max_num_seqs * model.vocab_size * itemsize
    # Half as much again: an estimate below what executables need compiles all of them twice, 12 s of an 8B start.
    return (activations + sampler) * 3 // 2 + kept_bytes(config, model)


def machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def out_of_memory(phase: str, plan: MemoryPlan | None, device: Device) -> str:
    """What to say when the device refused memory that the plan, or nothing, had foreseen."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    seen = ""
    if stats:
        free = (stats["bytes_limit"] - stats["bytes_in_use"]) / GIB
        seen = f"; {free:.2f} GiB of {stats['bytes_limit'] / GIB:.2f} GiB are free for this process"
    return (
        f"out of device memory while making {phase} on {device.device_kind}{seen}. Another process may hold the device "
        "(nvidia-smi shows which): end it, or lower cache.memory_fraction, scheduler.max_num_seqs or "
        f"scheduler.token_budget{'' if plan is None else chr(10) + str(plan)}"
    )


def plan_memory(
    config: EngineConfig,
    model: ModelConfig,
    spec: KVCacheSpec,
    weights_bytes: int,
    workspace: int,
    device: Device,
    packed_bytes: int = 0,
) -> MemoryPlan:
    """`spec.num_pages` is ignored: it is what this decides, unless config.cache.num_pages pins it. `packed_bytes` are
    part of `weights_bytes`."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    limit = int(stats["bytes_limit"] * config.cache.memory_fraction) if stats else None
    width = -(-config.model.max_model_len // spec.page_size)
    useful = config.scheduler.max_num_seqs * width  # more can never be held at one time
    room = config.cache.cpu_cache_bytes if limit is None else limit - weights_bytes - workspace
    pages = config.cache.num_pages or min(useful, _coarse(room // spec.bytes_per_page))
    if limit is None and config.cache.num_pages:  # a CPU names no limit; asked for more than it has, it dies
        room = machine_bytes() - weights_bytes - workspace
    sizes = limit, weights_bytes, workspace, spec.bytes_per_page, pages, spec.page_size
    plan = MemoryPlan(*sizes, packed_bytes=packed_bytes)
    if pages < 1 or plan.cache_bytes > room:
        raise DoesNotFitError(
            f"{plan}\nthe cache needs {max(pages, 1) * spec.bytes_per_page / GIB:.2f} GiB and {room / GIB:.2f} GiB "
            "is left: lower cache.num_pages, scheduler.max_num_seqs or scheduler.token_budget, "
            "or raise cache.memory_fraction"
        )
    return plan


def _coarse(pages: int) -> int:
    """At most 1% fewer: pages are in the shapes of executables, which a few bytes more or less shall not change."""
    grain = 1 << max(0, pages.bit_length() - 8)
    return pages // grain * grain
