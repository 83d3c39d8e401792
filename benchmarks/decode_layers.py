"""All layers of a decode step in one kernel on a GPU: checked, timed against the bytes, and where a stage's time goes.

In: nothing but a GPU and nvcc. Out: JSON lines on the terminal. Layers have weights of their own; times are of one
jitted call of all layers, host clock over calls in a row, the best of several: without the head, with final norm and
head inside the kernel, and with these as XLA's own operations behind it (`apart`). `timeline` builds the kernel with
marks: for each stage how long blocks waited for the one before, and how long they worked.

    python -m benchmarks.decode_layers [check time variants timeline]
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
from pallas_kernels.decode_layers.api import Head, LayerWeights, decode_layers
from pallas_kernels.decode_layers.specs import EPS, LAYERS_SPECS, LayersSpec

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


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


@functools.partial(jax.jit, static_argnames=("shape", "scale", "shift"))
def normal(key: jax.Array, shape: tuple[int, ...], scale: float = 1.0, shift: float = 0.0) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) * scale + shift).astype(jnp.bfloat16)


@functools.lru_cache(maxsize=1)
def weights(model: str) -> list[LayerWeights]:
    return weights_of(MODELS[model])


def weights_of(m: LayersSpec) -> list[LayerWeights]:
    wide, made = (m.N + 2 * m.K) * m.H, []
    for layer in range(m.L):
        k = jax.random.split(jax.random.key(layer), 8)
        made.append(
            LayerWeights(
                normal(k[0], (wide, m.D), m.D**-0.5),
                normal(k[1], (m.D, m.N * m.H), (m.N * m.H) ** -0.5),
                normal(k[2], (2, m.D), 0.1, 1.0),
                normal(k[3], (2 * m.F, m.D), m.D**-0.5),
                normal(k[4], (m.D, m.F), m.F**-0.5),
                normal(k[6], (wide,)) if m.qkv_bias else None,
                normal(k[7], (m.D,)) if m.o_bias else None,
                normal(k[5], (2, m.H), 0.1, 1.0) if m.qk_norm else None,
            )
        )
    return made


@functools.lru_cache(maxsize=1)
def head_of(model: str) -> Head:
    m, k = MODELS[model], jax.random.split(jax.random.key(-1))
    return Head(normal(k[0], (m.D,), 0.1, 1.0), normal(k[1], (m.V, m.D), m.D**-0.5))


Kernel = tuple[str, ctypes.CDLL]  # the name it is registered under, the library


@functools.cache
def kernel(flags: tuple[str, ...] = ()) -> Kernel:
    """The kernel built with other constants, under a name of its own."""
    loaded = cuda.load(built(cuda.SOURCE, cuda.INCLUDES, (*NVCC, *flags)))
    target = cuda.TARGET + "".join(flag.replace("-D", "_").replace("=", "") for flag in flags)
    cuda.register(loaded, target)
    return target, loaded


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
            normed = rms_norm(out, head.norm, EPS)
            out = jax.lax.dot_general(normed, head.table, contract, preferred_element_type=jnp.float32)
        return out, pages

    return jax.jit(step, donate_argnums=(1,)), pages, rows


HEADS = ("none", "inside", "apart")


def bytes_of(model: str, B: int, where: str) -> int:
    m = MODELS[model]
    layer = (m.N + 2 * m.K) * m.H * m.D + m.N * m.H * m.D + 3 * m.D * m.F
    return 2 * m.L * (layer + B * CONTEXT * 2 * m.K * m.H) + 2 * m.V * m.D * (where != "none")


def seconds_of(model: str, B: int, of: Kernel, where: str, reps: int = 20) -> float:
    step, pages, rows = step_of(model, B, of, where)
    x, times = normal(jax.random.key(9), (B, MODELS[model].D)), []
    layers, head = weights(model), head_of(model)
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
    for spec in (*LAYERS_SPECS[:6], real, headed):
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
    of = kernel(("-DJAXLLM_TIMELINE",))
    for model, B in (("llama-3.1-8b", 1), ("llama-3.1-8b", 8), ("qwen3-0.6b", 1)):
        step, pages, rows = step_of(model, B, of, "inside")
        x, layers, head = normal(jax.random.key(9), (B, MODELS[model].D)), weights(model), head_of(model)
        times, counts = np.zeros((160, 4096), np.uint64), np.zeros(160, np.int32)
        for _ in range(3):  # the last one is what is told
            out, pages = step(x, pages, layers, head, *rows)
            jax.block_until_ready(out)
            pointer = times.ctypes.data_as(ctypes.c_void_p), counts.ctypes.data_as(ctypes.c_void_p)
            if error := of[1].jaxllm_decode_layers_timeline(*pointer):
                say(what="timeline", error=error)
                return
        tell(model, B, times, counts)


POINTS = ("await", "x", "first", "rest", "signal")  # a product's: what ends there began at the one before
NAMES = [f"{stage} {point}" for stage in ("qkv", "o", "gate_up", "down") for point in POINTS]
NAMES += ["attention " + point for point in ("await", "runs", "others", "count", "merge", "signal", "end")]
NAMES += ["head " + point for point in POINTS]


def tell(model: str, B: int, times: Any, counts: Any) -> None:
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
        say(what="timeline", model=model, B=B, begin=NAMES[begin], end=NAMES[end], us=[a, b, c], times=len(spent))
    say(what="timeline", model=model, B=B, us_layer=float(np.mean(length)))


SECTIONS = {"check": check, "time": timed, "variants": variants, "timeline": timeline}


def main(names: list[str]) -> None:
    for name in names or list(SECTIONS):
        try:
            SECTIONS[name]()
        except Exception:
            say(what=name, failed=traceback.format_exc()[-1500:])


if __name__ == "__main__":
    main(sys.argv[1:])
