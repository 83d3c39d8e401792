"""Which GPUs this process was given, and how they are dealt out to processes it starts. Without JAX, which would take
their memory.

In: what the driver shows, and the variables by which CUDA and JAX are told what to use: no settings of ours. Out:
names of GPUs (indexes or UUIDs), and the environment of a child. Knows nothing of meshes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from jaxllm.config import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
TOOL_S = 20.0


def gpus_here() -> int:
    """What the driver shows of this machine; in a container without such a list its devices, or what the tool says."""
    listed = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    listed = listed or sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in Path("/dev").glob("nvidia*"))
    return listed or len(_told())


def _told() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        said = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=TOOL_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []  # a tool without a driver
    return [line for line in said.splitlines() if line.startswith("GPU ")]


def visible_gpus() -> list[str] | None:
    """The GPUs this process was given; None: all there are."""
    given = os.environ.get(VISIBLE)
    return None if given is None else [item.strip() for item in given.split(",") if item.strip()]


def runs_on_gpus() -> bool:
    """Whether JAX will: there are GPUs, they are not hidden from this process, and JAX is not told to use others."""
    platforms = os.environ.get("JAX_PLATFORMS", "").lower()
    if platforms and not any(name in platforms for name in ("cuda", "gpu")):
        return False
    return gpus_here() > 0 and visible_gpus() not in ([], ["-1"])


def gpu_slices(count: int, each: int, visible: list[str] | None) -> list[tuple[str, ...]]:
    """Which GPUs each of `count` processes sees."""
    have = visible if visible is not None else [str(i) for i in range(count * each)]
    if len(have) < count * each:
        raise ConfigError(
            f"fewer devices than the mesh: {count} processes x {each} GPUs = {count * each}, and {VISIBLE} "
            f"names {len(have)}"
        )
    return [tuple(have[i * each : (i + 1) * each]) for i in range(count)]


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment with changes, for a process it starts."""
    return {**os.environ, **changes}


def seeing(gpus: Sequence[str]) -> dict[str, str]:
    """The environment of a process that is to see only these."""
    return child_environment(**{VISIBLE: ",".join(gpus)})


def see_gpus(gpus: Sequence[str]) -> None:
    """What this process starts from now on sees only these."""
    os.environ[VISIBLE] = ",".join(gpus)
