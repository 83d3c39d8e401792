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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.gate_cases import CASES, SOURCE_ALLOWANCES, Case

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
        none = "no tensor cores" if self.instructions else "by nvcc"
        return f"{self.kernel}: {self.registers} registers{flaws}; {counts or none}"

    def good(self, allowance: int) -> bool:
        return self.spilled_bytes <= allowance and not self.serialised


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


def flags_of(source: Path) -> list[tuple[str, ...]]:
    """Of each library that is made of a CUDA source."""
    from pallas_kernels.decode_layers.cuda import KINDS

    return [each.flags for each in KINDS.values() if each.source.samefile(source)] or [()]


def compile_source(source: Path, flags: tuple[str, ...]) -> list[Report]:
    """The kernels of a CUDA source, by the compiler and flags that build it on a machine with a GPU."""
    import jax

    from pallas_kernels.compiled import NVCC

    with tempfile.TemporaryDirectory() as folder:
        target = [f"-I{jax.ffi.include_dir()}", "-Xptxas", "-v", "-o", f"{folder}/lib.so", str(source)]
        ran = subprocess.run([*NVCC, *flags, *target], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stderr[-500:])
    # Functions that are not inlined have no registers of their own.
    line = r"Function properties for (\S+)\n.*?(\d+) bytes spill stores.*\n(?:ptxas info\s*: Used (\d+) registers)?"
    found = re.findall(line, ran.stderr)
    return [Report(name, int(registers or 0), int(spilled), False, {}) for name, spilled, registers in found]


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
            print(f"{name}: registered for the GPU but has no case in tools/gate_cases.py")
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
            for flags in flags_of(source):
                for report in compile_source(source, flags):
                    print(f"{' '.join((str(source), *flags))}: {report}", flush=True)
                    failures += [] if report.good(SOURCE_ALLOWANCES.get(source.name, 16)) else [str(source)]
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
