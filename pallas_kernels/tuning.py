"""Block sizes of kernels: pinned by the caller, else tuned for this device, else the kernel's own heuristic.

In: an implementation's name, a key that its room makes from shapes, the heuristic's choice (a frozen dataclass of
numbers). Out: that dataclass, with the fields that `tuned/<device>.json` gives for the key in place of the heuristic's.
The numbers are data; each file names the command that wrote it (`python -m benchmarks.tune`). A caller that pins blocks
passes them to the kernel and never asks here. This module knows no kernel and reads no clock.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax

DIRECTORY = Path(__file__).parent / "tuned"


def choose[Blocks](implementation: str, key: str, heuristic: Blocks, *, directory: Path = DIRECTORY) -> Blocks:
    """The heuristic's choice, with what was measured on this device in its place."""
    device = device_name()
    if device is None:
        return heuristic
    found = _table(directory / f"{device}.json").get(implementation, {}).get(key, {})
    return replaced(heuristic, found, f"{device}.json: {implementation}: {key}")


def replaced[Blocks](blocks: Blocks, changes: dict[str, Any], where: str) -> Blocks:
    """`blocks` with some fields changed; a field it does not have is an error that says where it stands."""
    if not dataclasses.is_dataclass(blocks) or isinstance(blocks, type):
        raise TypeError(f"blocks must be a dataclass instance, got {blocks!r}")
    known = {field.name for field in dataclasses.fields(blocks)}
    if unknown := changes.keys() - known:
        raise ValueError(f"{where}: unknown {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return dataclasses.replace(blocks, **changes)


def device_name() -> str | None:
    """The GPU's name as a file's, or None without one."""
    device = jax.devices()[0]
    return device.device_kind.lower().replace(" ", "_") if device.platform == "gpu" else None


def save(entries: dict[str, dict[str, dict[str, Any]]], device: str, command: str, directory: Path = DIRECTORY) -> Path:
    """Write entries[implementation][key] = changed fields, over what the device's file holds for the same keys."""
    path = directory / f"{device}.json"
    merged = {name: dict(keys) for name, keys in _table(path).items()}
    for name, keys in entries.items():
        merged.setdefault(name, {}).update(keys)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, "blocks": merged}, indent=1, sort_keys=True) + "\n")
    _table.cache_clear()
    return path


@functools.cache
def _table(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(path.read_text())["blocks"] if path.exists() else {}
