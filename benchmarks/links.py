"""Rates between the devices of this machine: an all-reduce and a send to the next device, by size.

    python benchmarks/links.py --devices 2 --out benchmarks/results/links_h200.json

Each figure is one operation out of a chain of `--chain` in one executable, so that no host time is in it; the median of
`--reps`. The smallest size's all-reduce is the planner's `all_reduce_s`, the largest send's rate its `bytes_per_s`
(tools/calibrate_planner.py, LINKS). Arrays are checked before they are timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SIZES = (1 << 14, 1 << 18, 1 << 22, 1 << 26)  # bytes a device


def chain(what: str, count: int, devices: int, x: jax.Array) -> jax.Array:
    """One device's part of `count` operations, each of which needs the one before."""
    ring = [(i, (i + 1) % devices) for i in range(devices)]
    for _ in range(count):
        if what == "all_reduce":
            x = jax.lax.psum(x, "d") / jnp.asarray(devices, x.dtype)
        else:
            x = jax.lax.ppermute(x, "d", ring)
    return x


def measure(what: str, size: int, mesh: Mesh, count: int, reps: int) -> float:
    """Seconds of one operation."""
    devices = mesh.devices.size
    spread = NamedSharding(mesh, P("d"))
    whole = np.repeat(np.arange(devices), size // 2).astype(jnp.bfloat16)
    x = jax.device_put(whole, spread)
    function = functools.partial(chain, what, count, devices)
    run = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False))
    found = np.asarray(run(x)).astype(np.float32).reshape(devices, -1)
    expected = (devices - 1) / 2 if what == "all_reduce" else (np.arange(devices) - count) % devices
    assert np.allclose(found.T, expected, atol=0.02 * devices), f"{what} of {size} bytes is wrong"
    times = []
    for _ in range(reps):
        start = time.perf_counter()
        run(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=len(jax.devices()))
    parser.add_argument("--chain", type=int, default=64)
    parser.add_argument("--reps", type=int, default=20)
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="bytes a device")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if len(jax.devices()) < given.devices or given.devices < 2:
        sys.exit(f"error: {given.devices} devices are asked for and {len(jax.devices())} are here; at least 2")
    mesh = Mesh(np.array(jax.devices()[: given.devices]), ("d",))
    rows: list[dict[str, Any]] = []
    for what in ("all_reduce", "send"):
        for size in (each for each in SIZES if each <= given.largest):
            seconds = measure(what, size, mesh, given.chain, given.reps)
            rate = round(size / seconds / 1e9, 1)
            rows.append({"what": what, "bytes": size, "us": round(seconds * 1e6, 2), "gb_per_s": rate})
            print(rows[-1], flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "command": f"python benchmarks/links.py --devices {given.devices} --chain {given.chain} --reps {given.reps}",
        "commit": commit.stdout.strip(),
        "device": f"{given.devices} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "rows": rows,
    }
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
