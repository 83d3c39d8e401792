"""All layers of a decode step of 9 to 128 rows in one kernel on a GPU: checked, timed, and where time goes.

In: nothing but a GPU and nvcc, or libraries that lie in the cache. Out: JSON lines on the terminal. Layers have weights
and pages of their own; times are of one jitted call of all layers, host clock over calls in a row, the best of several,
without the head. `timeline` builds the kernel with marks: when blocks come to each point of a layer in the middle.

    python -m benchmarks.wide_layers [check time variants timeline shared] [rows=32,128]
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from benchmarks.decode_layers import CONTEXT, MODELS, PAGE, bytes_of, normal, say, weights
from pallas_kernels.compiled import NVCC, built
from pallas_kernels.decode_layers import wide
from pallas_kernels.decode_layers.reference import decode_layers as reference
from pallas_kernels.decode_layers.specs import EPS, LayersSpec

ROWS = (1, 8, 16, 32, 64, 96, 128)
PREDICTED = {  # ms of the layers: bytes at 4.0 TB/s, products of 128 rows at 3.2
    ("llama-3.1-8b", 16): 4.1,
    ("llama-3.1-8b", 32): 4.7,
    ("llama-3.1-8b", 64): 5.9,
    ("llama-3.1-8b", 96): 7.3,
    ("llama-3.1-8b", 128): 8.8,
    ("qwen3-0.6b", 32): 1.8,
    ("qwen3-0.6b", 128): 4.6,
}
VARIANTS = {
    "32 KiB of x": ("-DJAXLLM_ROW_ROOM=32",),
    "cut for 3 percent": ("-DJAXLLM_EVEN=63",),
}
TIMELINE = ("-DJAXLLM_TIMELINE",)


@functools.cache
def kernel(flags: tuple[str, ...] = ()) -> wide.Kernel:
    """The kernel built with other constants, under a name of its own."""
    loaded = wide.load(built(wide.SOURCE, wide.INCLUDES, (*NVCC, *flags)))
    target = wide.TARGET + "".join(flag.replace("-D", "_").replace("=", "") for flag in flags)
    wide.register(loaded, target)
    return wide.Kernel(target, loaded, jax.devices()[0].core_count // 2 * 2)


def step_of(model: str, B: int, of: wide.Kernel, L: int) -> tuple[Any, list[Any], list[jax.Array]]:
    """A jitted step whose pages are donated, the pages, and the rows' arrays."""
    m, width = MODELS[model], -(-CONTEXT // PAGE)
    shape = (B * width, m.K, PAGE, m.H)
    pages = [tuple(normal(jax.random.key(2 * i + j), shape) for j in range(2)) for i in range(L)]
    table = jnp.asarray(np.random.default_rng(0).permutation(B * width).reshape(B, width).astype(np.int32))
    angles = jnp.ones((B, m.H // 2), jnp.float32)
    rows = [table, jnp.full(B, CONTEXT, jnp.int32), jnp.cos(angles), jnp.sin(angles)]

    def step(x: jax.Array, qkv: jax.Array, pages: Any, layers: Any, *rows: jax.Array) -> Any:
        return wide.call(of, x, qkv, layers, pages, *rows, eps=EPS, scale=m.H**-0.5)

    return jax.jit(step, donate_argnums=(2,)), pages, rows


def seconds_of(model: str, B: int, of: wide.Kernel, reps: int = 20) -> float:
    m = MODELS[model]
    step, pages, rows = step_of(model, B, of, m.L)
    x, qkv = normal(jax.random.key(9), (B, m.D)), normal(jax.random.key(8), (B, (m.N + 2 * m.K) * m.H))
    layers, times = weights(model), []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(reps):
            _, pages = step(x, qkv, pages, layers, *rows)
        jax.block_until_ready(pages)
        times.append((time.perf_counter() - start) / reps)
    return min(times[1:])


def check(rows: tuple[int, ...]) -> None:
    """Two real layers at every padded number of rows against the reference; the same bits again."""
    real = dataclasses.replace(MODELS["llama-3.1-8b"], name="8b", L=2, width=68, V=0)
    lengths = (1088, 3, 0, 700, 64, 129, 16, 1, 4000, 65, 1023)
    specs = [
        dataclasses.replace(real, name=f"8b, {B} rows", lengths=tuple(lengths[i % 11] for i in range(B)))
        for B in (9, *rows)
    ]
    small = MODELS["qwen3-0.6b"]
    specs.append(dataclasses.replace(small, name="0.6b, 40 rows", L=3, width=68, V=0, lengths=lengths * 3 + (5,) * 7))
    specs.append(LayersSpec("long", (9000, 20000, 64, 100) * 3, L=2, width=1250, qkv_bias=True, o_bias=True))
    for spec in specs:
        spec = dataclasses.replace(spec, page_size=64, width=-(-max(spec.lengths) // 64) + 1)
        given = spec.inputs()
        x, layers, pages, *arrays = spec.arguments(given)

        def op(call: Any, spec: Any = spec) -> Any:
            return jax.jit(functools.partial(call, eps=EPS, scale=spec.H**-0.5))

        ours = op(wide.decode_layers)
        live = [row for row, length in enumerate(spec.lengths) if length]
        got, written = ours(x, layers, pages, *arrays)
        want, expected = op(reference)(x, layers, pages, *arrays)
        again = all(
            np.array_equal(np.asarray(got)[live], np.asarray(ours(x, layers, pages, *arrays)[0])[live])
            for _ in range(20)
        )
        errors = [_error(np.asarray(got)[live], np.asarray(want)[live])]
        for a, b in zip(jax.tree.leaves(written), jax.tree.leaves(expected), strict=True):
            errors.append(_error(np.nan_to_num(np.asarray(a, np.float32)), np.nan_to_num(np.asarray(b, np.float32))))
        say(what="check", spec=spec.name, errors=errors, good=bool(again and max(errors) < 1.5e-2), repeats_equal=again)


def _error(got: Any, want: Any) -> float:
    g, w = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(g - w) / np.linalg.norm(w))


def timed(rows: tuple[int, ...]) -> None:
    for model in MODELS:
        for B in rows:
            seconds, size = seconds_of(model, B, kernel()), bytes_of(model, B, "none")
            more = {"predicted_ms": PREDICTED[model, B]} if (model, B) in PREDICTED else {}
            say(what="time", model=model, B=B, ms=seconds * 1e3, TBps=size / seconds / 1e12, **more)


def variants(rows: tuple[int, ...]) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda flags: built(wide.SOURCE, wide.INCLUDES, (*NVCC, *flags)), VARIANTS.values()))
    for name, flags in VARIANTS.items():
        for B in rows:
            seconds = seconds_of("llama-3.1-8b", B, kernel(flags))
            size = bytes_of("llama-3.1-8b", B, "none")
            say(what="variant", name=name, B=B, ms=seconds * 1e3, TBps=size / seconds / 1e12)


STAGES = ("o", "gate_up", "down", "qkv")
POINTS = ("begun", "weights there", "rows there", "multiplied", "others there", "ended")
NAMES = [f"{stage}: {point}" for stage in STAGES for point in POINTS]
NAMES += ["attention: waits", "attention: qkv there", "attention: ended"]
FIRST = NAMES.index("attention: waits")  # of a layer's


def timeline(rows: tuple[int, ...]) -> None:
    """Of a layer in the middle, in us after its first block began: the first, the median and the last block."""
    of, L = kernel(TIMELINE), 6
    m = MODELS["llama-3.1-8b"]
    layers = weights("llama-3.1-8b")[:L]
    for B in rows:
        step, pages, arrays = step_of("llama-3.1-8b", B, of, L)
        x, qkv = normal(jax.random.key(9), (B, m.D)), normal(jax.random.key(8), (B, (m.N + 2 * m.K) * m.H))
        times, counts = np.zeros((160, 4096), np.uint64), np.zeros(160, np.int32)
        for _ in range(3):
            _, pages = step(x, qkv, pages, layers, *arrays)
        jax.block_until_ready(pages)
        pointer = times.ctypes.data_as(ctypes.c_void_p), counts.ctypes.data_as(ctypes.c_void_p)
        if error := of.library.jaxllm_wide_layers_timeline(*pointer):
            raise RuntimeError(f"CUDA error {error}")
        found: dict[tuple[int, int], list[int]] = {}  # (point, how often a block came to it) -> when
        begins, next_begins = [], []
        for block in np.flatnonzero(counts):
            marks = [(int(each) % 32, int(each) // 32) for each in times[block, : counts[block]]]
            starts = [i for i, (point, _) in enumerate(marks) if point == FIRST]
            begins.append(marks[starts[L // 2]][1])
            next_begins.append(marks[starts[L // 2 + 1]][1])
            seen: dict[int, int] = {}
            for point, at in marks[starts[L // 2] : starts[L // 2 + 1]]:
                found.setdefault((point, seen.setdefault(point, 0)), []).append(at)
                seen[point] += 1
        zero = min(begins)
        say(what="timeline", B=B, us_layer=(float(np.median(next_begins)) - float(np.median(begins))) / 1e3)
        for (point, turn), each in sorted(found.items(), key=lambda item: float(np.median(item[1]))):
            us = [round((float(f(each)) - zero) / 1e3, 1) for f in (min, np.median, max)]
            say(what="timeline", B=B, point=NAMES[point], turn=turn, us=us, blocks=len(each))


def shared(rows: tuple[int, ...]) -> None:
    """On all devices of this machine: right, the same bits on each and again."""
    devices = jax.devices()
    groups = (tuple(device.id for device in devices),)
    mesh = Mesh(np.array(devices), ("t",), axis_types=(AxisType.Auto,))
    real = dataclasses.replace(MODELS["llama-3.1-8b"], L=2, width=18, V=0, page_size=PAGE)
    for B in rows:
        spec = dataclasses.replace(
            real, name=f"8b, {B} rows", lengths=tuple((1088, 3, 64, 700)[i % 4] for i in range(B))
        )
        given = spec.inputs()
        x, layers, pages, *arrays = spec.arguments(given)
        want, _ = jax.jit(functools.partial(reference, eps=EPS, scale=spec.H**-0.5))(x, layers, pages, *arrays)
        op = functools.partial(wide.decode_layers, eps=EPS, scale=spec.H**-0.5, groups=groups)
        step, own = spec.shared_by(op, mesh, layers[0]), spec.dealt(layers, len(devices))
        outs = [np.asarray(step(x, own, pages, *arrays)[0]).reshape(len(devices), B, -1) for _ in range(20)]
        same = all(np.array_equal(each[rank], outs[0][0]) for each in outs for rank in range(len(devices)))
        error = _error(outs[0][0], np.asarray(want))
        say(what="shared", spec=spec.name, devices=len(devices), error=error, good=same and error < 1.5e-2)


SECTIONS = {"check": check, "time": timed, "variants": variants, "timeline": timeline, "shared": shared}


def main(words: list[str]) -> None:
    names = [word for word in words if "=" not in word]
    chosen = [word.removeprefix("rows=") for word in words if "=" in word]
    rows = tuple(map(int, chosen[0].split(","))) if chosen else ROWS
    for name in names or ("check", "time", "variants", "timeline"):
        try:
            SECTIONS[name](rows)
        except Exception:
            say(what=name, failed=traceback.format_exc()[-1500:])


if __name__ == "__main__":
    main(sys.argv[1:])
