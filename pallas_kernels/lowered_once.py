"""A Mosaic GPU kernel lowered once and called on arrays of many lengths.

Mosaic writes the shapes of a kernel's operands into its module, so that a kernel of each length is lowered by itself:
three seconds of Python, most of them layout inference, eight times in a start of the engine; and one of the same shapes
is lowered again for every executable that has it. What the device gets are addresses. So a kernel that never asks how
long an array is, and neither reads nor writes past the arrays it is given, can be lowered for the longest and called on
shorter ones; its maps for the copy engine then clip nothing.

In: a function that calls such a kernel and nothing else, what it is lowered for, shorter arrays. Out: its results.
Knows no kernel.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, get_abstract_mesh, use_abstract_mesh
from jaxlib.mlir import ir

TARGET = "mosaic_gpu_v2"


def call_shorter(
    call: Callable[..., Any],  # the same object for the same kernel
    arrays: Sequence[jax.Array | None],
    lengths: Mapping[int, int],  # by place among the arrays: of the longest that `call` is lowered for; else their own
    results: Sequence[jax.ShapeDtypeStruct],
) -> list[jax.Array]:
    """`call(*arrays)`. Raises ValueError if that is more, or less, than one Mosaic kernel."""
    facts = tuple(
        None if array is None else ((lengths.get(i, array.shape[0]), *array.shape[1:]), array.dtype)
        for i, array in enumerate(arrays)
    )
    given = [array for array in arrays if array is not None]
    attributes, operands = _lowered(call, facts, get_abstract_mesh().abstract_device)
    if operands != len(given):
        raise ValueError(f"the kernel takes {operands} operands, got {len(given)}")
    return list(jax.ffi.ffi_call(TARGET, list(results))(*given, **attributes))


@functools.cache
def _lowered(call: Callable[..., Any], facts: tuple[Any, ...], device: Any) -> tuple[dict[str, Any], int]:
    """The attributes of the kernel's custom call, and of how many operands it is."""
    # In a thread of its own, which knows nothing of the mesh or the transformations that this call stands in.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_lower, call, facts, device).result()


def _lower(call: Callable[..., Any], facts: tuple[Any, ...], device: Any) -> tuple[dict[str, Any], int]:
    mesh = None if device is None else AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    arguments = [None if each is None else jax.ShapeDtypeStruct(*each) for each in facts]
    with contextlib.nullcontext() if mesh is None else use_abstract_mesh(mesh):
        lowered = jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",))
    found: list[Any] = []

    def look(operation: Any) -> Any:
        if operation.name == "stablehlo.custom_call":
            found.append(operation)
        return ir.WalkResult.ADVANCE

    module: Any = lowered.compiler_ir("stablehlo")
    module.operation.walk(look)
    names = [ir.StringAttr(each.attributes["call_target_name"]).value for each in found]
    if names != [TARGET]:
        raise ValueError(f"must be one {TARGET}, got {names or 'no custom call'}")
    config = ir.DictAttr(found[0].attributes["mhlo.backend_config"])
    return {each.name: _value(each.attr) for each in config}, len(found[0].operands)


def _value(attribute: Any) -> bytes | bool:
    return attribute.value if isinstance(attribute, ir.BoolAttr) else attribute.value_bytes
