"""all_reduce as one small CUDA kernel over NVLink peer memory, called through XLA's FFI and captured in CUDA graphs.

In: an array inside shard_map over devices of this process. Out: its sum on every device, the same bits on each, in
rank order. Built from all_reduce.cu by nvcc on first use and kept in the user's cache; declines where that, peer
access or the shape do not allow it. ADR 0010 says why this is no Pallas kernel. Does not know meshes: it is told
which devices meet.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import jax
import numpy as np

from pallas_kernels.all_reduce.shots import RANKS, takes_two_shots
from pallas_kernels.compiled import built, once

SOURCE = Path(__file__).with_name("all_reduce.cu")
INCLUDES = (Path(__file__).with_name("peers.h"),)
TARGET = "jaxllm_all_reduce"


def all_reduce(x: jax.Array, axes: str | tuple[str, ...], groups: tuple[tuple[int, ...], ...] | None) -> jax.Array:
    """See api.all_reduce."""
    if groups is None:
        raise NotImplementedError("which devices meet was not said")
    if jax.process_count() > 1:
        raise NotImplementedError("devices of several processes: their memory is not mapped here")
    ranks, size_bytes = len(groups[0]), x.size * x.dtype.itemsize
    if ranks not in RANKS:
        raise NotImplementedError(f"{ranks} devices: 2, 4 or 8")
    if x.dtype.name not in ("bfloat16", "float16", "float32"):
        raise NotImplementedError(f"{x.dtype}: bfloat16, float16 or float32")
    if size_bytes % 8 or size_bytes == 0:
        raise NotImplementedError(f"{size_bytes} bytes: a multiple of 8")
    two_shot = takes_two_shots(size_bytes, ranks)
    most = int(library().jaxllm_all_reduce_most_bytes()) * (ranks if two_shot else 1)
    if size_bytes > most:
        raise NotImplementedError(f"{size_bytes} bytes: at most {most}, larger sums are NCCL's")
    numbers = np.array([group_number(group) for group in groups], np.int64)
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x, groups=numbers, shots=np.int64(2 if two_shot else 1))


@functools.cache
def group_number(devices: tuple[int, ...]) -> int:
    """The library's number of a group of devices in rank order; memory is taken on each of them once."""
    ordinals = [ordinal(device) for device in devices]
    why = ctypes.create_string_buffer(256)
    number = library().jaxllm_all_reduce_group((ctypes.c_int * len(ordinals))(*ordinals), len(ordinals), why, len(why))
    if number < 0:
        raise NotImplementedError(f"devices {list(devices)} cannot share memory: {why.value.decode()}")
    return number


def ordinal(device_id: int) -> int:
    """CUDA's number of a device in this process."""
    for device in jax.local_devices():
        if device.id == device_id:
            return int(device.local_hardware_id)
    raise NotImplementedError(f"device {device_id} is not of this process")


@once
def library() -> ctypes.CDLL:
    """The compiled kernels, registered with XLA."""
    loaded = ctypes.cdll.LoadLibrary(str(built(SOURCE, INCLUDES)))
    loaded.jaxllm_all_reduce_most_bytes.restype = ctypes.c_int64
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(loaded.jaxllm_all_reduce), platform="CUDA")
    return loaded
