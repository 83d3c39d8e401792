"""Tensor parallelism on the GPUs of this machine: sums between devices alone, and decode steps of real shapes.

    python benchmarks/tensor_parallel.py sums 4            # psum and our kernel, chained in one program, us each
    python benchmarks/tensor_parallel.py long 4            # a million sums, all devices the same bits
    python benchmarks/tensor_parallel.py step 2 llama-3.1-8b 1,32,128 cuda     # ms a decode step at context 1k
    python benchmarks/tensor_parallel.py mosaic 2          # the Pallas prototype's kernels by the profiler

Times are the host's clock around a chain of dependent sums in one jit, long minus short chain, minus the same chain of
the scaling that keeps the values finite. Lines are also written as JSON to --out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import statistics
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.graph import compile as compiling
from jaxllm.graph.compile import Ladder
from jaxllm.graph.inputs import pack
from jaxllm.graph.kv_cache import KVCacheSpec, allocate
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import abstract
from jaxllm.graph.spread import Home, spread
from jaxllm.graph.steps import Graph
from jaxllm.graph.weights import random
from pallas_kernels.all_reduce import api, shots
from sharding.axes import MeshConfig
from sharding.mesh import stage_meshes

SIZES = (8 << 10, 16 << 10, 64 << 10, 256 << 10, 512 << 10, 1 << 20)
CONTEXT, PAGE = 1024, 64
rows: list[dict[str, Any]] = []


def say(**row: Any) -> None:
    rows.append(row)
    print(json.dumps(row), flush=True)


def mesh_of(n: int) -> jax.sharding.Mesh:
    return stage_meshes(MeshConfig(tensor=n))[0][0]


def groups_of(mesh: jax.sharding.Mesh) -> tuple[tuple[int, ...], ...]:
    return (tuple(device.id for device in mesh.devices.ravel()),)


def chain_seconds(mesh: jax.sharding.Mesh, one: Callable[[Any], Any], x: Any) -> tuple[float, float]:
    """(best, median) seconds of one link: `one` and a scaling."""
    n = mesh.devices.size

    def many(count: int) -> Callable[[Any], Any]:
        body = lambda x: functools.reduce(lambda a, _: one(a) * jnp.asarray(1 / n, a.dtype), range(count), x)  # noqa: E731
        return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("tensor"), out_specs=P("tensor"), check_vma=False))

    short, long = many(20), many(120)
    for f in (short, long):
        for _ in range(3):
            jax.block_until_ready(f(x))
    links = []
    for _ in range(9):
        seconds = []
        for f in (short, long):
            start = time.perf_counter()
            jax.block_until_ready(f(x))
            seconds.append(time.perf_counter() - start)
        links.append((seconds[1] - seconds[0]) / 100)
    return min(links), statistics.median(links)


def input_of(mesh: jax.sharding.Mesh, size_bytes: int, seed: int = 0) -> tuple[np.ndarray, jax.Array]:
    host = np.random.default_rng(seed).standard_normal((mesh.devices.size, size_bytes // 2)).astype(jnp.bfloat16)
    return host, jax.device_put(jnp.asarray(host), NamedSharding(mesh, P("tensor")))


def sums(n: int) -> None:
    mesh = mesh_of(n)
    ways = {
        "psum": functools.partial(api.all_reduce, axes="tensor", implementation="reference"),
        "cuda": functools.partial(api.all_reduce, axes="tensor", groups=groups_of(mesh), implementation="cuda"),
    }
    thresholds = dict(shots.ONE_SHOT_MOST_BYTES)
    for size in SIZES:
        host, x = input_of(mesh, size)
        want = host.astype(np.float64).sum(0)
        base = chain_seconds(mesh, lambda x: x, x)
        for name, way in ways.items():
            for shot in (1, 2) if name == "cuda" else (0,):
                shots.ONE_SHOT_MOST_BYTES[n] = (1 << 30) if shot == 1 else 0
                try:
                    once = jax.jit(
                        jax.shard_map(way, mesh=mesh, in_specs=P("tensor"), out_specs=P("tensor"), check_vma=False)
                    )
                    got = [np.asarray(jax.device_get(once(x))) for _ in range(3)]
                    same = all((g.view(np.uint16) == got[0].view(np.uint16)[0]).all() for g in got)
                    error = float(np.linalg.norm(got[0][0].astype(np.float64) - want) / np.linalg.norm(want))
                    best, median = chain_seconds(mesh, way, x)
                    say(
                        what="sum",
                        n=n,
                        way=name,
                        shot=shot,
                        kib=size / 1024,
                        us=round((best - base[0]) * 1e6, 2),
                        median_us=round((median - base[1]) * 1e6, 2),
                        same_bits=bool(same),
                        error=error,
                    )
                except NotImplementedError as why:
                    say(what="sum", n=n, way=name, shot=shot, kib=size / 1024, declined=str(why))
    shots.ONE_SHOT_MOST_BYTES.update(thresholds)


def long(n: int, count: int = 1_000_000) -> None:
    mesh, links = mesh_of(n), 20
    for size in (8 << 10, 256 << 10):
        _, x = input_of(mesh, size)
        way = functools.partial(api.all_reduce, axes="tensor", groups=groups_of(mesh), implementation="cuda")
        times = count if size < (64 << 10) else count // 10

        def body(x: Any, way: Any = way, times: int = times) -> Any:
            ten = lambda _, x: functools.reduce(lambda a, _: way(a) * jnp.asarray(1 / n, a.dtype), range(links), x)  # noqa: E731
            return jax.lax.fori_loop(0, times // links, ten, x)

        f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("tensor"), out_specs=P("tensor"), check_vma=False))
        start = time.perf_counter()
        out = np.asarray(jax.device_get(f(x)))
        say(
            what="long",
            n=n,
            kib=size / 1024,
            count=times,
            seconds=round(time.perf_counter() - start, 2),
            same_bits=bool((out.view(np.uint16) == out.view(np.uint16)[0]).all()),
            finite=bool(np.isfinite(out.astype(np.float32)).all()),
        )


def model_of(shape: str) -> ModelConfig:
    table = tomllib.loads((Path(__file__).parent.parent / "configs" / "models" / f"{shape}.toml").read_text())
    return ModelConfig.from_hf(table.get("config", table))


def step(n: int, shape: str, batches: tuple[int, ...], way: str, layers: int | None) -> None:
    model = model_of(shape)
    if layers:
        model = dataclasses.replace(model, num_layers=layers, windows=model.windows[:layers])
    config = MeshConfig(tensor=n)
    placement = (
        spread(model, stage_meshes(config)[0][0], config, {"psum": "reference", "cuda": "cuda"}[way]) if n > 1 else None
    )
    start = time.perf_counter()
    home = Home(model, jax.devices()[0], placement)
    params = jax.block_until_ready(random.dummy(model, jnp.bfloat16, 0, home.device, place=home.place))
    loaded = time.perf_counter() - start
    width = -(-(CONTEXT + 64) // PAGE)
    pages = max(batches) * width
    local = home.held
    spec = KVCacheSpec(model.num_layers, local.num_kv_heads, model.head_dim, PAGE, pages, jnp.dtype(jnp.bfloat16))
    kv = allocate(home.kv_shapes(spec))
    counts = jnp.zeros((max(batches) + 1, model.vocab_size), jnp.uint16, device=home.whole)
    graph = Graph(abstract(local, jnp.bfloat16)[0], model, PAGE, pages, placement=placement)
    start = time.perf_counter()
    ladder = Ladder(batches, (), width)
    jobs = [job for job in compiling.jobs_of(graph, ladder, params, kv, counts) if job.key[0] == "step"]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        lowered = [(job.key[1], job.lower()) for job in jobs]
        table = dict(zip([shape for shape, _ in lowered], pool.map(lambda item: item[1].compile(), lowered)))
    compiled = time.perf_counter() - start
    for batch in batches:
        shape_ = ladder.decode(batch)
        rows, lines = list(range(batch)), np.arange((max(batches) + 1) * width, dtype=np.int32)
        packed = pack(shape_, [5] * batch, [1] * batch, [CONTEXT] * batch, rows, rows, [], max(batches))
        page_table = jax.device_put(lines.reshape(-1, width) % pages, counts.sharding)
        last = jax.device_put(np.zeros(max(batches) + 1, np.int32), counts.sharding)
        logits = jnp.zeros((batch, model.vocab_size), jnp.float32, device=home.sharding("logits"))
        run = table[shape_]
        packed = jax.device_put(packed, counts.sharding)
        best, dispatch = 1e9, 1e9
        for _ in range(4):
            start = time.perf_counter()
            for _ in range(30):
                done = run(params, kv, page_table, last, logits, packed)
                kv, page_table, last, logits = done.kv, done.page_table, done.last_tokens, done.logits
            dispatch = min(dispatch, (time.perf_counter() - start) / 30)
            jax.block_until_ready(logits)
            best = min(best, (time.perf_counter() - start) / 30)
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
        per_token = 2 * model.num_layers * local.num_kv_heads * model.head_dim * 2
        floor = (held + batch * CONTEXT * per_token) / 4.3e12
        say(
            what="step",
            n=n,
            model=shape,
            batch=batch,
            way=way,
            ms=round(best * 1e3, 3),
            dispatch_ms=round(dispatch * 1e3, 3),
            floor_ms=round(floor * 1e3, 3),
            finite=bool(np.isfinite(np.asarray(logits)).all()),
            load_s=round(loaded, 1),
            compile_s=round(compiled, 1),
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("sums", "long", "step"))
    parser.add_argument("n", type=int)
    parser.add_argument("shape", nargs="?", default="llama-3.1-8b")
    parser.add_argument("batches", nargs="?", default="1,32,128")
    parser.add_argument("way", nargs="?", default="cuda")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.what == "step":
        step(args.n, args.shape, tuple(map(int, args.batches.split(","))), args.way, args.layers)
    else:
        {"sums": sums, "long": long}[args.what](args.n)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
