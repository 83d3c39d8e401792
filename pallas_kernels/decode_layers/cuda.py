"""decode_layers as one CUDA kernel (decode_layers.cu), called through XLA's FFI and captured in the step's CUDA graph.

In: arrays that api.py has checked. Out: results, the pages in place. Declines what the kernel does not do. ADR 0027
says why this is no Pallas kernel. How work is dealt out to the multiprocessors is decided here; it is part of the bits.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compiled import Handler
from pallas_kernels.decode_layers.api import Few, Head, LayerWeights, Pages, Weight

HERE = Path(__file__).parent
SOURCE, INCLUDES = (
    HERE / "decode_layers.cu",
    tuple(HERE / name for name in ("primitives.h", "emulator.h", "weights.h", "attention.h", "launch.h")),
)
TARGET = "jaxllm_decode_layers"
# A library for each kind of weights. None's name is in another's: a stored step is searched for them.
KINDS = {"bf16": Handler(SOURCE, INCLUDES, TARGET)} | {
    kind: Handler(SOURCE, INCLUDES, TARGET, (f"-DJAXLLM_WEIGHTS={constant}",), f"jaxllm_{kind}_decode_layers")
    for kind, constant in (("fp8", "kFp8"), ("int8", "kInt8"), ("int4", "kInt4"))
}
library, load, register = KINDS["bf16"].library, KINDS["bf16"].load, KINDS["bf16"].register
ROWS, UNIT, DEPTH, HEAD, MAX_LAYERS, MAX_GROUP, MAX_K, KEPT = 8, 16, 64, 128, 80, 8, 32, 8
INT4_GROUPS = 64, 128
F16_SCALES = 16  # launch.h: Has


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
) -> tuple[jax.Array, list[Pages]]:
    """See api.decode_layers."""
    refuse(x, layers, pages, head, groups)
    handler = KINDS[kind_of(layers[0].qkv)]
    handler.register(handler.library())
    device = jax.devices()[0]
    most = getattr(device, "core_count", 132)
    rows = page_table, kv_lens, cosines, sines
    return call(handler.target, handler.library(), most, x, layers, pages, *rows, eps=eps, scale=scale, head=head)


def kind_of(weight: Weight) -> str:
    return weight.kind if isinstance(weight, Few) else "bf16"


def refuse(
    x: jax.Array,
    layers: Sequence[LayerWeights],
    pages: Sequence[Pages],
    head: Head | None,
    groups: tuple[tuple[int, ...], ...] = (),
) -> None:
    """NotImplementedError for what the kernel does not do."""
    if groups:
        raise NotImplementedError("layers that devices share")
    (B, D), first, (_, K, page_size, H) = x.shape, layers[0], pages[0][0].shape
    NH, F = first.o.shape[1], first.down.shape[1]
    if B > ROWS:
        raise NotImplementedError(f"at most {ROWS} rows, got {B}")
    matrices = [each for layer in layers for each in layer.matrices] + ([] if head is None else [head.table])
    few = [each for each in matrices if isinstance(each, Few)]
    stored = {id(array) for each in few for array in (each.values, each.scale)}
    for array in jax.tree.leaves((x, tuple(layers), tuple(pages), head)):
        if id(array) not in stored and array.dtype != jnp.bfloat16:
            raise NotImplementedError(f"everything but quantised weights must be bfloat16, got {array.dtype}")
    if len(kinds := {kind_of(each): None for each in matrices}) > 1:
        raise NotImplementedError(f"weights of one kind, got {' and '.join(kinds)}")
    if not KINDS.keys() >= kinds.keys():
        raise NotImplementedError(f"{' and '.join(kinds)} weights")
    if "int4" in kinds:
        _refuse_scales(few)
    if HEAD != H or page_size % UNIT or 128 % page_size:
        raise NotImplementedError(f"heads of {HEAD} and pages of 16 to 128 tokens, got {H} and {page_size}")
    if NH // H % K or NH // H // K > MAX_GROUP or K > MAX_K:
        raise NotImplementedError(f"{NH // H} heads over {K}: at most {MAX_GROUP} queries a key, {MAX_K} kv heads")
    for name, size in (("D", D), ("N * H", NH), ("F", F)):
        deep = 2 * DEPTH if "int4" in kinds else DEPTH
        if size % deep:
            raise NotImplementedError(f"{name} = {size} is no multiple of {deep}")
    if len(layers) > MAX_LAYERS:
        raise NotImplementedError(f"{len(layers)} layers, at most {MAX_LAYERS}")


def _refuse_scales(weights: Sequence[Few]) -> None:
    for group in {each.group for each in weights}:
        if group not in INT4_GROUPS:
            raise NotImplementedError(f"int4 in groups of 64 or 128 inputs, got {group}")
    if len({each.group for each in weights}) > 1 or len({each.dtype for each in _stored(weights)[1]}) > 1:
        raise NotImplementedError("int4 with groups of several sizes, or scales of several dtypes")


@functools.cache
def programs_for(D: int, wide: int, NH: int, F: int, most: int, packed: bool = False) -> int:
    """How many blocks share the work best: the least bytes for the busiest one; among equals, the fewest blocks.

    Packed weights' rows of gate and up go in units of 16 each.
    """
    pair = 2 if packed else 1
    stages = ((wide, D, 1), (D, NH, 1), (2 * F, D, pair), (D, F, 1))

    def busiest(programs: int) -> int:
        return sum(-(-rows // UNIT // pair // programs) * pair * depth for rows, depth, pair in stages)

    fewest = -(-D // UNIT // KEPT)
    if fewest > most:
        raise NotImplementedError(f"D = {D} needs {fewest} multiprocessors, there are {most}")
    return min(range(fewest, most + 1), key=lambda programs: (busiest(programs), programs))


def call(
    target: str,
    loaded: ctypes.CDLL,
    most: int,
    x: jax.Array,
    layers: Sequence[LayerWeights],
    pages: Sequence[Pages],
    *rows: jax.Array,
    eps: float,
    scale: float,
    head: Head | None = None,
) -> tuple[jax.Array, list[Pages]]:
    """The FFI call, with the library's word on how much memory it works in."""
    (B, D), first, (_, K, page_size, H) = x.shape, layers[0], pages[0][0].shape
    NH, F, width = first.o.shape[1], first.down.shape[1], rows[0].shape[1]
    kind = kind_of(first.qkv)
    programs = programs_for(D, NH + 2 * K * H, NH, F, most, kind in ("int8", "int4"))
    sizes = dict(num_layers=len(layers), rows=B, programs=programs, D=D, F=F)
    sizes |= dict(heads=NH // H, kv_heads=K, page_size=page_size, width=width)
    optional = (first.qkv_bias, first.o_bias, first.qk_norms, head)
    has = sum(1 << bit for bit, given in enumerate(optional) if given is not None)
    work = jax.ShapeDtypeStruct((loaded.jaxllm_decode_layers_work(*map(ctypes.c_int64, sizes.values())),), jnp.uint8)
    operands, aliases = [x, *rows], dict[int, int]()
    for number, (layer, own) in enumerate(zip(layers, pages, strict=True)):
        (qkv, o, gate_up, down), scales = _stored(layer.matrices)
        weights = (qkv, o, layer.norms, gate_up, down)
        operands += [*weights, *(each for each in (layer.qkv_bias, layer.o_bias, layer.qk_norms) if each is not None)]
        operands += scales
        aliases |= {len(operands) + i: 2 + 2 * number + i for i in range(2)}
        operands += own
    vocabulary, result = 0, jax.ShapeDtypeStruct(x.shape, x.dtype)
    if head is not None:
        (table,), scales = _stored((head.table,))
        operands += [head.norm, table, *scales]
        vocabulary = head.table.shape[0]
        result = jax.ShapeDtypeStruct((B, vocabulary), jnp.float32)
    group = 0
    if isinstance(first.qkv, Few) and first.qkv.scale is not None and kind == "int4":
        group, has = first.qkv.group, has | F16_SCALES * (first.qkv.scale.dtype == jnp.float16)
    results = [result, work]
    results += [jax.ShapeDtypeStruct(page.shape, page.dtype) for own in pages for page in own]
    attributes: dict[str, Any] = {
        name: np.int64(value) for name, value in (*sizes.items(), ("V", vocabulary), ("group", group), ("has", has))
    }
    run = jax.ffi.ffi_call(target, results, input_output_aliases=aliases)
    out, _, *written = run(*operands, eps=np.float32(eps), scale=np.float32(scale), **attributes)
    return out, list(zip(written[::2], written[1::2], strict=True))


def _stored(weights: Sequence[Weight]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Values and scales; none of the latter where weights are plain or bf12."""
    values = [each.values if isinstance(each, Few) else each for each in weights]
    return values, [each.scale for each in weights if isinstance(each, Few) and each.scale is not None]
