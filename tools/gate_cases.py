"""The kernels that tools/gate.py compiles: each registered one at the shapes and options that differ for a compiler.

In: nothing. Out: CASES, by op, functions of arrays and the arrays' shapes. Imports JAX only when a case is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One kernel at one shape: a function of arrays and the arrays' shapes and dtypes."""

    implementation: str
    shape: str
    function: Callable[..., Any]
    arrays: tuple[Any, ...]
    spill_allowance: int = 0  # bytes, where the disassembly shows (nearly) none in loops


def paged_attention_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.paged_attention import mosaic_sm90

    window, cap = {"window": 1024, "soft_cap": None}, {"window": None, "soft_cap": 50.0}
    plain = {"window": None, "soft_cap": None}
    for H, page_size, options, allowance in (
        (128, 64, plain, 0),
        (128, 16, plain, 0),
        (128, 128, plain, 0),
        (64, 64, plain, 0),
        (256, 64, plain, 160),  # scalars of a tile, saved across its loops
        (128, 64, window, 160),  # likewise
        (128, 64, cap, 0),
    ):
        blocks = mosaic_sm90.default_blocks(H)
        attend = functools.partial(mosaic_sm90.ragged_attention, scale=0.1, blocks=blocks, **options)
        label = " ".join(name for name, value in options.items() if value)
        arrays = (*_paged(8192, 4, 32, 8, H, page_size, 128, jnp.bfloat16), _i32(5))
        yield Case("mosaic_sm90", f"H{H} page {page_size} {label}".strip(), attend, arrays, allowance)
    heads, scales = _array((32,), jnp.float32), _array((8,), jnp.float32)
    for H, name, dtype, extras, allowance in (
        (80, "", jnp.bfloat16, {}, 0),
        (96, "", jnp.bfloat16, {}, 0),
        (128, "sinks lse", jnp.bfloat16, {"sinks": heads}, 16),  # scalars of a tile, saved across its loops
        (64, "sinks lse", jnp.bfloat16, {"sinks": heads}, 0),
        (64, "e4m3", jnp.float8_e4m3fn, {"k_scale": scales, "v_scale": scales}, 0),
        (96, "e4m3", jnp.float8_e4m3fn, {"k_scale": scales, "v_scale": scales}, 64),  # likewise, it seems
        (128, "e4m3", jnp.float8_e4m3fn, {"k_scale": scales, "v_scale": scales}, 72),
    ):
        names, blocks = tuple(extras), mosaic_sm90.default_blocks(H)

        def call(*arrays: Any, names: tuple[str, ...] = names, blocks: Any = blocks, lse: bool = "lse" in name) -> Any:
            extras = mosaic_sm90.Extras(**dict(zip(names, arrays[6:], strict=True)))
            options = {"scale": 0.1, "blocks": blocks, "extras": extras, "return_lse": lse, **plain}
            return mosaic_sm90.ragged_attention(*arrays[:6], **options)

        arrays = (*_paged(8192, 4, 32, 8, H, 64, 128, dtype), _i32(5), *extras.values())
        yield Case("mosaic_sm90", f"H{H} {name}".strip(), call, arrays, allowance)


def paged_attention_decode_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.decode_attention import cuda
    from pallas_kernels.paged_attention import decode_sm90, triton

    def scaled(attend: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arrays: attend(*arrays[:-1], k_scale=arrays[-1], v_scale=arrays[-1])

    narrow, scales = jnp.float8_e4m3fn, _array((8,), jnp.float32)
    attend = functools.partial(decode_sm90.paged_attention_decode, scale=0.1)
    for H, rows, pages, page_size in ((128, 32, 512, 16), (128, 32, 128, 64), (64, 8, 64, 128)):
        arrays = _paged(rows, rows, 32, 8, H, page_size, pages, jnp.bfloat16)
        yield Case("mosaic_sm90", f"H{H} B{rows} page {page_size}", attend, arrays)
    arrays = _paged(32, 32, 16, 8, 256, 64, 128, jnp.bfloat16)
    yield Case("mosaic_sm90", "H256 cap window", functools.partial(attend, soft_cap=50.0, window=4096), arrays)
    for H in (64, 128):
        arrays = _paged(32, 32, 32, 8, H, 64, 128, narrow)
        yield Case("mosaic_sm90", f"H{H} e4m3 pages", scaled(attend), (*arrays, scales))

    calls = {"cuda": cuda.paged_attention_decode, "cuda_many": cuda.many_decode}
    for name, N, rows, pages, page_size in (
        ("cuda", 32, 32, 512, 16),
        ("cuda", 64, 8, 64, 128),
        ("cuda_many", 32, 128, 32, 64),
    ):
        arrays = _paged(rows, rows, N, 8, 128, page_size, pages, jnp.bfloat16)
        attend = functools.partial(calls[name], scale=0.1)
        yield Case(name, f"H128 B{rows} N{N} page {page_size}", attend, arrays)

    attend = functools.partial(triton.paged_attention_decode, scale=0.1)
    for H, rows, pages, page_size in ((128, 32, 512, 16), (128, 256, 512, 64), (64, 32, 128, 64)):
        arrays = _paged(rows, rows, 32, 8, H, page_size, pages, jnp.bfloat16)
        yield Case("triton", f"H{H} B{rows} page {page_size}", attend, arrays)
    arrays = _paged(32, 32, 16, 8, 256, 64, 128, jnp.bfloat16)
    yield Case("triton", "H256 cap window", functools.partial(attend, soft_cap=50.0, window=4096), arrays)
    for H in (64, 128):
        arrays = _paged(32, 32, 32, 8, H, 64, 128, narrow)
        yield Case("triton", f"H{H} e4m3 pages", scaled(attend), (*arrays, scales))
    for H in (80, 96):
        yield Case("triton", f"H{H}", attend, _paged(32, 32, 32, 8, H, 64, 128, jnp.bfloat16))
    for name, kernel in (("triton", triton), ("mosaic_sm90", decode_sm90)):

        def sinking(*arrays: Any, kernel: Any = kernel) -> Any:
            return kernel.paged_attention_decode(*arrays[:-1], scale=0.1, sinks=arrays[-1], return_lse=True)

        arrays = *_paged(32, 32, 64, 8, 64, 64, 128, jnp.bfloat16), _array((64,), jnp.float32)
        yield Case(name, "H64 sinks lse", sinking, arrays)


def paged_attention_verify_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.paged_attention import decode_sm90

    q, *arrays = _paged(32, 32, 32, 8, 128, 16, 512, jnp.bfloat16)
    for queries in (2, 4):
        many = _array((32, queries, *q.shape[1:]), q.dtype)
        yield Case(
            "mosaic_sm90", f"{queries} queries", functools.partial(decode_sm90.verify, scale=0.1), (many, *arrays)
        )


def paged_attention_decode_write_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.paged_attention import decode_sm90

    q, *arrays = _paged(32, 32, 32, 8, 128, 16, 512, jnp.bfloat16)
    new = _array((32, 8, 128), jnp.bfloat16)
    yield Case("mosaic_sm90", "H128", functools.partial(decode_sm90.decode_write, scale=0.1), (q, new, new, *arrays))


def partial_attention_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.partial_attention import mosaic_sm90

    def starting(*arrays: Any) -> Any:
        return mosaic_sm90.partial_attention(*arrays[:-1], scale=0.1, query_starts=arrays[-1])

    for tokens, rows, H, starts in ((64, 64, 128, ()), (4096, 8, 128, (_i32(9),)), (4096, 8, 64, (_i32(9),))):
        q, *pages, _ = _paged(tokens, rows, 32, 8, H, 64, 128, jnp.bfloat16)
        attend = starting if starts else functools.partial(mosaic_sm90.partial_attention, scale=0.1)
        arrays = (q, *pages, _i32(tokens), _i32(tokens), *starts)
        allowance = 16 if starts and H == 128 else 0  # scalars of a tile, saved across its loops
        yield Case("mosaic_sm90", f"H{H} {'chunk' if starts else 'decode'}", attend, arrays, allowance)


def flash_attention_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.paged_attention import mosaic_sm90

    for H, options, allowance in (
        (128, {}, 0),
        (64, {}, 0),
        (80, {}, 0),
        (96, {}, 0),
        (256, {}, 160),  # scalars of a tile, saved across its loops
        (128, {"window": 1024}, 160),  # likewise
    ):
        k = _array((8192, 8, H), jnp.bfloat16)
        arrays = _array((8192, 32, H), jnp.bfloat16), k, k, _i32(5), _i32(5)
        attend = functools.partial(mosaic_sm90.flash_attention, scale=0.1, **options)
        yield Case("mosaic_sm90", " ".join((f"H{H}", *options)), attend, arrays, allowance)


def rope_page_write_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.rope_page_write import triton

    for tokens, N, K, norms, parts in ((8192, 32, 8, False, 0), (1024, 16, 8, True, 0), (32, 28, 4, False, 4)):
        pool = _array((4096, K, 16, 128), jnp.bfloat16)
        arrays = _heads(tokens, N, K, 128, norms=norms, parts=parts), pool, pool, _i32(tokens)
        label = f"{tokens} tokens" + (" norms" if norms else "") + (f" {parts} parts" if parts else "")
        yield Case("triton", label, triton.rope_page_write, arrays)


def decode_attention_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.decode_attention import cuda
    from pallas_kernels.paged_attention import triton

    calls = {"cuda": cuda.decode_heads, "cuda_many": cuda.many_heads}
    for name, rows, norms, parts in (("cuda_many", 256, False, 0), ("cuda", 32, True, 4)):
        _, *arrays = _paged(rows, rows, 32, 8, 128, 16, 512, jnp.bfloat16)
        heads = _heads(rows, 32, 8, 128, norms=norms, parts=parts)
        yield Case(name, f"H128 B{rows}", functools.partial(calls[name], scale=0.1), (heads, *arrays))
    attend = functools.partial(triton.decode_heads, scale=0.1)
    for rows, N, H, norms, parts in (
        (1, 32, 128, False, 0),
        (32, 16, 128, True, 0),
        (256, 32, 128, False, 0),
        (32, 32, 128, False, 4),
        (32, 32, 64, False, 0),
        (32, 16, 256, True, 0),
    ):
        _, *arrays = _paged(rows, rows, N, 8, H, 16, 512, jnp.bfloat16)
        label = f"H{H} B{rows}" + (" norms" if norms else "") + (f" {parts} parts" if parts else "")
        yield Case("triton", label, attend, (_heads(rows, N, 8, H, norms=norms, parts=parts), *arrays))


def add_norm_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.norm import triton

    def add_norm(x: Any, delta: Any, weights: Any) -> Any:
        return triton.add_norm(x, delta, weights, 1, eps=1e-5)

    for T, D, parts in ((1, 4096, 0), (1, 4096, 8), (32, 4096, 8), (32, 1024, 8)):
        delta = _array((parts, T, D), jnp.float32) if parts else _array((T, D), jnp.bfloat16)
        arrays = _array((T, D), jnp.bfloat16), delta, _array((2, D), jnp.bfloat16)
        yield Case("triton", f"{T} x {D} {parts} parts", add_norm, arrays)


def sampling_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.sampling import triton

    for B, V in ((256, 151936), (1, 128256)):
        row = _array((B,), jnp.float32)
        arrays = _array((B, V), jnp.float32), _array((B, 2), jnp.uint32), row, _i32(B), row, row, row
        yield Case("triton", f"{B} x {V}", triton.sample, arrays)


def sampling_adjusted_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.sampling import adjust

    B, V, row = 256, 151936, _array((256,), jnp.float32)
    logits, counts, words = _array((B, V), jnp.float32), _array((257, V), jnp.uint16), _array((B, 4748), jnp.uint32)
    arrays = logits, counts, _i32(B), words, _i32(B, 300), _array((B, 300), jnp.float32), row, row, row
    yield Case("triton", f"{B} x {V}", adjust.adjusted, arrays)


def sampling_greedy_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.sampling import adjust

    yield Case("triton", "256 x 151936", adjust.greedy, (_array((256, 151936), jnp.float32),))


def decode_chain_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.decode_chain import cuda
    from pallas_kernels.decode_chain.api import Dense, Following

    def layer(*a: Any) -> Any:
        return cuda.decode_chain(a[0], a[1], Dense(*a[2:6]), Following(*a[6:8]), eps=1e-5)

    def last(*a: Any) -> Any:
        return cuda.decode_chain(a[0], a[1], Dense(*a[2:6]), None, eps=1e-5)

    for T, D, O, F, Q in ((64, 4096, 4096, 14336, 6144), (256, 1024, 2048, 3072, 4096)):  # noqa: E741
        shapes = (T, D), (T, O), (D, O), (2, D), (2 * F, D), (D, F), (2, D), (Q, D)
        arrays = tuple(_array(shape, jnp.bfloat16) for shape in shapes)
        yield Case("cuda", f"D{D} rows {T}", layer, arrays)
        yield Case("cuda", f"D{D} rows {T} last", last, arrays[:6])


def gated_matmul_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.gated_matmul import cuda

    for T, D, F in ((128, 4096, 14336), (1024, 1024, 3072)):
        arrays = _array((T, D), jnp.bfloat16), _array((2 * F, D), jnp.bfloat16)
        yield Case("cuda", f"D{D} rows {T}", cuda.gated_matmul, arrays)


def grouped_matmul_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.grouped_matmul import mosaic_sm90, planner

    D, E = 2048, 128
    for T, N, shared in ((32, 32, True), (128, 16, False), (256, 32, False)):
        yield Case(
            "mosaic_sm90", f"plan T{T}", functools.partial(planner.tiles, E=E, N=N, shared=shared), (_i32(T, 8),)
        )
    shapes = [(N, tiles, 768) for N, tiles in ((1, 8), (8, 64), (9, 72), (32, 112), (16, 200), (64, 300), (128, 640))]
    for N, tiles, F in (*shapes, (128, 640, 192)):
        for gated in (True, False):
            K, rows = (D, 2 * F) if gated else (F, D)
            product = functools.partial(mosaic_sm90.tiles_matmul, gated=gated)
            x = _array((1, N, K) if gated and N in (1, 8, 9, 32) else (tiles, -N // 8 * -8, K), jnp.bfloat16)
            arrays = x, _array((E, rows, K), jnp.bfloat16), _i32(tiles), _i32(1)
            yield Case("mosaic_sm90", f"{'gate and up' if gated else 'down'} N{N} F{F}", product, arrays)


def route_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.grouped_matmul import router

    for T, E, k in ((1, 128, 8), (64, 60, 4), (32, 8, 2)):
        route = functools.partial(router.route, k=k, norm_topk=True)
        yield Case("triton", f"{T} tokens, {k} of {E}", route, (_array((T, E), jnp.float32),))


def plan_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.grouped_matmul import planner

    for T, E, k, N, shared in (
        (1, 128, 8, 8, True),
        (32, 128, 8, 32, True),
        (128, 128, 8, 16, False),
        (200, 60, 4, 32, False),
    ):
        plan = functools.partial(planner.tiles, E=E, N=N, shared=shared)
        yield Case("triton", f"{T} tokens, {k} of {E}", plan, (_array((T, k), jnp.int32),))


def quant_matmul_cases(kind: str) -> Iterator[Case]:
    """A few rows of x, a wide batch and a prefill, on layers of an 8B model."""
    import jax.numpy as jnp

    from pallas_kernels.quant_matmul import mosaic_sm90, packing, widen_sm90

    functions = {"int8": mosaic_sm90.int8_matmul, "int4": mosaic_sm90.int4_matmul, "fp8": mosaic_sm90.fp8_matmul}
    groups = {"int8": (None,), "int4": (128, 64, 32), "fp8": (None, 128)}[kind]
    widening = {"int8": widen_sm90.int8_matmul, "int4": widen_sm90.int4_matmul}
    for M, K, N in ((8, 4096, 28672), (64, 14336, 4096), (512, 4096, 6144)):
        for group in groups:
            dtype = jnp.bfloat16 if kind == "int4" else jnp.float32
            scale = _array((N,) if group is None else (K // group, N), dtype)
            if kind == "fp8":
                weight = _array((N, K), jnp.float8_e4m3fn)
            else:
                rows = packing.rows_of(4 if kind == "int4" else 8)
                weight = _array((N // packing.TILE, K // packing.TILE, rows, packing.LANES), jnp.int32)
            arrays = _array((M, K), jnp.bfloat16), weight, scale
            call = functools.partial(functions[kind], out_dtype=jnp.bfloat16)
            label = f"{M} x {K} x {N}" + (f" group {group}" if group else "")
            allowance = 24 if kind == "int4" and M == 64 and group != 128 else 0  # scalars of a unit
            yield Case("mosaic_sm90", label, call, arrays, allowance)
            if kind == "int4":
                yield Case("mosaic_sm90", f"{label} zeros", call, (*arrays, scale), allowance)
            if kind != "fp8" and M == 512:
                call = functools.partial(widening[kind], out_dtype=jnp.bfloat16)
                yield Case("widen_sm90", label, call, arrays)


# Bytes that a function of a CUDA source may spill, where it is not next to none: numbers kept over calls and around
# loops. Of attention by mma inside wide.cu, whose kernel does everything; only devices that share layers run it.
# Of decode_layers.cu for int4; for other kinds it spills nothing.
SOURCE_ALLOWANCES = {"wide.cu": 704, "decode_layers.cu": 28}

CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "paged_attention": paged_attention_cases,
    "paged_attention.decode": paged_attention_decode_cases,
    "paged_attention.decode_write": paged_attention_decode_write_cases,
    "paged_attention.verify": paged_attention_verify_cases,
    "partial_attention": partial_attention_cases,
    "flash_attention": flash_attention_cases,
    "decode_attention": decode_attention_cases,
    "decode_chain": decode_chain_cases,
    "gated_matmul": gated_matmul_cases,
    "grouped_matmul": grouped_matmul_cases,
    "grouped_matmul.route": route_cases,
    "grouped_matmul.plan": plan_cases,
    "norm.add": add_norm_cases,
    "sampling": sampling_cases,
    "sampling.adjusted": sampling_adjusted_cases,
    "sampling.greedy": sampling_greedy_cases,
    "rope_page_write": rope_page_write_cases,
    "quant_matmul.int8": functools.partial(quant_matmul_cases, "int8"),
    "quant_matmul.int4": functools.partial(quant_matmul_cases, "int4"),
    "quant_matmul.fp8": functools.partial(quant_matmul_cases, "fp8"),
}


def _array(shape: tuple[int, ...], dtype: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct(shape, dtype)


def _i32(*shape: int) -> Any:
    import jax.numpy as jnp

    return _array(shape, jnp.int32)


def _paged(tokens: int, rows: int, N: int, K: int, H: int, page_size: int, width: int, dtype: Any) -> tuple[Any, ...]:
    import jax.numpy as jnp

    pool = _array((4096, K, page_size, H), dtype)
    return _array((tokens, N, H), jnp.bfloat16), pool, pool, _i32(rows, width), _i32(rows)


def _heads(tokens: int, N: int, K: int, H: int, *, norms: bool, parts: int) -> Any:
    import jax.numpy as jnp

    from pallas_kernels.rope_page_write.heads import Heads

    rows, bf16, f32 = (N + 2 * K) * H, jnp.bfloat16, jnp.float32
    qkv = _array((parts, tokens, rows), f32) if parts else _array((tokens, rows), bf16)
    angle, weights = _array((tokens, H // 2), f32), _array((2, H), bf16) if norms else None
    return Heads(qkv, angle, angle, weights, _array((rows,), bf16) if parts else None, K=K, dtype=bf16)
