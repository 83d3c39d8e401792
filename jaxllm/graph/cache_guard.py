"""Keeps a persistent compile cache from doing harm: a flipped bit in an entry can load and compute wrong numbers.

In: the cache's directory. Out: a directory inside it that may be used, or None and one warning. Every entry has a
SHA-256 beside it, written once compiling is done; at a start, entries without one or that differ from it are deleted.
Serving never fails because of a cache: one that is read-only, full, someone else's or shared with another process costs
time only. Knows nothing of what is compiled.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

ENTRY, SUM = "-cache", ".sha256"


def open_cache(directory: Path, key: str) -> Path | None:
    """The part of a cache for `key` (who compiled: versions, driver), its entries checked. None: go without."""
    home = directory / re.sub(r"[^A-Za-z0-9._-]+", "_", key)[:120]
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        about = home.stat()
        if about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(0, "others may write it")
        deleted = sum(not _check(entry) for entry in _entries(home))
        probe = home / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        log.warning("the compile cache %s is not used: %s", home, error.strerror or error)
        return None
    if deleted:
        log.warning("the compile cache %s held %d entries that could not be trusted; they are gone", home, deleted)
    return home


def _entries(home: Path) -> Iterator[Path]:
    yield from (path for path in home.iterdir() if path.name.endswith(ENTRY))


def _sum_file(entry: Path) -> Path:
    return entry.with_name(entry.name + SUM)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(entry: Path) -> bool:
    """Whether the entry is what was written; it is deleted if not. OSError when it cannot be deleted."""
    try:
        if _digest(entry) == _sum_file(entry).read_text("ascii").strip():
            return True
    except FileNotFoundError:
        pass  # no sum yet, or another process deleted the entry
    except (OSError, ValueError) as error:
        log.debug("%s: %s", entry.name, error)
    entry.unlink(missing_ok=True)
    _sum_file(entry).unlink(missing_ok=True)
    return False


def seal(home: Path) -> int:
    """Writes the sums of entries that have none; how many. A full disk leaves them without, to be compiled again."""
    count = 0
    try:
        for entry in _entries(home):
            if not _sum_file(entry).exists():
                part = entry.with_name(f".{entry.name}-{os.getpid()}")
                part.write_text(_digest(entry) + "\n", "ascii")
                part.replace(_sum_file(entry))
                count += 1
    except OSError as error:
        log.warning("the compile cache %s cannot be sealed: %s", home, error.strerror or error)
    return count
