"""What a run on the GPU machine takes along, made here: wheels that it lacks, and our CUDA libraries built.

In: a virtual environment with jaxllm (this Python) and nvcc, on the PATH or in `--cuda` (the folder nvidia/cu13 of a
venv with jax[cuda13]). Out: `.whl/`; `build/k/kernels.tar.xz`, each library under the name that `compiled.built` looks
for, and benchmarks/launches.cu as `launches`, `stamps` and `beside`. `device.sh` puts them where they belong.

    python -m benchmarks.jobs.carry --cuda VENV/lib/python3.12/site-packages/nvidia/cu13
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import jax

from jaxllm.graph.libraries import LIBRARIES
from pallas_kernels import compiled
from pallas_kernels.compiled import NVCC

LACKING = (
    "annotated-types",
    "httptools",
    "llguidance",
    "msgspec",
    "orjson",
    "pydantic",
    "pydantic-core",
    "pyzmq",
    "starlette",
    "typing-inspection",
    "uvicorn",
)
WHEELS, KERNELS = Path(".whl"), Path("build/k")


def main() -> None:
    """Both, and what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda", type=Path, help="a folder with bin/nvcc, include and lib")
    options = parser.parse_args()
    if options.cuda:
        os.environ["PATH"] = f"{options.cuda / 'bin'}:{os.environ['PATH']}"
        os.environ["NVCC_APPEND_FLAGS"] = f"-I{options.cuda / 'include'} -L{options.cuda / 'lib'}"
    wheels()
    libraries()


def wheels() -> None:
    """Those of this environment's versions."""
    wanted = [f"{name}=={version(name)}" for name in LACKING]
    line = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", "--no-deps", "-d", str(WHEELS)]
    subprocess.run([*line, *wanted], check=True)
    print(f"{len(wanted)} wheels in {WHEELS}")


def libraries() -> None:
    """All that a single GPU may call, one at a time: nvcc compiles the kernels of a file side by side.

    What the last archive has is not built again.
    """
    compiled.CACHE = folder = KERNELS / "kernels"
    packed = KERNELS / "kernels.tar.xz"
    if packed.exists() and not folder.exists():
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")
    paths = [Path(each.library()._name) for each in LIBRARIES.values()]
    include = f"-I{jax.ffi.include_dir()}"
    programs = {"launches": (), "stamps": ("-DJAXLLM_STAMPS",), "beside": ("-DJAXLLM_BESIDE",)}
    for name, flags in programs.items():
        line = [NVCC[0], "-O3", "-std=c++17", NVCC[3], NVCC[4], "-cudart", "static", include, *flags]
        subprocess.run([*line, "-o", str(folder / name), "benchmarks/launches.cu"], check=True)
    with tarfile.open(packed, "w:xz") as archive:
        for path in paths:
            for each in (path, path.with_name(f"{path.name}.sha256")):
                archive.add(each, each.name)
        for name in programs:
            archive.add(folder / name, name)
    shutil.rmtree(folder)  # the archive is what travels
    print(f"{len(paths)} libraries, {packed.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
