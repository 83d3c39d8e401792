"""What a cluster's scheduler says of this process: which of how many it is, and where the first one runs.

In: environment variables (SLURM; LeaderWorkerSet; a Kubernetes Indexed Job). Out: a Membership, or None where no
scheduler speaks. These variables are the scheduler's, not settings of ours (docs/adr/0020).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from jaxllm.config import ConfigError

PORT = 5790
SLURM_PORTS = 20_000, 10_000  # first, how many: jobs that share a node get other ones


@dataclass(frozen=True)
class Membership:
    source: str
    rank: int
    processes: int | None  # None: it does not say
    coordinator: str | None


def membership(environ: Mapping[str, str] | None = None) -> Membership | None:
    found = os.environ if environ is None else environ
    if "LWS_LEADER_ADDRESS" in found:
        return Membership(
            "LeaderWorkerSet",
            _integer(found, "LWS_WORKER_INDEX"),
            _integer(found, "LWS_GROUP_SIZE"),
            f"{found['LWS_LEADER_ADDRESS']}:{PORT}",
        )
    if "JOB_COMPLETION_INDEX" in found:
        return Membership("Kubernetes Indexed Job", _integer(found, "JOB_COMPLETION_INDEX"), None, None)
    if "SLURM_PROCID" in found and "SLURM_JOB_ID" in found:
        return _slurm(found)
    return None


def _slurm(found: Mapping[str, str]) -> Membership | None:
    tasks = _integer(found, "SLURM_NTASKS") if "SLURM_NTASKS" in found else _integer(found, "SLURM_STEP_NUM_TASKS")
    if tasks == 1:
        return None  # one task is one process, wherever it runs
    nodes = found.get("SLURM_STEP_NODELIST") or found.get("SLURM_JOB_NODELIST") or ""
    first, count = SLURM_PORTS
    port = first + _integer(found, "SLURM_JOB_ID") % (count // 2) * 2  # two ports a job
    return Membership("SLURM", _integer(found, "SLURM_PROCID"), tasks, f"{first_node(nodes)}:{port}")


def first_node(nodes: str) -> str:
    """Of a list such as gpu[03-07,9],login1."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\]([^,]*))?", nodes)
    if match is None:
        raise ConfigError(f"SLURM's list of nodes {nodes!r} is empty or unreadable")
    prefix, ranges, suffix = match[1], match[2], match[3] or ""
    return prefix if ranges is None else prefix + re.split(r"[-,]", ranges)[0] + suffix


def _integer(found: Mapping[str, str], name: str) -> int:
    value = found.get(name, "")
    if not value.isdigit():
        raise ConfigError(f"{name} = {value!r}: the scheduler should have set it to a number")
    return int(value)
