"""All layers of a decode step of many rows as CUDA launches that overlap (launched.cu), one call of XLA's in its graph.

In and out: see api.py; final norm and head are XLA's. Declines what the kernels do not do. A row's bits depend on
whether there are up to 64 rows, 128, 192 or more: products are cut by that. ADR 0047 says why these are launches and
no Pallas kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.all_reduce import cuda as all_reduce
from pallas_kernels.compiled import Handler
from pallas_kernels.decode_attention import cuda as attention
from pallas_kernels.decode_chain import cuda as chain
from pallas_kernels.decode_chain.reference import rms_norm
from pallas_kernels.decode_layers.api import Few, Head, LayerWeights, Pages
from pallas_kernels.decode_layers.wide import numbers_of, operands_of, optional_of, product, refuse_groups

HERE = Path(__file__).parent
SOURCE = HERE / "launched.cu"
INCLUDES = (HERE / "groups.h", *attention.INCLUDES, *chain.INCLUDES, *all_reduce.INCLUDES)
TARGET = "jaxllm_launched_layers"
_HANDLER = Handler(SOURCE, INCLUDES, TARGET)
library, register = _HANDLER.library, _HANDLER.register
HEAD = 128


def load(path: Path) -> ctypes.CDLL:
    return _typed(_HANDLER.load(path))


def _typed(loaded: ctypes.CDLL) -> ctypes.CDLL:
    loaded.jaxllm_launched_layers_sums.restype = ctypes.c_int64
    return loaded


class Kernel(NamedTuple):
    """A built library, the name it is registered under, and the machine's multiprocessors."""

    target: str
    library: ctypes.CDLL
    blocks: int
    ordinal: Callable[[int], int] = all_reduce.ordinal  # of a device, by its id


def decode_layers(
    x: jax.Array,
    layers: Sequence[LayerWeights],
    pages: Sequence[Pages],
    page_table: jax.Array,
    kv_lens: jax.Array,
    cosines: jax.Array,
    sines: jax.Array,
    *,
    eps: float,
    scale: float,
    head: Head | None = None,
    groups: tuple[tuple[int, ...], ...] = (),
    kernel: Kernel | None = None,
) -> tuple[jax.Array, list[Pages]]:
    """See api.decode_layers."""
    refuse(x, layers, pages, head, scale, groups)
    kernel, rows = kernel or ours(), (page_table, kv_lens, cosines, sines)
    x, written = call(kernel, x, layers, pages, *rows, eps=eps, scale=scale, groups=groups)
    return (x if head is None else product(rms_norm(x, head.norm, eps), head.table)), written


def refuse(
    x: jax.Array,
    layers: Sequence[LayerWeights],
    pages: Sequence[Pages],
    head: Head | None,
    scale: float,
    groups: tuple[tuple[int, ...], ...] = (),
) -> None:
    """NotImplementedError for what the kernels do not do."""
    refuse_groups(groups, head)
    if head is not None and isinstance(head.table, Few):
        raise NotImplementedError("a head that is quantised or in 12 bits")
    kinds = {each.kind if isinstance(each, Few) else "plain" for layer in layers for each in layer.matrices}
    if kinds not in ({"plain"}, {"bf12"}):
        raise NotImplementedError(f"weights that are {' and '.join(sorted(kinds))}")
    if kinds == {"bf12"} and len(x) > chain.PACKED_ROWS:
        raise NotImplementedError(f"at most {chain.PACKED_ROWS} rows by weights in 12 bits, got {len(x)}")
    words = {id(each.values) for layer in layers for each in layer.matrices if isinstance(each, Few)}
    for array in jax.tree.leaves((x, tuple(layers), tuple(pages), head)):
        if id(array) not in words and array.dtype != jnp.bfloat16:
            raise NotImplementedError(f"everything must be bfloat16, got {array.dtype}")
    (B, D), first = x.shape, layers[0]
    sizes = {"D": D, "N * H": first.o.shape[1], "F": first.down.shape[1], "Q": first.qkv.shape[0]}
    chain.refuse_sizes(B, sizes)
    queries = jax.ShapeDtypeStruct((B, first.o.shape[1] // HEAD, HEAD), x.dtype)
    attention.refuse(queries, pages[0][0], B, scale, None, None)


def call(
    kernel: Kernel,
    x: jax.Array,
    layers: Sequence[LayerWeights],
    pages: Sequence[Pages],
    *rows: jax.Array,
    eps: float,
    scale: float,
    groups: tuple[tuple[int, ...], ...] = (),
) -> tuple[jax.Array, list[Pages]]:
    """The FFI call, with the library's word on how much memory it works in."""
    (B, D), first, (_, K, page_size, _) = x.shape, layers[0], pages[0][0].shape
    NH, F = first.o.shape[1], first.down.shape[1]
    packed = isinstance(first.qkv, Few)
    cuts, sums = chain.cuts_for(B, D, NH, F, first.qkv.shape[0], kernel.blocks, packed)
    sizes = dict(rows=B, blocks=kernel.blocks, D=D, F=F, heads=NH // HEAD, kv_heads=K)
    sizes |= dict(page_size=page_size, width=rows[0].shape[1], sums=sums)
    work = kernel.library.jaxllm_launched_layers_work(*map(ctypes.c_int64, sizes.values()))
    operands, aliases = operands_of(x, rows, layers, pages)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((work,), jnp.uint8)]
    results += [jax.ShapeDtypeStruct(page.shape, page.dtype) for own in pages for page in own]
    sizes |= dict(num_layers=len(layers), has=optional_of(first))
    attributes = {name: np.int64(value) for name, value in sizes.items()}
    run = jax.ffi.ffi_call(kernel.target, results, input_output_aliases=aliases)
    numbers = _numbers(kernel, groups, D)
    out, _, *written = run(
        *operands, cuts=cuts, groups=numbers, **attributes, eps=np.float32(eps), scale=np.float32(scale)
    )
    return out, list(zip(written[::2], written[1::2], strict=True))


def _numbers(kernel: Kernel, groups: tuple[tuple[int, ...], ...], D: int) -> np.ndarray:
    """The library's numbers of groups of devices in rank order; memory for any number of rows is taken once."""
    if not groups:
        return np.zeros(0, np.int64)
    size = kernel.library.jaxllm_launched_layers_sums(*map(ctypes.c_int64, (D, len(groups[0]))))
    return numbers_of(kernel.library.jaxllm_launched_layers_group, kernel.ordinal, groups, size)


def ours() -> Kernel:
    """The kernels for the present device, built on first use."""
    loaded = _typed(library())
    register(loaded)
    return Kernel(TARGET, loaded, getattr(jax.devices()[0], "core_count", 132) // 2 * 2)
