"""C++ and CUDA sources as shared libraries, compiled on first use and kept in the user's cache.

In: a source file of a room, what it includes of its own, a compiler. Out: the path of a library made from exactly these
bytes for this jaxlib. NotImplementedError says why there is none: dispatch then goes on to the next implementation.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jaxlib.version

CACHE = Path.home() / ".cache" / "jaxllm" / "kernels"
# XLA's own headers make some noise.
NVCC = (
    "nvcc",
    "-O3",
    "-std=c++17",
    "-gencode=arch=compute_90a,code=sm_90a",
    "--split-compile=0",  # kernels of a file side by side, the same machine code: wide.cu 41 -> 28 s on two cores
    "--shared",
    "-Xcompiler",
    "-fPIC",
    "-diag-suppress",
    "940,2473",
)
# Without glibc's check of longjmp, which does not know the emulator's stacks.
GXX = ("g++", "-O2", "-std=c++17", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-w", "-x", "c++")
_LOCK = threading.Lock()


def once[**P, R](make: Callable[P, R]) -> Callable[P, R]:
    """functools.cache that makes each thing once, and different ones at one time: several threads trace and prepare."""
    kept, locks = functools.cache(make), dict[object, threading.RLock]()

    @functools.wraps(make)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _LOCK:
            own = locks.setdefault((args, tuple(kwargs.items())), threading.RLock())
        with own:
            return kept(*args, **kwargs)

    return run


def prepare(libraries: Iterable[Callable[[], object]]) -> None:
    """Begins to build them all, each in a thread of its own; whoever calls one meanwhile waits for that build.

    `libraries` are made by `once`. What cannot be built is said to who calls it, not here.
    """

    def quietly(library: Callable[[], object]) -> None:
        with contextlib.suppress(NotImplementedError, OSError):
            library()

    for each in libraries:
        threading.Thread(target=quietly, args=(each,), daemon=True).start()


def built(
    source: Path, includes: Sequence[Path] = (), command: Sequence[str] = NVCC, directory: Path | None = None
) -> Path:
    """The library; compiled now if nobody did it before. `includes` are what `source` includes of its own."""
    directory = CACHE if directory is None else directory
    parts = [*(path.read_bytes() for path in (source, *includes)), jaxlib.version.__version__.encode()]
    key = hashlib.sha256(b"\0".join([*parts, sys.platform.encode(), " ".join(command).encode()])).hexdigest()[:16]
    target = directory / f"{source.stem}-{key}.so"
    if target.exists():
        return target
    compiler = shutil.which(command[0]) or shutil.which(f"/usr/local/cuda/bin/{command[0]}")
    if compiler is None:
        raise NotImplementedError(f"{command[0]} is not on this machine and {target} is not there")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = target.with_suffix(f".{os.getpid()}.partial")
    line = [compiler, *command[1:], f"-I{jax.ffi.include_dir()}", "-o", str(partial), str(source)]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    if result.returncode:
        raise NotImplementedError(f"{command[0]} failed on {source.name}: {result.stderr.strip()[-400:]}")
    # The folder may lie in a compile cache, which trusts only what has a sum: graph/compile_cache.py.
    total = target.with_name(f"{target.name}.sha256")
    total.with_suffix(f".{os.getpid()}.new").write_text(hashlib.sha256(partial.read_bytes()).hexdigest())
    partial.replace(target)  # another process may have been first: both are the same
    total.with_suffix(f".{os.getpid()}.new").replace(total)
    return target


@dataclass(frozen=True)
class Handler:
    """A source's entry for XLA's FFI, `symbol`; `{symbol}_work` says how many bytes of memory a call works in.

    With other `flags` the same source is another library, whose calls need a `name` of their own.
    """

    source: Path
    includes: tuple[Path, ...]
    symbol: str
    flags: tuple[str, ...] = ()
    name: str | None = None

    @property
    def target(self) -> str:
        """What XLA knows it as."""
        return self.name or self.symbol

    @once
    def library(self) -> ctypes.CDLL:
        return self.load(built(self.source, self.includes, (*NVCC, *self.flags)))

    def load(self, path: Path) -> ctypes.CDLL:
        loaded = ctypes.cdll.LoadLibrary(str(path))
        getattr(loaded, f"{self.symbol}_work").restype = ctypes.c_int64
        return loaded

    @once
    def register(self, loaded: ctypes.CDLL, target: str | None = None, platform: str = "CUDA") -> None:
        pointer = jax.ffi.pycapsule(getattr(loaded, self.symbol))
        jax.ffi.register_ffi_target(target or self.target, pointer, platform=platform)
