"""Decode attention as a CUDA kernel on a GPU: checked, then timed in several builds beside Triton in the same run.

In: nothing but a GPU and nvcc. Out: JSON lines on the terminal. Times are of calls chained in the body of a loop on the
device, which XLA records as a CUDA graph as it does a decode step, with pages of their own, more of them than the L2
cache holds; host clock over the loop, the best of several.

    python -m benchmarks.decode_attention [check time heads splits]
"""

from __future__ import annotations

import functools
import json
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compiled import NVCC, built
from pallas_kernels.decode_attention import cuda
from pallas_kernels.decode_attention.reference import decode_attention as reference
from pallas_kernels.decode_attention.specs import DECODE_ATTENTION_SPECS, DecodeAttentionSpec
from pallas_kernels.paged_attention import triton
from pallas_kernels.rope_page_write.heads import Heads

Variant = tuple[str, ...]  # constants other than the kernel's own
N, K, H = 32, 8, 128  # Llama-3.1-8B's heads
LOOPS, BODY = 10, 8  # a body of fewer kernels is not recorded as a graph
CHAIN_BYTES = 1.2e9  # what a chain of calls reads: many times the L2
BARS = {"32x8192": 4.2, "128x1024": 4.0, "32x1024": 3.6, "8x1024": 2.6, "1x8192": 2.3, "1x32768": 3.6}  # TB/s
PREDICTED = {"32x8192": 4.2, "128x1024": 4.0, "32x1024": 3.4, "8x1024": 1.5, "1x8192": 1.4, "1x32768": 2.9}
HEADS = {"256x1088": 4.0, "128x1088": 3.8, "32x1088": 3.3, "8x1088": 1.3}  # with new keys and values; predictions
VARIANTS: dict[str, Variant] = {
    "ours": (),
}
SPLITS: dict[str, Variant] = {f"split {keys}": (f"-DJAXLLM_SPLIT={keys}",) for keys in (128, 256)}
CHECKED = (
    *(spec for spec in DECODE_ATTENTION_SPECS if spec.H == H and spec.dtype == "bfloat16" and spec.window is None),
    DecodeAttentionSpec("long", N=32, K=8, H=H, lengths=(9000, 1, 0, 2048, 2049, 4097, 300), page_size=64),
    DecodeAttentionSpec("eight_a_key", N=32, K=4, H=H, lengths=(5000, 64, 65, 0, 1088), page_size=128, norms=True),
    DecodeAttentionSpec("many_rows", N=16, K=8, H=H, lengths=tuple(1 + 37 * i % 900 for i in range(96)), norms=True),
    DecodeAttentionSpec("alike", N=32, K=8, H=H, lengths=(1088,) * 128, page_size=64),  # segments are not cut
)


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


@functools.cache
def kernel(flags: Variant = ()) -> cuda.Kernel:
    """The kernel, or built with other constants under a name of its own."""
    if not flags:
        return cuda.ours()
    loaded = cuda.load(built(cuda.SOURCE, cuda.INCLUDES, (*NVCC, *flags)))
    target = cuda.TARGET + "".join(flag.replace("-D", "_").replace("=", "") for flag in flags)
    cuda.register(loaded, target)
    return cuda.Kernel(target, loaded, jax.devices()[0].core_count)


@functools.partial(jax.jit, static_argnames=("shape",))
def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def calls_of(B: int, S: int) -> int:
    return int(max(2, min(16, CHAIN_BYTES // bytes_of(B, S))))


def bytes_of(B: int, S: int) -> int:
    return 2 * B * S * K * H * 2


def arrays_of(B: int, S: int, page_size: int, calls: int) -> tuple[Any, ...]:
    """Pools of the calls, the table, the lengths."""
    width = -(-S // page_size)
    keys = iter(jax.random.split(jax.random.key(0), 2 * calls))
    shape = (B * width, K, page_size, H)
    pools = [(normal(next(keys), shape), normal(next(keys), shape)) for _ in range(calls)]
    table = np.random.default_rng(0).permutation(B * width).reshape(B, width).astype(np.int32)
    return pools, jnp.asarray(table), jnp.full((B,), S, jnp.int32)


def best(run: Callable[..., Any], state: Any) -> float:
    """Seconds of a run that maps its state to the next one."""
    state, times = jax.block_until_ready(run(state)), []
    for _ in range(5):
        start = time.perf_counter()
        state = jax.block_until_ready(run(state))
        times.append(time.perf_counter() - start)
    return min(times)


def looped(body: Callable[[Any], Any], state: Any) -> Any:
    return jax.lax.fori_loop(0, LOOPS, lambda _, state: body(state), state)


Attend = Callable[..., Any]


def report(
    what: str, names: dict[str, Attend], step: Callable[[Attend], Any], state: Any, size: int, calls: int, **more: Any
) -> None:
    """Compiles all of `names` side by side, then times one after the other."""

    def compiled(attend: Attend) -> Any:
        return step(attend).lower(state).compile()

    with ThreadPoolExecutor(8) as pool:
        waiting = {name: pool.submit(compiled, attend) for name, attend in names.items()}
    for name, ready in waiting.items():
        try:
            seconds = best(ready.result(), jax.tree.map(jnp.copy, state)) / (calls * LOOPS)
            say(what=what, kernel=name, us=seconds * 1e6, TBps=size / seconds / 1e12, **more)
        except Exception as error:
            say(what=what, kernel=name, failed=str(error)[-600:], **more)


def plain(names: dict[str, Attend], what: str, shapes: dict[str, float], pages: tuple[int, ...]) -> None:
    for shape, bar in shapes.items():
        B, S = map(int, shape.split("x"))
        for page in pages:
            calls = calls_of(B, S)
            pools, *rows = arrays_of(B, S, page, calls)
            q = normal(jax.random.key(1), (B, N, H))
            repeats = calls * -(-BODY // calls)

            def step(attend: Attend, pools: Any = pools, rows: Any = rows, repeats: int = repeats) -> Any:
                def body(x: Any, pools: Any) -> Any:
                    each = [*pools] * (repeats // len(pools))
                    return functools.reduce(lambda x, own: attend(x, *own, *rows, scale=H**-0.5), each, x)

                return _Bound(jax.jit(lambda x, pools: looped(functools.partial(body, pools=pools), x)), pools)

            size = bytes_of(B, S)
            report(what, names, step, q, size, repeats, shape=shape, page=page, bar=bar, predicted=PREDICTED[shape])
            del pools, step


class _Bound:
    """A jitted function of a state and of arrays that stay: compiled with both, run with the state alone."""

    def __init__(self, jitted: Any, fixed: Any) -> None:
        self.jitted, self.fixed = jitted, fixed

    def lower(self, state: Any) -> _Bound:
        return _Bound(self.jitted.lower(state, self.fixed), self.fixed)

    def compile(self) -> Callable[[Any], Any]:
        compiled = self.jitted.compile()
        return lambda state: compiled(state, self.fixed)


def built_all(wanted: dict[str, Variant]) -> dict[str, Attend]:
    """Several builds at a time; what cannot be built is said, and missing."""

    def one(item: tuple[str, Variant]) -> tuple[str, Attend | None]:
        try:
            return item[0], functools.partial(cuda.paged_attention_decode, kernel=kernel(item[1]))
        except Exception as error:
            say(what="build", kernel=item[0], failed=str(error)[-600:])
            return item[0], None

    with ThreadPoolExecutor(4) as pool:
        return {name: attend for name, attend in pool.map(one, wanted.items()) if attend is not None}


def timed() -> None:
    plain({**built_all(VARIANTS), "triton": triton.paged_attention_decode}, "time", BARS, (64,))


def splits() -> None:
    plain(built_all(SPLITS), "splits", {shape: BARS[shape] for shape in ("32x1024", "8x1024", "1x8192")}, (64,))


def heads(variants: dict[str, Variant] = VARIANTS) -> None:
    """With rotation and new keys and values, as a step of a model calls it."""
    for shape, predicted in HEADS.items():
        B, S = map(int, shape.split("x"))
        calls, page = calls_of(B, S), 64
        pools, *rows = arrays_of(B, S, page, calls)
        angles = jnp.ones((B, H // 2), jnp.float32)
        qkv = normal(jax.random.key(1), (B, (N + 2 * K) * H))
        made = Heads(qkv, jnp.cos(angles), jnp.sin(angles), K=K, dtype=jnp.bfloat16)

        def step(attend: Attend, made: Any = made, rows: Any = rows) -> Any:
            def layers(before: Any) -> Any:
                out, pools = before
                for i, own in enumerate(pools):
                    new, *own = attend(made, *own, *rows, scale=H**-0.5)
                    out, pools = out + new, [*pools[:i], tuple(own), *pools[i + 1 :]]
                return out, pools

            return jax.jit(functools.partial(looped, layers), donate_argnums=0)

        state = jnp.zeros((B, N, H), jnp.bfloat16), pools
        ours = {name: functools.partial(cuda.decode_heads, kernel=kernel(flags)) for name, flags in variants.items()}
        names: dict[str, Attend] = {**ours, "triton": triton.decode_heads}
        report("heads", names, step, state, bytes_of(B, S), calls, shape=shape, page=page, predicted=predicted)
        del pools, state


def bits(array: Any) -> np.ndarray:
    return np.asarray(array).view(np.uint16)


def check() -> None:
    """Hostile shapes against the reference; the same bits again, alone, and in the kernel's other calls."""
    built_all(VARIANTS)  # and registered before threads ask for them
    for way, flags in VARIANTS.items():
        with ThreadPoolExecutor(16) as pool:
            waiting = [pool.submit(_prepared, spec, flags) for spec in CHECKED]
        for spec, ready in zip(CHECKED, waiting, strict=True):
            try:
                _check(way, spec, *ready.result())
            except Exception:
                say(what="check", kernel=way, spec=spec.name, failed=traceback.format_exc()[-1200:])


def _alone(spec: DecodeAttentionSpec, arguments: tuple[Any, ...], row: int) -> tuple[Any, ...]:
    """The arguments of one row."""
    given, *pools, table, lengths = arguments
    part = slice(row, row + 1)
    qkv = given.qkv[:, part] if given.parts else given.qkv[part]
    rotation = given.cos[part], given.sin[part]
    own = Heads(qkv, *rotation, given.norms, given.bias, K=spec.K, eps=given.eps, dtype=given.dtype)
    return own, *pools, table[part], lengths[part]


def _prepared(spec: DecodeAttentionSpec, flags: Variant) -> tuple[Any, ...]:
    """The arguments; compiled for them, most of a check's time: the reference, the kernel, also for one row."""
    arguments, scale = jax.tree.map(jnp.asarray, spec.inputs()), spec.paged.scale
    ours = jax.jit(functools.partial(cuda.decode_heads, scale=scale, kernel=kernel(flags)))
    expects = jax.jit(functools.partial(reference, scale=scale)).lower(*arguments).compile()
    return arguments, expects, ours.lower(*arguments).compile(), ours.lower(*_alone(spec, arguments, 0)).compile()


def _check(way: str, spec: DecodeAttentionSpec, arguments: Any, expects: Attend, ours: Attend, of_one: Attend) -> None:
    lengths = arguments[-1]
    want, got = expects(*arguments), ours(*arguments)
    live = np.flatnonzero(np.asarray(lengths))
    out, expected = np.asarray(got[0], np.float64), np.asarray(want[0], np.float64)
    error = float(np.linalg.norm(out - expected) / (np.linalg.norm(expected) or 1.0))
    near = [np.allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2**-7, atol=2**-6, equal_nan=True)
            for a, b in zip(got[1:], want[1:], strict=True)]  # fmt: skip
    again = all(np.array_equal(bits(ours(*arguments)[0]), bits(got[0])) for _ in range(20))
    alone = [np.array_equal(bits(of_one(*_alone(spec, arguments, row))[0])[0], bits(got[0])[row]) for row in live[:4]]
    zeros = not out[np.asarray(lengths) == 0].any()
    row = dict(zeros=zeros, pages_right=near, repeats_equal=again, alone_equal=alone)
    say(
        what="check",
        kernel=way,
        spec=spec.name,
        error=error,
        **row,
        good=bool(error < 1e-2 and all((*near, zeros, again, *alone))),
    )


SECTIONS = {"check": check, "time": timed, "heads": heads, "splits": splits}


def main(names: list[str]) -> None:
    for name in names or list(SECTIONS):
        try:
            SECTIONS[name]()
        except Exception:
            say(what=name, failed=traceback.format_exc()[-1500:])


if __name__ == "__main__":
    main(sys.argv[1:])
