"""One GPU call: quantised products against float64, then tile choices against bf16, layer by layer. Prints and stops in
time.

python -m benchmarks.quant_matmul --out DIR [--seconds 140] [--part check,small,variants,large]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels import seconds
from pallas_kernels.quant_matmul import api, mosaic_sm90, packing, reference, widen_sm90
from pallas_kernels.quant_matmul.specs import LAYERS, QUANT_MATMUL_SPECS, QuantMatmulSpec

CONTRACT = (((1,), (1,)), ((), ()))
START = time.perf_counter()
CALLS = {"int8": api.int8_matmul, "int4": api.int4_matmul, "fp8": api.fp8_matmul}


def bf16(x: Any, w: Any) -> Any:
    return jax.lax.dot_general(x, w, CONTRACT, preferred_element_type=jnp.bfloat16)


def check(pool: ThreadPoolExecutor, kinds: list[str]) -> Callable[[], None]:
    """Lower everything now; the result prints errors and whether bits agree."""
    waiting: list[Any] = []
    for spec in QUANT_MATMUL_SPECS:
        if spec.dtype != "bfloat16" or spec.kind not in kinds:
            continue
        arrays = spec.inputs()
        x = arrays[0].astype(np.float64)
        if spec.kind == "fp8":
            with jax.default_device(jax.devices("cpu")[0]):
                fixed = None if arrays[3] is None else jnp.asarray(arrays[3])
                narrow, scales = reference.narrowed(jnp.asarray(arrays[0]), spec.group is not None, fixed)
            s = np.asarray(scales, np.float64)
            x = np.asarray(narrow, np.float64) * (s[:, None] if spec.group is None else np.repeat(s, 128, axis=0).T)
        expected = x @ spec.weight(arrays).T
        call = jax.jit(functools.partial(CALLS[spec.kind], implementation="mosaic_sm90"))
        waiting.append((spec.name, expected, arrays, pool.submit(call.lower(*arrays).compile)))
        if spec.kind != "fp8":
            call = jax.jit(functools.partial(CALLS[spec.kind], implementation="widen_sm90"))
            waiting.append((f"{spec.name} widened", expected, arrays, pool.submit(call.lower(*arrays).compile)))
    rows: list[Any] = []
    for kind, group in (("int8", None), ("int4", 128), ("fp8", None)):
        if kind not in kinds:
            continue
        spec = QuantMatmulSpec("bits", kind, M=200, N=256, K=1024, group=group)
        given = spec.inputs()
        x, rest = jnp.asarray(given[0]), [None if a is None else jnp.asarray(a) for a in given[1:]]
        call = jax.jit(functools.partial(CALLS[kind], implementation="mosaic_sm90"))
        for first, last in ((0, 200), (3, 4), (3, 19), (3, 67)):
            part = x[first:last]
            rows.append((kind, first, last, part, rest, pool.submit(call.lower(part, *rest).compile)))

    def finish() -> None:
        for name, expected, arrays, compiled in waiting:
            try:
                got = np.asarray(compiled.result()(*arrays), np.float64)
                error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
                say(f"check {name}: {error:.1e}")
            except Exception as error:
                say(f"check {name}: FAILED {type(error).__name__} {str(error)[:300]}")
        whole = np.zeros(0)
        for kind, first, last, part, rest, compiled in rows:
            try:
                got = np.asarray(compiled.result()(part, *rest)).view(np.uint32)
                whole = got if first == 0 else whole
                say(f"bits {kind} rows {first}:{last} {bool((got == whole[first:last]).all())}")
            except Exception as error:
                say(f"bits {kind} {first}:{last}: FAILED {str(error)[:300]}")

    return finish


def say(text: str) -> None:
    print(f"{time.perf_counter() - START:6.1f} {text}", flush=True)


def make_weights(kind: str, K: int, N: int, count: int) -> Any:
    @functools.partial(jax.jit, static_argnums=())
    def one(key: Any) -> Any:
        a, b = jax.random.split(key)
        if kind == "bf16":
            return (jax.random.normal(a, (N, K), jnp.bfloat16) * jnp.bfloat16(0.02),)
        if kind == "fp8":
            return jax.random.normal(a, (N, K), jnp.bfloat16).astype(jnp.float8_e4m3fn), jnp.full(
                (N,), 0.02, jnp.float32
            )
        if kind == "fp8b":
            w = jax.random.normal(a, (N, K), jnp.bfloat16).astype(jnp.float8_e4m3fn)
            return w, jnp.full((K // 128, N), 0.02, jnp.float32)
        scale4 = (jax.random.uniform(b, (K // 128, N)) * 0.01 + 0.001).astype(jnp.bfloat16)
        bits = 4 if kind.startswith("int4") else 8
        shape = (N // 64, K // 64, packing.rows_of(bits), 128)
        words = jax.lax.bitcast_convert_type(jax.random.bits(a, shape, jnp.uint32), jnp.int32)
        if kind == "int4z":
            return words, scale4, jnp.full_like(scale4, 8)
        return (words, scale4) if kind == "int4" else (words, jnp.full((N,), 1e-3, jnp.float32))

    keys = jax.random.split(jax.random.key(0), count)
    return [one(key) for key in keys]


class Sweep:
    def __init__(self, limit: float) -> None:
        self.pool, self.limit, self.jobs, self.rows = ThreadPoolExecutor(14), limit, [], []

    def add(self, layer: str, M: int, kind: str, label: str, call: Callable[..., Any]) -> None:
        K, N = LAYERS[layer]
        count = int(max(3, min(24, 3e9 // (K * N * 2))))  # many times the L2
        shapes = jax.eval_shape(functools.partial(make_weights, kind, K, N, count))
        x = jax.ShapeDtypeStruct((M, K), jnp.bfloat16)
        one = jax.jit(call)

        def chain(x: Any, ws: Any) -> Any:
            return [one(x, *w) for w in ws]

        try:
            lowered = jax.jit(chain).lower(x, shapes)
        except Exception as error:
            print(f"{layer} M{M} {kind} {label}: LOWERING {type(error).__name__} {str(error)[:300]}", flush=True)
            return
        self.jobs.append((layer, M, kind, label, self.pool.submit(lowered.compile), count))

    def run(self) -> None:
        order = sorted(range(len(self.jobs)), key=lambda i: (list(LAYERS).index(self.jobs[i][0]), self.jobs[i][2]))
        held: tuple[Any, Any] = (None, None)
        for i in order:
            layer, M, kind, label, compiled, count = self.jobs[i]
            if time.perf_counter() - START > self.limit:
                say("out of time")
                break
            K, N = LAYERS[layer]
            try:
                run = compiled.result()
                if held[0] != (layer, kind):
                    held = (None, None)
                    held = ((layer, kind), jax.block_until_ready(make_weights(kind, K, N, count)))
                x = jax.random.normal(jax.random.key(1), (M, K), jnp.bfloat16)
                each = seconds(run, (x, held[1]), 5 if M <= 64 else 2) / count
            except Exception as error:
                say(f"{layer} M{M} {kind} {label}: FAILED {type(error).__name__} {str(error)[:300]}")
                continue
            self.rows.append({"layer": layer, "M": M, "kind": kind, "label": label, "us": each * 1e6})
            self.show(self.rows[-1])
        self.jobs = []

    def show(self, r: dict[str, Any]) -> None:
        base = {(r["layer"], r["M"]): r["us"] for r in self.rows if r["kind"] == "bf16"}.get((r["layer"], r["M"]))
        K, N = LAYERS[r["layer"]]
        size = {"bf16": 2, "int4": 0.5156, "int4z": 0.531}.get(r["kind"], 1.0)
        say(
            f"{r['layer']:8s} M{r['M']:<5d} {r['kind']:6s} {r['label']:36s} {r['us']:8.1f} us "
            f"{K * N * size / r['us'] / 1e6:5.2f} TB/s {2 * r['M'] * K * N / r['us'] / 1e6:6.0f} TF "
            f"{base / r['us'] if base else 0:5.2f}x"
        )


def mosaic(kind: str, M: int, N: int, out_dtype: Any = jnp.bfloat16, splits: int | None = None, **changes: Any) -> Any:
    call = {"int4": mosaic_sm90.int4_matmul, "int4z": mosaic_sm90.int4_matmul, "int8": mosaic_sm90.int8_matmul}.get(
        kind, mosaic_sm90.fp8_matmul
    )
    blocks = dataclasses.replace(mosaic_sm90.default_blocks(M, N, 4 if kind.startswith("int4") else 8), **changes)
    return functools.partial(call, out_dtype=out_dtype, blocks=blocks, splits=splits)


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=140)
    parser.add_argument("--kinds", default="int8,int4,fp8")
    parser.add_argument("--part", default="check,small,variants,large")
    options = parser.parse_args()
    parts, kinds = options.part.split(","), options.kinds.split(",")
    sweep = Sweep(options.seconds)
    if "jt" in parts:
        spec = QuantMatmulSpec("jt", "int4", M=9, N=256, K=512, group=128, scale_dtype="bfloat16")
        arrays = spec.inputs()
        expected = arrays[0].astype(np.float64) @ spec.weight(arrays).T
        got = np.asarray(api.int4_matmul(*arrays, implementation="jax_triton"), np.float64)
        say(f"check jax_triton: {np.linalg.norm(got - expected) / np.linalg.norm(expected):.1e}")
        for M in (1, 16):
            call = functools.partial(api.int4_matmul, implementation="jax_triton", out_dtype=jnp.bfloat16)
            sweep.add("gate_up", M, "int4", "jax_triton", call)
        sweep.run()
    finish = check(sweep.pool, kinds) if "check" in parts else lambda: None
    if "small" in parts:
        for layer, (_, N) in LAYERS.items():
            for M in (1, 16, 64):
                sweep.add(layer, M, "bf16", "xla", bf16)
                for kind in kinds:
                    sweep.add(layer, M, kind, "mosaic", mosaic(kind, M, N))
    say(f"{len(sweep.jobs)} jobs lowered")
    finish()
    sweep.run()
    if "variants" in parts:
        for layer in ("gate_up", "down"):
            N = LAYERS[layer][1]
            for kind in kinds:
                sweep.add(layer, 64, kind, "cluster 2", mosaic(kind, 64, N, cluster=2))
                sweep.add(layer, 64, kind, "cluster 4", mosaic(kind, 64, N, cluster=4))
                stages = mosaic_sm90.default_blocks(1, N, 4 if kind == "int4" else 8).stages
                two = dict(warpgroups=2, programs=264, stages=max(2, stages))
                sweep.add(layer, 1, kind, "2 warpgroups x 264", mosaic(kind, 1, N, **two))
            if "int4" in kinds:
                sweep.add(layer, 1, "int4z", "mosaic", mosaic("int4z", 1, N))
            if "fp8" in kinds:
                sweep.add(layer, 1, "fp8b", "mosaic", mosaic("fp8b", 1, N))
        for splits in (1, 2) if "int4" in kinds else ():
            sweep.add("qkv", 1, "int4", f"splits {splits}", mosaic("int4", 1, 6144, splits=splits))
    if "large" in parts:
        N = LAYERS["gate_up"][1]
        wide = {"int4": widen_sm90.int4_matmul, "int8": widen_sm90.int8_matmul}
        for M in (128, 512, 2048):
            sweep.add("gate_up", M, "bf16", "xla", bf16)
            for kind in kinds:
                if M <= 512 or kind != "fp8":
                    sweep.add("gate_up", M, kind, "mosaic", mosaic(kind, M, N))
                if kind in wide:
                    sweep.add("gate_up", M, kind, "widened", functools.partial(wide[kind], out_dtype=jnp.bfloat16))
    say(f"{len(sweep.jobs)} jobs lowered")
    sweep.run()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "quant_matmul.json").write_text(json.dumps(sweep.rows, indent=1))
    say("done")


if __name__ == "__main__":
    main()
