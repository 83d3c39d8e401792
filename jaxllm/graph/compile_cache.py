"""The persistent compile cache: a folder of compiled executables, each checked before JAX may load it.

In: a directory, which may be shipped with a model. Out: JAX's cache switched on there, and a CacheReport. JAX itself
can load a damaged entry without noticing (with zstandard installed, most single flipped bits gave a wrong result in
silence), so every file gets a sha256 beside it once it is whole; one whose sum is missing or wrong is removed before
use and compiled again. JAX keys entries by program, flags, versions and device. A cache that cannot be used costs
time, never an answer.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

log = logging.getLogger(__name__)
SUM_SUFFIX = ".sha256"


@dataclass(frozen=True)
class CacheReport:
    entries: int = 0
    size_bytes: int = 0
    removed: int = 0  # damaged, or never sealed
    usable: bool = True

    def __str__(self) -> str:
        removed = f", {self.removed} removed that were not whole" if self.removed else ""
        return f"{self.entries} compiled files, {self.size_bytes / 2**20:.1f} MiB{removed}"


def open_cache(directory: Path) -> CacheReport:
    """Check every entry, then let JAX use the folder. What it adds is trusted later only if `seal` is called."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        report = _verify(directory)
    except OSError as error:
        log.warning("the compile cache %s is not used: %s", directory, error)
        return CacheReport(usable=False)
    if report.removed:
        log.warning("compile cache %s: %s", directory, report)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # every executable is worth keeping here
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return report


def seal(directory: Path) -> int:
    """Write the sum of each entry that has none: called when this process has written its own. Returns how many."""
    sealed = 0
    try:
        for entry in _entries(directory):
            if not _sum_path(entry).exists():
                temporary = entry.with_name(f"{entry.name}.{os.getpid()}{SUM_SUFFIX}.new")
                temporary.write_text(_sum(entry))
                temporary.replace(_sum_path(entry))  # a sum is there whole or not at all
                sealed += 1
    except OSError as error:  # read-only or full: the next start compiles again what has no sum
        log.warning("the compile cache %s cannot be sealed: %s", directory, error)
    return sealed


def _verify(directory: Path) -> CacheReport:
    entries = list(_entries(directory))
    with concurrent.futures.ThreadPoolExecutor() as pool:  # sha256 lets go of the lock
        whole = list(pool.map(_whole, entries))
    removed = size = 0
    for entry, good in zip(entries, whole, strict=True):
        if good:
            size += entry.stat().st_size
        else:
            removed += 1
            entry.unlink(missing_ok=True)
            _sum_path(entry).unlink(missing_ok=True)
    return CacheReport(len(entries) - removed, size, removed)


def _whole(entry: Path) -> bool:
    try:
        return _sum_path(entry).read_text() == _sum(entry)
    except FileNotFoundError:
        return False


def _entries(directory: Path) -> Iterator[Path]:
    """JAX's executables and, in folders beside them, XLA's autotuning results; no sums, no access times."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.name.endswith((SUM_SUFFIX, ".new", "-atime", ".lock")):
            yield path


def _sum_path(entry: Path) -> Path:
    return entry.with_name(entry.name + SUM_SUFFIX)


def _sum(entry: Path) -> str:
    with entry.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
