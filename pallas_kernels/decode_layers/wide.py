"""decode_layers for up to 128 rows as one CUDA kernel (wide.cu), called through XLA's FFI and kept in the step's graph.

In: arrays that api.py has checked. Out: results, the pages in place. The first layer's qkv and the head are XLA's: they
are products like any other, with nothing before or behind them to stream across. Declines what the kernel does not do.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.all_reduce import cuda as all_reduce
from pallas_kernels.compiled import Handler
from pallas_kernels.decode_attention import cuda as attention
from pallas_kernels.decode_chain.reference import rms_norm
from pallas_kernels.decode_layers.api import Few, Head, LayerWeights, Pages, Weight

HERE = Path(__file__).parent
SOURCE = HERE / "wide.cu"
INCLUDES = (
    *(HERE / name for name in ("ends.h", "wide_ends.h", "wide_launch.h", "groups.h")),
    *attention.INCLUDES,
    *all_reduce.INCLUDES,
)
TARGET = "jaxllm_wide_layers"
_HANDLER = Handler(SOURCE, INCLUDES, TARGET)
library, register = _HANDLER.library, _HANDLER.register
MOST_ROWS, MOST_LAYERS, MOST_RANKS, DEPTH, HEAD, MOST_GROUP = 128, 37, 8, 64, 128, 8
WIDE, WIDEST, MOST_TILES = 128, 8192, 512


def tiles_of(columns: int, gated: bool = False) -> int:
    """Pairs of tiles: what a cluster takes."""
    return -(-columns // (WIDE if gated else 2 * WIDE))


@functools.cache
def splits_for(columns: int, depth: int, gated: bool, blocks: int) -> int:
    """Into how many parts of its depth a product is cut, so that every cluster has some of it."""
    tiles, clusters = tiles_of(columns, gated), blocks // 2
    return next((n for n in (8, 4, 2) if tiles * n <= clusters and depth // DEPTH >= 2 * n), 1)


def load(path: Path) -> ctypes.CDLL:
    return _typed(_HANDLER.load(path))


def _typed(loaded: ctypes.CDLL) -> ctypes.CDLL:
    loaded.jaxllm_wide_layers_sums.restype = ctypes.c_int64
    return loaded


class Kernel(NamedTuple):
    """A built library, the name it is registered under, and the blocks that run at one time."""

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
    """See api.decode_layers. A launch's arguments hold MOST_LAYERS layers; deeper models are as few launches as that
    allows, of about as many layers each."""
    refuse(x, layers, pages, head, scale, groups)
    rows, written = (page_table, kv_lens, cosines, sines), list[Pages]()
    kernel = kernel or ours()
    calls = -(-len(layers) // MOST_LAYERS)
    for number in range(calls):
        part = slice(len(layers) * number // calls, len(layers) * (number + 1) // calls)
        first = layers[part.start]
        qkv = first_qkv(x, first, eps)
        x, own = call(kernel, x, qkv, layers[part], pages[part], *rows, eps=eps, scale=scale, groups=groups)
        written += own
    return (x if head is None else product(rms_norm(x, head.norm, eps), head.table)), written


def refuse(
    x: jax.Array,
    layers: Sequence[LayerWeights],
    pages: Sequence[Pages],
    head: Head | None,
    scale: float,
    groups: tuple[tuple[int, ...], ...] = (),
) -> None:
    """NotImplementedError for what the kernel does not do."""
    refuse_groups(groups, head)
    (B, D), first, (_, K, page_size, H) = x.shape, layers[0], pages[0][0].shape
    NH, F = first.o.shape[1], first.down.shape[1]
    if B > MOST_ROWS:
        raise NotImplementedError(f"at most {MOST_ROWS} rows, got {B}")
    matrices = [each for layer in layers for each in layer.matrices] + ([] if head is None else [head.table])
    if any(isinstance(each, Few) for each in matrices):
        raise NotImplementedError("quantised weights")
    for array in jax.tree.leaves((x, tuple(layers), tuple(pages), head)):
        if array.dtype != jnp.bfloat16:
            raise NotImplementedError(f"everything must be bfloat16, got {array.dtype}")
    if HEAD != H or page_size < attention.TILE or page_size & (page_size - 1):
        raise NotImplementedError(f"heads of {HEAD}, pages of 16 tokens or a power of two more; got {H}, {page_size}")
    if scale <= 0:
        raise NotImplementedError(f"the running maximum assumes a positive scale, got {scale}")
    if NH // H % K or NH // H // K > MOST_GROUP:
        raise NotImplementedError(f"{NH // H} heads over {K}: at most {MOST_GROUP} queries a key")
    if D > WIDEST:
        raise NotImplementedError(f"a residual stream of at most {WIDEST} numbers, got {D}")
    wide = first.qkv.shape[0]
    if (most := 2 * max(tiles_of(F, gated=True), tiles_of(wide))) > MOST_TILES:
        raise NotImplementedError(f"{most} tiles of a product, at most {MOST_TILES}")
    for name, size in (("D", D), ("N * H", NH), ("F", F)):
        if size % DEPTH:
            raise NotImplementedError(f"{name} = {size} is no multiple of {DEPTH}")


def refuse_groups(groups: tuple[tuple[int, ...], ...], head: Head | None) -> None:
    """The same for devices that share layers."""
    if groups and jax.process_count() > 1:
        raise NotImplementedError("devices of several processes: their memory is not mapped here")
    if groups and len(groups[0]) > MOST_RANKS:
        raise NotImplementedError(f"{len(groups[0])} devices share layers, at most {MOST_RANKS}")
    if groups and head is not None:
        raise NotImplementedError("a head that devices share is not the kernel's")


def call(
    kernel: Kernel,
    x: jax.Array,
    qkv: jax.Array,
    layers: Sequence[LayerWeights],
    pages: Sequence[Pages],
    *rows: jax.Array,
    eps: float,
    scale: float,
    groups: tuple[tuple[int, ...], ...] = (),
) -> tuple[jax.Array, list[Pages]]:
    """The FFI call, with the library's word on how much memory it works in."""
    (B, D), first, (_, K, page_size, H) = x.shape, layers[0], pages[0][0].shape
    NH, F, width = first.o.shape[1], first.down.shape[1], rows[0].shape[1]
    products = ((D, NH, False), (F, D, True), (D, F, False), (qkv.shape[1], D, False))
    splits = [splits_for(*product, kernel.blocks) for product in products]
    sizes = dict(num_layers=len(layers), rows=B, blocks=kernel.blocks, D=D, F=F, heads=NH // H, kv_heads=K)
    sizes |= dict(page_size=page_size, width=width)
    work = kernel.library.jaxllm_wide_layers_work(*map(ctypes.c_int64, sizes.values()))
    operands, aliases = operands_of(x, rows, layers, pages, qkv)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((work,), jnp.uint8)]
    results += [jax.ShapeDtypeStruct(page.shape, page.dtype) for own in pages for page in own]
    attributes = {name: np.int64(value) for name, value in (*sizes.items(), ("has", optional_of(first)))}
    run = jax.ffi.ffi_call(kernel.target, results, input_output_aliases=aliases)
    numbers = dict(eps=np.float32(eps), scale=np.float32(scale))
    lists = dict(splits=np.asarray(splits, np.int64), groups=_numbers(kernel, groups, D))
    out, _, *written = run(*operands, **lists, **attributes, **numbers)
    return out, list(zip(written[::2], written[1::2], strict=True))


def optional_of(layer: LayerWeights) -> int:
    """Bits of the optional arrays that a layer has."""
    optional = (layer.qkv_bias, layer.o_bias, layer.qk_norms)
    return sum(1 << bit for bit, given in enumerate(optional) if given is not None)


def operands_of(
    x: jax.Array,
    rows: Sequence[jax.Array],
    layers: Sequence[LayerWeights],
    pages: Sequence[Pages],
    qkv: jax.Array | None = None,
) -> tuple[list[jax.Array], dict[int, int]]:
    """What the library takes, and which of it are results too: pages, from the third result on. `qkv`: the first
    layer's, where it comes ready and not its weights."""
    operands, aliases = [each for each in (x, qkv, *rows) if each is not None], dict[int, int]()
    for number, (layer, own) in enumerate(zip(layers, pages, strict=True)):
        ready = number == 0 and qkv is not None
        weights = (None if ready else layer.qkv, layer.o, layer.norms, layer.gate_up, layer.down)
        biases = (None if ready else layer.qkv_bias, layer.o_bias, layer.qk_norms)
        stored = [each.values if isinstance(each, Few) else each for each in weights]
        operands += [array for array in (*stored, *biases) if array is not None]
        aliases |= {len(operands) + i: 2 + 2 * number + i for i in range(2)}
        operands += own
    return operands, aliases


def _numbers(kernel: Kernel, groups: tuple[tuple[int, ...], ...], D: int) -> np.ndarray:
    """The library's numbers of groups of devices in rank order; memory for any number of rows is taken once."""
    if not groups:
        return np.zeros(0, np.int64)
    size = kernel.library.jaxllm_wide_layers_sums(*map(ctypes.c_int64, (MOST_ROWS, D, len(groups[0]))))
    return numbers_of(kernel.library.jaxllm_wide_layers_group, kernel.ordinal, groups, size)


def numbers_of(
    make: Callable[..., int], ordinal: Callable[[int], int], groups: tuple[tuple[int, ...], ...], size: int
) -> np.ndarray:
    """A library's numbers of groups of devices, which `make` gives, with so many bytes of memory on each."""

    def number(devices: tuple[int, ...]) -> int:
        ordinals = [ordinal(device) for device in devices]
        given, why = (ctypes.c_int * len(ordinals))(*ordinals), ctypes.create_string_buffer(256)
        found = make(given, len(ordinals), ctypes.c_int64(size), why, len(why))
        if found < 0:
            raise NotImplementedError(f"devices {list(devices)} cannot share memory: {why.value.decode()}")
        return found

    return np.array([number(group) for group in groups], np.int64)


def ours() -> Kernel:
    """The kernel for the present device, built on first use."""
    loaded = _typed(library())
    register(loaded)
    return Kernel(TARGET, loaded, getattr(jax.devices()[0], "core_count", 132) // 2 * 2)


def first_qkv(x: jax.Array, layer: LayerWeights, eps: float) -> jax.Array:
    """Of x[B, D]; that of every other layer is made behind the layer before."""
    qkv = product(rms_norm(x, layer.norms[0], eps), layer.qkv)
    return (qkv if layer.qkv_bias is None else qkv + layer.qkv_bias.astype(jnp.float32)).astype(x.dtype)


def product(x: jax.Array, weight: Weight) -> jax.Array:
    assert isinstance(weight, jax.Array), "refused"
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
