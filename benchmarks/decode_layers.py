"""All layers of a decode step in one kernel on a GPU: checked, timed against the bytes, and where a stage's time goes.

In: nothing but a GPU and nvcc. Out: JSON lines on the terminal. Layers have weights of their own; times are of one
jitted call of all layers, host clock over calls in a row, the best of several: without the head, with final norm and
head inside the kernel, and with these as XLA's own operations behind it (`apart`). `timeline` builds the kernel with
marks: for each stage how long blocks waited for the one before, and how long they worked. `quantised` times random
weights in few bits, `check_quantised` compares them with the reference. `build` compiles what the others need, on any
machine with nvcc (BUILDS).

    python -m benchmarks.decode_layers [build check time variants timeline check_quantised quantised quantised_timeline]
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compiled import NVCC, built
from pallas_kernels.decode_chain.reference import rms_norm
from pallas_kernels.decode_layers import cuda
from pallas_kernels.decode_layers.api import Few, Head, LayerWeights, Weight, decode_layers
from pallas_kernels.decode_layers.specs import EPS, LAYERS_SPECS, QUANTISED_SPECS, LayersSpec
from pallas_kernels.quant_matmul import packing
from pallas_kernels.quant_matmul.api import int8_matmul

CONTEXT, PAGE = 1088, 64
MODELS = {
    "llama-3.1-8b": LayersSpec("", (), L=32, D=4096, N=32, K=8, F=14336, V=128256),
    "qwen3-0.6b": LayersSpec("", (), L=28, D=1024, N=16, K=8, F=3072, V=151936, qk_norm=True),
}
CONSTANTS = ("FLIGHT", "HELD")
VARIANTS = {  # slots on their way, slots of weights in registers before a stage begins
    "flight 2, held 3": (2, 3),
    "flight 2, held 2": (2, 2),
    "flight 2, held 1": (2, 1),
    "flight 3, held 3": (3, 3),
}
QUANTISED = ("int4", "fp8", "int8")
QUANTISED_VARIANTS = {  # slots of activations, slots of weights in registers, slots on their way
    "int4": {"ahead 2, held 2": (2, 2, 2), "ahead 2, held 1, flight 3": (2, 1, 3)},
    "fp8": {"ahead 3, held 1": (3, 1, 2), "ahead 4, held 2": (4, 2, 2)},
    "int8": {"ahead 4, held 1": (4, 1, 2)},
}
MARKS = ("-DJAXLLM_TIMELINE",)


def flags_of(variant: tuple[int, int, int]) -> tuple[str, ...]:
    names = ("AHEAD", "HELD", "FLIGHT")
    return tuple(f"-DJAXLLM_{name}={value}" for name, value in zip(names, variant, strict=True))


# Kind and flags of every library that the sections for weights in few bits load, bf16's for comparison.
BUILDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("bf16", ()),
    *((kind, flags) for kind in QUANTISED for flags in ((), MARKS)),
    *((kind, flags_of(each)) for kind, variants in QUANTISED_VARIANTS.items() for each in variants.values()),
)


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


@functools.partial(jax.jit, static_argnames=("shape", "scale", "shift"))
def normal(key: jax.Array, shape: tuple[int, ...], scale: float = 1.0, shift: float = 0.0) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) * scale + shift).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnames=("shape", "kind", "group"))
def random_few(key: jax.Array, shape: tuple[int, int], kind: str, group: int = 128) -> Few:
    """Any words and scales that keep activations in range: nothing is rounded from a wider weight."""
    N, K = shape
    size, (bits, spread) = K**-0.5, jax.random.split(key)
    scale = jax.random.uniform(spread, (K // group, N) if kind == "int4" else (N,), jnp.float32, 0.5, 1.5) * size
    if kind == "fp8":
        return Few((16 * jax.random.normal(bits, shape, jnp.float32)).astype(jnp.float8_e4m3fn), scale / 16)
    rows = packing.rows_of(4 if kind == "int4" else 8)
    words = jax.random.bits(bits, (N // packing.TILE, K // packing.TILE, rows, packing.LANES), jnp.uint32)
    values = jax.lax.bitcast_convert_type(words, jnp.int32)
    return Few(values, (scale / 4.6).astype(jnp.bfloat16) if kind == "int4" else scale / 74)


def matrix(key: jax.Array, shape: tuple[int, int], kind: str) -> Weight:
    return normal(key, shape, shape[1] ** -0.5) if kind == "bf16" else random_few(key, shape, kind)


@functools.lru_cache(maxsize=1)
def weights(model: str, kind: str = "bf16") -> list[LayerWeights]:
    return weights_of(MODELS[model], kind)


def weights_of(m: LayersSpec, kind: str = "bf16") -> list[LayerWeights]:
    wide, made = (m.N + 2 * m.K) * m.H, []
    for layer in range(m.L):
        k = jax.random.split(jax.random.key(layer), 8)
        made.append(
            LayerWeights(
                matrix(k[0], (wide, m.D), kind),
                matrix(k[1], (m.D, m.N * m.H), kind),
                normal(k[2], (2, m.D), 0.1, 1.0),
                matrix(k[3], (2 * m.F, m.D), kind),
                matrix(k[4], (m.D, m.F), kind),
                normal(k[6], (wide,)) if m.qkv_bias else None,
                normal(k[7], (m.D,)) if m.o_bias else None,
                normal(k[5], (2, m.H), 0.1, 1.0) if m.qk_norm else None,
            )
        )
    return made


@functools.lru_cache(maxsize=1)
def head_of(model: str, kind: str = "bf16") -> Head:
    """int4 models have an int8 head."""
    m, k = MODELS[model], jax.random.split(jax.random.key(-1))
    return Head(normal(k[0], (m.D,), 0.1, 1.0), matrix(k[1], (m.V, m.D), "int8" if kind == "int4" else kind))


Kernel = tuple[str, ctypes.CDLL]  # the name it is registered under, the library


@functools.cache
def kernel(flags: tuple[str, ...] = (), kind: str = "bf16") -> Kernel:
    """The kernel built with other constants, under a name of its own."""
    handler = cuda.KINDS[kind]
    loaded = handler.load(built(cuda.SOURCE, cuda.INCLUDES, (*NVCC, *handler.flags, *flags)))
    target = handler.target + "".join(flag.replace("-D", "_").replace("=", "") for flag in flags)
    handler.register(loaded, target)
    return target, loaded


def build() -> None:
    def one(each: tuple[str, tuple[str, ...]]) -> str:
        kind, flags = each
        return str(built(cuda.SOURCE, cuda.INCLUDES, (*NVCC, *cuda.KINDS[kind].flags, *flags)))

    with ThreadPoolExecutor(2) as pool:
        for (kind, flags), path in zip(BUILDS, pool.map(one, BUILDS), strict=True):
            say(what="build", kind=kind, flags=flags, path=path)


def step_of(model: str, B: int, of: Kernel, where: str) -> tuple[Any, list[Any], list[jax.Array]]:
    """A jitted step whose pages are donated, the pages, and the rows' arrays. `where`: the head's place, see HEADS."""
    m, width = MODELS[model], -(-CONTEXT // PAGE)
    shape = (B * width, m.K, PAGE, m.H)
    pages = [tuple(normal(jax.random.key(2 * i + j), shape) for j in range(2)) for i in range(m.L)]
    table = jnp.arange(B * width, dtype=jnp.int32).reshape(B, width)
    angles = jnp.ones((B, m.H // 2), jnp.float32)
    rows = [table, jnp.full(B, CONTEXT, jnp.int32), jnp.cos(angles), jnp.sin(angles)]
    programs = jax.devices()[0].core_count

    def step(x: jax.Array, pages: Any, layers: Any, head: Head, *rows: jax.Array) -> Any:
        inside = head if where == "inside" else None
        out, pages = cuda.call(*of, programs, x, layers, pages, *rows, eps=EPS, scale=m.H**-0.5, head=inside)
        if where == "apart":
            contract = (((1,), (1,)), ((), ()))
            normed, table = rms_norm(out, head.norm, EPS), head.table
            if isinstance(table, Few):
                assert table.scale is not None, "int8"
                out = int8_matmul(normed, table.values, table.scale)
            else:
                out = jax.lax.dot_general(normed, table, contract, preferred_element_type=jnp.float32)
        return out, pages

    return jax.jit(step, donate_argnums=(1,)), pages, rows


HEADS = ("none", "inside", "apart")


def bytes_of(model: str, B: int, where: str) -> int:
    m = MODELS[model]
    layer = (m.N + 2 * m.K) * m.H * m.D + m.N * m.H * m.D + 3 * m.D * m.F
    return 2 * m.L * (layer + B * CONTEXT * 2 * m.K * m.H) + 2 * m.V * m.D * (where != "none")


def seconds_of(model: str, B: int, of: Kernel, where: str, reps: int = 20, kind: str = "bf16") -> float:
    step, pages, rows = step_of(model, B, of, where)
    x, times = normal(jax.random.key(9), (B, MODELS[model].D)), []
    layers, head = weights(model, kind), head_of(model, kind)
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(reps):
            _, pages = step(x, pages, layers, head, *rows)
        jax.block_until_ready(pages)
        times.append((time.perf_counter() - start) / reps)
    return min(times[1:])


def check() -> None:
    """The emulator's cases and one real layer, against the reference; the same bits again and alone."""
    real = dataclasses.replace(
        MODELS["llama-3.1-8b"], name="8b", L=2, width=68, lengths=(1088, 3, 0, 700, 64, 129, 16, 1), V=0
    )
    headed = dataclasses.replace(real, name="8b, head", V=8003)
    compare(*LAYERS_SPECS[:6], real, headed)


def check_quantised() -> None:
    """Likewise with weights in few bits: the emulator's cases, and two layers of 8B's shape for 8 rows and for one."""
    real = dataclasses.replace(MODELS["llama-3.1-8b"], L=2, width=68, lengths=(1088, 3, 0, 700, 64, 129, 16, 1), V=0)
    compare(*QUANTISED_SPECS)
    for kind in QUANTISED:
        eight = dataclasses.replace(real, name=f"8b, {kind}", kind=kind, V=0 if kind == "int4" else 8064)
        compare(eight, dataclasses.replace(eight, name=f"8b, {kind}, one row", lengths=(1088,)))
    compare(dataclasses.replace(real, name="8b, int4 by 64, f16", kind="int4", group=64, scales="float16"))


def compare(*specs: LayersSpec) -> None:
    for spec in specs:
        given = spec.inputs()
        (x, layers, pages, *rows), head = spec.arguments(given), spec.head(given)

        def op(name: str, spec: Any = spec, head: Any = head) -> Any:
            return jax.jit(
                functools.partial(decode_layers, eps=EPS, scale=spec.H**-0.5, head=head, implementation=name)
            )

        def run(call: Any, x: Any, rows: Any, layers: Any = layers, pages: Any = pages) -> Any:
            return np.asarray(call(x, layers, pages, *rows)[0], np.float64)

        ours, plain = op("cuda"), op("reference")
        live = [row for row, length in enumerate(spec.lengths) if length]
        got, want = run(ours, x, rows), run(plain, x, rows)
        again = all(np.array_equal(got[live], run(ours, x, rows)[live]) for _ in range(20))
        alone = [np.array_equal(run(ours, x[r : r + 1], [a[r : r + 1] for a in rows])[0], got[r]) for r in live[:2]]
        error = float(np.linalg.norm(got[live] - want[live]) / np.linalg.norm(want[live]))
        say(what="check", spec=spec.name, error=error, repeats_equal=again, alone_equal=alone)


def timed() -> None:
    for model in MODELS:
        for B, where in [(B, where) for B in (1, 8) for where in HEADS] + [(2, "inside"), (4, "inside")]:
            seconds, size = seconds_of(model, B, kernel(), where), bytes_of(model, B, where)
            say(what="time", model=model, B=B, head=where, ms=seconds * 1e3, TBps=size / seconds / 1e12)


def variants() -> None:
    flags = [tuple(f"-DJAXLLM_{n}={v}" for n, v in zip(CONSTANTS, values, strict=True)) for values in VARIANTS.values()]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda each: built(cuda.SOURCE, cuda.INCLUDES, (*NVCC, *each)), flags))
    for name, each in zip(VARIANTS, flags, strict=True):
        of = kernel(each)
        for model, B in (("llama-3.1-8b", 1), ("llama-3.1-8b", 8), ("qwen3-0.6b", 1)):
            seconds = seconds_of(model, B, of, "inside")
            size = bytes_of(model, B, "inside")
            say(what="variant", name=name, model=model, B=B, ms=seconds * 1e3, TBps=size / seconds / 1e12)


def timeline() -> None:
    for model, B in (("llama-3.1-8b", 1), ("llama-3.1-8b", 8), ("qwen3-0.6b", 1)):
        trace(model, B)


def trace(model: str, B: int, kind: str = "bf16", where: str = "inside") -> None:
    of = kernel(MARKS, kind)
    step, pages, rows = step_of(model, B, of, where)
    x, layers, head = normal(jax.random.key(9), (B, MODELS[model].D)), weights(model, kind), head_of(model, kind)
    times, counts = np.zeros((160, 4096), np.uint64), np.zeros(160, np.int32)
    for _ in range(3):  # the last one is what is told
        out, pages = step(x, pages, layers, head, *rows)
        jax.block_until_ready(out)
        pointer = times.ctypes.data_as(ctypes.c_void_p), counts.ctypes.data_as(ctypes.c_void_p)
        if error := of[1].jaxllm_decode_layers_timeline(*pointer):
            say(what="timeline", error=error)
            return
    tell(model, B, times, counts, kind)


def quantised() -> None:
    """8B's layers by kind, with the head where it is of their kind, or behind them; then with other constants."""
    model = "llama-3.1-8b"
    for kind in ("bf16", *QUANTISED):
        for where in ("none", "apart" if kind == "int4" else "inside"):
            for B in (1, 8):
                _time_quantised(model, kind, B, where)
        for name, variant in QUANTISED_VARIANTS.get(kind, {}).items():
            for B in (1, 8):
                _time_quantised(model, kind, B, "none", name, flags_of(variant))


def _time_quantised(model: str, kind: str, B: int, where: str, name: str = "", flags: tuple[str, ...] = ()) -> None:
    m, held = MODELS[model], jax.tree.leaves(weights(model, kind))
    held += jax.tree.leaves(head_of(model, kind)) if where != "none" else []
    size = sum(each.nbytes for each in held) + 4 * m.L * B * CONTEXT * m.K * m.H
    seconds = seconds_of(model, B, kernel(flags, kind), where, kind=kind)
    row = dict(ms=seconds * 1e3, GB=size / 1e9, TBps=size / seconds / 1e12)
    say(what="quantised", model=model, kind=kind, B=B, head=where, variant=name, **row)


def quantised_timeline() -> None:
    for kind in QUANTISED:
        for B in (1, 8):
            trace("llama-3.1-8b", B, kind, "none" if kind == "int4" else "inside")


POINTS = ("await", "x", "first", "rest", "signal")  # a product's: what ends there began at the one before
NAMES = [f"{stage} {point}" for stage in ("qkv", "o", "gate_up", "down") for point in POINTS]
NAMES += ["attention " + point for point in ("await", "runs", "others", "count", "merge", "signal", "end")]
NAMES += ["head " + point for point in POINTS]


def tell(model: str, B: int, times: Any, counts: Any, kind: str) -> None:
    """Between two marks of a block: the later one's name says what it went to. Times of all layers but the first, and
    of the head."""
    found: dict[tuple[int, int], list[float]] = {}
    length = []
    for program in np.flatnonzero(counts):
        marks = times[program, : min(counts[program], times.shape[1])]
        points, at = (marks % 32).astype(int), (marks // 32).astype(np.int64)
        starts = np.flatnonzero(points == 0)
        length.append((at[starts[-1]] - at[starts[1]]) / (len(starts) - 2) / 1e3)
        for i in range(starts[1], len(points) - 1):
            found.setdefault((points[i], points[i + 1]), []).append((at[i + 1] - at[i]) / 1e3)
    for (begin, end), spent in sorted(found.items()):
        a, b, c = (round(float(np.percentile(spent, q)), 2) for q in (10, 50, 90))
        say(
            what="timeline",
            kind=kind,
            model=model,
            B=B,
            begin=NAMES[begin],
            end=NAMES[end],
            us=[a, b, c],
            times=len(spent),
        )
    say(what="timeline", kind=kind, model=model, B=B, us_layer=float(np.mean(length)))


SECTIONS = {
    "build": build,
    "check": check,
    "time": timed,
    "variants": variants,
    "timeline": timeline,
    "check_quantised": check_quantised,
    "quantised": quantised,
    "quantised_timeline": quantised_timeline,
}


def main(names: list[str]) -> None:
    for name in names or list(SECTIONS):
        try:
            SECTIONS[name]()
        except Exception:
            say(what=name, failed=traceback.format_exc()[-1500:])


if __name__ == "__main__":
    main(sys.argv[1:])
