"""One safetensors file: its header checked in full before any of its data is touched.

In: a path. Out: the tensors it declares (name, dtype, shape, place), and memory-mapped views of them; or a list of
what is wrong with it. Own parser, so that every fault is named by file and tensor, and bf16 needs no detour.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
FLOATS: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
VIEWS = FLOATS | {"I32": np.dtype(np.int32), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}


class TensorFileError(Exception):
    """This file cannot be a whole safetensors file."""


@dataclass(frozen=True)
class Tensor:
    """A tensor as the header declares it; `begin` and `end` count bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    path: Path
    tensors: dict[str, Tensor]

    def view(self, tensor: Tensor) -> np.ndarray:
        """The tensor's bytes, mapped, not read: pages come in when they are copied to the device."""
        data = np.memmap(self.path, np.uint8, "r", offset=tensor.begin, shape=(tensor.end - tensor.begin,))
        return np.asarray(data).view(VIEWS[tensor.dtype]).reshape(tensor.shape)


def open_file(path: Path) -> TensorFile:
    """Parse and check the header. Raises TensorFileError with one reason."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
            if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
                raise TensorFileError(f"no header: {size} bytes, header of {length} bytes promised")
            header = json.loads(file.read(length))
    except OSError as error:
        raise TensorFileError(f"cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise TensorFileError(f"header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise TensorFileError("header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(tensors, 8 + length, size)
    return TensorFile(path, tensors)


def _tensor(name: str, entry: object, data_start: int) -> Tensor:
    if not isinstance(entry, dict):
        raise TensorFileError(f"{name}: header entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise TensorFileError(f"{name}: unknown dtype {dtype!r}")
    dims, places = tuple(_counts(shape)), tuple(_counts(offsets))
    if not isinstance(shape, list) or len(dims) != len(shape):
        raise TensorFileError(f"{name}: shape {shape!r} is not a list of sizes")
    if len(places) != 2 or places[1] - places[0] != math.prod(dims) * ITEM_BYTES[dtype]:
        raise TensorFileError(f"{name}: bytes {offsets!r} do not hold {dtype}{list(dims)}")
    return Tensor(name, dtype, dims, data_start + places[0], data_start + places[1])


def _counts(values: object) -> Iterator[int]:
    for value in values if isinstance(values, list) else ():
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            yield value


def _check_layout(tensors: dict[str, Tensor], data_start: int, size: int) -> None:
    """Tensors must tile the data section: no hole, no overlap, nothing beyond the end of the file."""
    at = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != at:
            raise TensorFileError(f"{tensor.name}: starts at byte {tensor.begin}, the tensor before ends at {at}")
        at = tensor.end
    if at > size:
        raise TensorFileError(f"truncated: {size} bytes, the header promises {at}")
    if at < size:
        raise TensorFileError(f"{size - at} bytes follow the last tensor")
