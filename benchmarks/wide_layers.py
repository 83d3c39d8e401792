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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from benchmarks.decode_layers import CONTEXT, MODELS, PAGE, bytes_of, normal, say, weights, weights_of
from pallas_kernels.compiled import NVCC, built
from pallas_kernels.decode_layers import wide
from pallas_kernels.decode_layers.api import LayerWeights
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
    "96 KiB of x": ("-DJAXLLM_ROW_ROOM=96",),
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


CHECKED = (9, 1, 32, 64, 96, 128)  # one of each number of rows that the kernel pads to


@functools.lru_cache(maxsize=4)
def _weights(shape: LayersSpec) -> list[LayerWeights]:
    return weights_of(shape)


def arguments_of(spec: LayersSpec) -> tuple[Any, ...]:
    """As spec.arguments of its inputs, made on the device: 8B's weights take the host 9 s."""
    table, written = spec.paging(np.random.default_rng(0))
    shape, known = (len(written), spec.K, spec.page_size, spec.H), jnp.asarray(written)[:, None, :, None]
    keys = iter(jax.random.split(jax.random.key(99), 2 * spec.L + 2))
    pages = [tuple(jnp.where(known, normal(next(keys), shape), jnp.nan) for _ in range(2)) for _ in range(spec.L)]
    angles = jax.random.uniform(next(keys), (len(spec.lengths), spec.H // 2), jnp.float32, 0, 6)
    rows = jnp.asarray(table), jnp.asarray(spec.lengths, jnp.int32), jnp.cos(angles), jnp.sin(angles)
    x = normal(next(keys), (len(spec.lengths), spec.D))
    return x, _weights(dataclasses.replace(spec, name="", lengths=(), width=0, page_size=0)), pages, *rows


Run = Callable[..., tuple[Any, list[Any]]]


def compiled_all(work: list[tuple[Run, tuple[Any, ...]]]) -> list[Run]:
    """Jitted functions for their arguments, side by side: one after the other they take most of a check's time."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda each: each[0].lower(*each[1]).compile(), work))


def check(rows: tuple[int, ...] = CHECKED) -> None:
    """Two real layers at every padded number of rows against the reference; the same bits again."""
    real = dataclasses.replace(MODELS["llama-3.1-8b"], L=2, V=0)
    lengths = (1088, 3, 0, 700, 64, 129, 16, 1, 4000, 65, 1023)
    specs = [
        dataclasses.replace(real, name=f"8b, {B} rows", lengths=tuple(lengths[i % 11] for i in range(B))) for B in rows
    ]
    small = MODELS["qwen3-0.6b"]
    specs.append(dataclasses.replace(small, name="0.6b, 40 rows", L=3, V=0, lengths=lengths * 3 + (5,) * 7))
    specs.append(LayersSpec("long", (9000, 20000, 64, 100) * 3, L=2, qkv_bias=True, o_bias=True))
    specs = [dataclasses.replace(spec, page_size=64, width=-(-max(spec.lengths) // 64) + 1) for spec in specs]
    of, given, work = kernel(), [arguments_of(spec) for spec in specs], []
    for spec, arguments in zip(specs, given, strict=True):
        options = {"eps": EPS, "scale": spec.H**-0.5}
        ours = functools.partial(wide.decode_layers, **options, kernel=of)
        work += [(jax.jit(ours), arguments), (jax.jit(functools.partial(reference, **options)), arguments)]
    runs = iter(compiled_all(work))
    for spec, arguments in zip(specs, given, strict=True):
        ours, expected_of = next(runs), next(runs)
        live = [row for row, length in enumerate(spec.lengths) if length]
        got, written = ours(*arguments)
        want, expected = expected_of(*arguments)
        again = all(np.array_equal(np.asarray(got)[live], np.asarray(ours(*arguments)[0])[live]) for _ in range(20))
        errors = [_error(np.asarray(got)[live], np.asarray(want)[live])]
        for a, b in zip(jax.tree.leaves(written), jax.tree.leaves(expected), strict=True):
            errors.append(_error(jnp.nan_to_num(a.astype(jnp.float32)), jnp.nan_to_num(b.astype(jnp.float32))))
        say(what="check", spec=spec.name, errors=errors, good=bool(again and max(errors) < 1.5e-2), repeats_equal=again)


def _error(got: Any, want: Any) -> float:
    g, w = jnp.asarray(got, jnp.float32), jnp.asarray(want, jnp.float32)
    return float(jnp.linalg.norm(g - w) / jnp.linalg.norm(w))


def timed(rows: tuple[int, ...] = ROWS) -> None:
    for model in MODELS:
        for B in rows:
            seconds, size = seconds_of(model, B, kernel()), bytes_of(model, B, "none")
            more = {"predicted_ms": PREDICTED[model, B]} if (model, B) in PREDICTED else {}
            say(what="time", model=model, B=B, ms=seconds * 1e3, TBps=size / seconds / 1e12, **more)


def variants(rows: tuple[int, ...] = ROWS) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda flags: built(wide.SOURCE, wide.INCLUDES, (*NVCC, *flags)), VARIANTS.values()))
    for name, flags in VARIANTS.items():
        for B in rows:
            seconds = seconds_of("llama-3.1-8b", B, kernel(flags))
            size = bytes_of("llama-3.1-8b", B, "none")
            say(what="variant", name=name, B=B, ms=seconds * 1e3, TBps=size / seconds / 1e12)


STAGES = ("o", "gate_up", "down", "qkv")
POINTS = ("begun", "weights there", "rows there", "multiplied", "added", "ended")
NAMES = [f"{stage}: {point}" for stage in STAGES for point in POINTS]
NAMES += ["attention: waits", "attention: qkv there", "attention: ended"]
FIRST = NAMES.index("attention: waits")  # of a layer's


def timeline(rows: tuple[int, ...] = ROWS) -> None:
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
        ended = found[NAMES.index("attention: ended"), 0]
        say(what="attended", B=B, us=[round((at - zero) / 1e3, 1) for at in ended])


def shared(rows: tuple[int, ...] = ROWS) -> None:
    """On all devices of this machine: right, the same bits on each and again."""
    devices = jax.devices()
    groups = (tuple(device.id for device in devices),)
    mesh = Mesh(np.array(devices), ("t",), axis_types=(AxisType.Auto,))
    real = dataclasses.replace(MODELS["llama-3.1-8b"], L=2, width=18, V=0, page_size=PAGE)
    of, steps, given, work = kernel(), [], [], []
    for B in rows:
        spec = dataclasses.replace(
            real, name=f"8b, {B} rows", lengths=tuple((1088, 3, 64, 700)[i % 4] for i in range(B))
        )
        x, layers, pages, *arrays = arguments_of(spec)
        options = {"eps": EPS, "scale": spec.H**-0.5}
        op = functools.partial(wide.decode_layers, **options, groups=groups, kernel=of)
        step = spec.shared_by(op, mesh, layers[0])
        steps.append((spec, (x, spec.dealt(layers, len(devices)), pages, *arrays)))
        given.append((x, layers, pages, *arrays))
        work += [(step, steps[-1][1]), (jax.jit(functools.partial(reference, **options)), given[-1])]
    runs = iter(compiled_all(work))
    for (spec, dealt), whole in zip(steps, given, strict=True):
        step, expected_of = next(runs), next(runs)
        want, B = expected_of(*whole)[0], len(spec.lengths)
        outs = [np.asarray(step(*dealt)[0]).reshape(len(devices), B, -1) for _ in range(20)]
        same = all(np.array_equal(each[rank], outs[0][0]) for each in outs for rank in range(len(devices)))
        error = _error(outs[0][0], want)
        say(what="shared", spec=spec.name, devices=len(devices), error=error, good=same and error < 1.5e-2)


SECTIONS = {"check": check, "time": timed, "variants": variants, "timeline": timeline, "shared": shared}


def main(words: list[str]) -> None:
    names = [word for word in words if "=" not in word]
    chosen = [word.removeprefix("rows=") for word in words if "=" in word]
    rows = [tuple(map(int, word.split(","))) for word in chosen]
    for name in names or ("check", "time", "variants", "timeline"):
        try:
            SECTIONS[name](*rows)
        except Exception:
            say(what=name, failed=traceback.format_exc()[-1500:])


if __name__ == "__main__":
    main(sys.argv[1:])
