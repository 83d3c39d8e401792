"""Compile every registered GPU kernel for sm_90a on a machine without a GPU, and say what the compiler made of it.

In: nothing, or names of ops on the command line. Out: one line a kernel (registers, spills, shared memory, tensor-core
and copy instructions); exit status 1 if a kernel fails to compile, spills beyond its allowance, serialises its WGMMAs,
or is registered for "gpu" without a case here. Needs a venv with jax[cuda13]; no driver, no GPU: a
textual device description stands in for the card.

    python -m tools.gate [op ...]

It cannot tell speed or numerics. `serialised` is ptxas's word for WGMMAs that lost their overlap.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "13.0.0"
  device_interconnect_info { active_links: 18 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 } device_description_str: "NVIDIA H200"
"""
# Plain XLA: nothing of ours to compile; jax_triton compiles with the Triton of the machine it runs on.
REFERENCES = ("reference", "reference_wide", "apart", "jax_triton")
OURS = (  # how the names of our kernels begin
    "paged_",
    "decode_chain",
    "matmul",
    "grouped_",
    "route",
    "quant_",
    "rope_",
    "norm_add",
    "sampling_",
)
SERIALISED = ("C7510", "C7511", "C7512", "C7513", "C7514")


@dataclass(frozen=True)
class Case:
    """One kernel at one shape: a function of arrays and the arrays' shapes and dtypes."""

    implementation: str
    shape: str
    function: Callable[..., Any]
    arrays: tuple[Any, ...]
    spill_allowance: int = 0  # bytes, where the disassembly shows (nearly) none in loops


@dataclass(frozen=True)
class Report:
    """What ptxas says of one kernel of ours, and what its PTX holds."""

    kernel: str
    registers: int
    spilled_bytes: int
    serialised: bool
    instructions: dict[str, int]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.instructions.items() if count)
        flaws = (f", SPILLS {self.spilled_bytes} B" if self.spilled_bytes else "") + (
            ", SERIALISED" if self.serialised else ""
        )
        return f"{self.kernel}: {self.registers} registers{flaws}; {counts or 'no tensor cores'}"

    def good(self, allowance: int) -> bool:
        return self.spilled_bytes <= allowance and not self.serialised


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


def paged_attention_decode_cases() -> Iterator[Case]:
    import jax.numpy as jnp

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

    attend = functools.partial(triton.paged_attention_decode, scale=0.1)
    for H, rows, pages, page_size in ((128, 32, 512, 16), (128, 256, 512, 64), (64, 32, 128, 64)):
        arrays = _paged(rows, rows, 32, 8, H, page_size, pages, jnp.bfloat16)
        yield Case("triton", f"H{H} B{rows} page {page_size}", attend, arrays)
    arrays = _paged(32, 32, 16, 8, 256, 64, 128, jnp.bfloat16)
    yield Case("triton", "H256 cap window", functools.partial(attend, soft_cap=50.0, window=4096), arrays)
    arrays = _paged(32, 32, 32, 8, 128, 64, 128, narrow)
    yield Case("triton", "H128 e4m3 pages", scaled(attend), (*arrays, scales))


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

    from pallas_kernels.paged_attention import triton

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


def matmul_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.matmul import mosaic_sm90

    for rows in (8, 64, 128):
        arrays = _array((rows, 4096), jnp.bfloat16), _array((6144, 4096), jnp.bfloat16)
        yield Case("mosaic_sm90", f"4096 to 6144 rows {rows}", lambda x, w: mosaic_sm90.matmul(x, w, None), arrays)


def decode_chain_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.decode_chain import mosaic_sm90
    from pallas_kernels.decode_chain.api import Dense, Following

    def layer(*a: Any) -> Any:
        return mosaic_sm90.decode_chain(a[0], a[1], Dense(*a[2:6]), Following(*a[6:8]), eps=1e-5)

    def last(*a: Any) -> Any:
        return mosaic_sm90.decode_chain(a[0], a[1], Dense(*a[2:6]), None, eps=1e-5)

    for T, D, O, F, Q, allowance in (  # noqa: E741
        (1, 4096, 4096, 14336, 6144, 0),
        (32, 4096, 4096, 14336, 6144, 0),
        (128, 4096, 4096, 14336, 6144, 0),
        (8, 1024, 2048, 3072, 4096, 0),
        (128, 1024, 2048, 3072, 4096, 256),  # at the ends of stages
    ):
        shapes = (T, D), (T, O), (D, O), (2, D), (2 * F, D), (D, F), (2, D), (Q, D)
        arrays = tuple(_array(shape, jnp.bfloat16) for shape in shapes)
        yield Case("mosaic_sm90", f"D{D} rows {T}", layer, arrays, allowance)
        if T == 1:
            yield Case("mosaic_sm90", f"D{D} rows {T} last", last, arrays[:6], allowance)


def grouped_matmul_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.grouped_matmul import mosaic_sm90

    D, F, E = 2048, 768, 128
    for N, tiles in ((1, 8), (8, 64), (9, 72), (32, 112), (16, 200), (64, 300), (128, 640)):
        for gated in (True, False):
            K, rows = (D, 2 * F) if gated else (F, D)
            product = functools.partial(mosaic_sm90.tiles_matmul, gated=gated)
            x = _array((1, N, K) if gated and N in (1, 8, 9, 32) else (tiles, -N // 8 * -8, K), jnp.bfloat16)
            arrays = x, _array((E, rows, K), jnp.bfloat16), _i32(tiles), _i32(1)
            yield Case("mosaic_sm90", f"{'gate and up' if gated else 'down'} N{N}", product, arrays)


def route_cases() -> Iterator[Case]:
    import jax.numpy as jnp

    from pallas_kernels.grouped_matmul import router

    for T, E, k in ((1, 128, 8), (64, 60, 4), (32, 8, 2)):
        route = functools.partial(router.route, k=k, norm_topk=True)
        yield Case("triton", f"{T} tokens, {k} of {E}", route, (_array((T, E), jnp.float32),))


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


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "paged_attention": paged_attention_cases,
    "paged_attention.decode": paged_attention_decode_cases,
    "paged_attention.decode_write": paged_attention_decode_write_cases,
    "paged_attention.verify": paged_attention_verify_cases,
    "decode_attention": decode_attention_cases,
    "decode_chain": decode_chain_cases,
    "matmul": matmul_cases,
    "grouped_matmul": grouped_matmul_cases,
    "grouped_matmul.route": route_cases,
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


@functools.cache
def sharding() -> Any:
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    device = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1").devices[0]
    return SingleDeviceSharding(device)


def compile_case(case: Case, dump: Path) -> list[Report]:
    """Compile for the H200 and report on each kernel of ours that the dump holds."""
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    for old in dump.rglob("*.ptx"):
        old.unlink()
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        arrays = jax.tree.map(functools.partial(placed, sharding()), case.arrays)
        jax.jit(case.function).lower(*arrays).compile()
    reports = (inspect(path) for path in sorted(dump.rglob("*.ptx")))
    return [report for report in reports if report is not None]


def placed(sharding: Any, array: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def inspect(ptx: Path) -> Report | None:
    """What ptxas says of one PTX file; None for kernels that XLA made."""
    text = ptx.read_text()
    entry = re.search(r"\.entry (\w+)", text)
    if entry is None or not entry.group(1).startswith(OURS):
        return None
    run = subprocess.run(
        [_ptxas(), "-arch=sm_90a", "-v", ptx, "-o", os.devnull], capture_output=True, text=True, check=True
    )
    registers = re.search(r"Used (\d+) registers", run.stderr)
    counts = {
        "wgmma": len(re.findall(r"wgmma\.mma_async", text)),
        "mma.sync": len(re.findall(r"mma\.sync", text)),
        "TMA": len(re.findall(r"cp\.async\.bulk\.tensor", text)),
        "cp.async": len(re.findall(r"cp\.async\.c[ag]", text)),
    }
    return Report(
        kernel=entry.group(1).removesuffix("_mosaic_gpu_kernel"),
        registers=int(registers.group(1)) if registers else 0,
        spilled_bytes=sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", run.stderr)),
        serialised=any(code in run.stderr for code in SERIALISED),
        instructions=counts,
    )


@functools.cache
def _ptxas() -> str:
    import nvidia  # type: ignore[import-not-found]

    for base in nvidia.__path__:
        for found in Path(base).glob("cu*/bin/ptxas"):
            return str(found)
    raise FileNotFoundError("no ptxas in the nvidia wheels: install jax[cuda13] in this venv")


def compile_source(source: Path) -> list[Report]:
    """The kernels of a CUDA source, by the compiler and flags that build it on a machine with a GPU."""
    import jax

    from pallas_kernels.compiled import NVCC

    with tempfile.TemporaryDirectory() as folder:
        target = [f"-I{jax.ffi.include_dir()}", "-Xptxas", "-v", "-o", f"{folder}/lib.so", str(source)]
        ran = subprocess.run([*NVCC, *target], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stderr[-500:])
    found = re.findall(
        r"Function properties for (\S+)\n.*?(\d+) bytes spill stores.*?Used (\d+) registers", ran.stderr, re.S
    )
    return [Report(name, int(registers), int(spilled), False, {}) for name, spilled, registers in found]


def missing_cases() -> list[str]:
    """Kernels registered for the GPU that no case compiles."""
    from pallas_kernels.dispatch import implementations

    covered = {(op, case.implementation) for op, cases in CASES.items() for case in cases()}
    return [
        f"{op}/{each.name}"
        for op in CASES
        for each in implementations(op, "gpu")
        if each.name not in REFERENCES and (op, each.name) not in covered
    ]


def main(ops: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="gate_") as directory:
        prepare(directory)
        failures = missing_cases()
        for name in failures:
            print(f"{name}: registered for the GPU but has no case in tools/gate.py")
        for op, cases in CASES.items():
            for case in cases() if not ops or op in ops else ():
                label = f"{op}/{case.implementation} {case.shape}"
                try:
                    reports = compile_case(case, Path(directory))
                except Exception as error:  # each kernel's failure is reported, and the rest still compiled
                    print(f"{label}: FAILED {type(error).__name__}: {str(error)[:500]}", flush=True)
                    failures.append(label)
                    continue
                for report in reports:
                    print(f"{label}: {report}", flush=True)
                failures += [label for report in reports if not report.good(case.spill_allowance)]
        for source in sorted(Path("pallas_kernels").rglob("*.cu")):
            if ops and source.parent.name not in ops:
                continue
            for report in compile_source(source):
                print(f"{source}: {report}", flush=True)
                failures += [] if report.good(16) else [str(source)]  # 16: nothing in a loop
    print(
        f"gate: {len(failures)} failures"
        if failures
        else "gate: every kernel compiles, none spills beyond its allowance"
    )
    return 1 if failures else 0


def prepare(directory: str) -> None:
    """XLA and Mosaic read these when JAX is first imported, so nothing here imports it earlier."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = f"--xla_dump_to={directory} --xla_dump_emitter_re=.* --xla_dump_hlo_pass_re=NONE --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"
    os.environ["MOSAIC_GPU_DUMP_TO"] = directory


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
