"""The dense part of a decode step on a GPU: the persistent chain kernel against XLA's products, in us a layer.

In: nothing but a GPU. Out: lines on the terminal, one JSON object each. Weights of the layers are distinct, so the L2
cache holds none of them. Times are of one jitted call of all layers, host clock over several calls in a row, the best
of three.

    python -m benchmarks.chain [correct barrier chain matmul]
"""

from __future__ import annotations

import functools
import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tuning
from pallas_kernels.matmul import streamed_sm90 as kernel

Stage, Blocks = kernel.Stage, kernel.Blocks
BF, F32 = jnp.bfloat16, jnp.float32
SHAPES = {"llama-8b": (8, 4096, 4096, 14336, 6144), "qwen3-0.6b": (8, 1024, 2048, 3072, 4096)}  # L, D, NH, F, Q


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def best(run: Callable[..., Any], *args: Any, reps: int = 10) -> float:
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(4):
        start = time.perf_counter()
        outs = [run(*args) for _ in range(reps)]
        jax.block_until_ready(outs[-1])
        times.append((time.perf_counter() - start) / reps)
    return min(times)


@functools.partial(jax.jit, static_argnames=("shape", "scale"))
def normal(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
    return (jax.random.normal(key, shape, F32) * scale).astype(BF)


def layer_weights(seed: int, D: int, NH: int, F: int, Q: int) -> tuple[jax.Array, ...]:
    k = jax.random.split(jax.random.key(seed), 6)
    return (
        normal(k[0], (D, NH), NH**-0.5),
        normal(k[1], (2 * F, D), D**-0.5),
        normal(k[2], (D, F), F**-0.5),
        normal(k[3], (Q, D), D**-0.5),
        (1.0 + normal(k[4], (D,), 0.1)).astype(BF),
        (1.0 + normal(k[5], (D,), 0.1)).astype(BF),
    )


def stages(D: int, NH: int, F: int, Q: int) -> tuple[Any, ...]:
    return (
        Stage(0, NH, D, residual=1, normed=0),
        Stage(-1, D, F, gated=True, scaled_by=0),
        Stage(-2, F, D, residual=-1, normed=0),
        Stage(-3, D, Q, scaled_by=2),
    )


def project(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=F32)


def rms_norm(x: jax.Array, w: jax.Array) -> jax.Array:
    wide = x.astype(F32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5) * w.astype(F32)).astype(BF)


def plain_layer(a: jax.Array, x: jax.Array, w: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    wo, wg, wd, wq, n1, n2 = w
    x = x + project(a[:, : wo.shape[1]], wo).astype(BF)
    gate, up = jnp.split(project(rms_norm(x, n1), wg).astype(BF).astype(F32), 2, -1)
    h = (jax.nn.silu(gate) * up).astype(BF)
    x2 = x + project(h, wd).astype(BF)
    return project(rms_norm(x2, n2), wq).astype(BF), x2, x, h


def chain_layer(a: jax.Array, x: jax.Array, w: tuple[jax.Array, ...], **kw: Any) -> tuple[jax.Array, ...]:
    wo, wg, wd, wq, n1, n2 = w
    st = stages(x.shape[1], wo.shape[1], wd.shape[1], wq.shape[0])
    o = kernel.chain([a, x], [wo, wg, wd, wq], [n1[None], None, n2[None], None], [None] * 4, st, **kw)
    return o[3][0], o[2][0], o[0][0], o[1][0]


def error(got: Any, want: Any) -> float:
    g, w = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(g - w) / np.linalg.norm(w))


blocks_for = kernel.blocks_for


def smoke() -> None:
    """One product alone, checked: if this hangs nothing else is worth running."""
    x, w = normal(jax.random.key(0), (8, 4096), 1.0), normal(jax.random.key(1), (4096, 4096), 4096**-0.5)
    run = jax.jit(lambda x, w: kernel.chain([x], [w], [None], [None], (Stage(0, 4096, 4096),))[0][0])
    say(what="smoke", error=error(run(x, w), jax.jit(project)(x, w)))


def correct() -> None:
    _, *dims = SHAPES["llama-8b"]
    w = layer_weights(1, *dims)
    D, NH = dims[0], dims[1]
    a, x = normal(jax.random.key(5), (128, NH), 1.0), normal(jax.random.key(6), (128, D), 1.0)
    want = [np.asarray(each) for each in jax.jit(plain_layer)(a, x, w)]
    rows: dict[int, Any] = {}
    for M in (8, 32, 128, 1):
        run = jax.jit(functools.partial(chain_layer, blocks=blocks_for(M)))
        try:
            got = [np.asarray(each) for each in run(a[:M], x[:M], w)]
            same = all(np.array_equal(g, np.asarray(h)) for _ in range(10) for g, h in zip(got, run(a[:M], x[:M], w)))
        except Exception as fault:
            say(what="correct", M=M, failed=str(fault)[:600])
            continue
        rows[M] = got
        say(
            what="correct",
            M=M,
            errors=dict(zip(("qkv", "x2", "x1", "h"), (error(g, e[:M]) for g, e in zip(got, want)))),
            repeats_equal=same,
            rows_equal_M8=all(np.array_equal(g[:8], h[:M]) for g, h in zip(got, rows.get(8, got))),
        )


def tune() -> None:
    """Which buffers stream fastest, on the largest product; the best goes where the kernels look for it."""
    K, N, L = 4096, 28672, 4
    ws = [normal(jax.random.key(i), (N, K), K**-0.5) for i in range(L)]
    found: dict[str, dict[str, Any]] = {}
    for M, choices in TUNED.items():
        x, times = normal(jax.random.key(7), (M, K), 1.0), {}
        for choice in choices:
            blocks = Blocks(**choice)
            run = many(functools.partial(single, blocks=blocks))
            began = time.time()
            try:
                times[blocks] = best(run, x, ws, reps=20) / L
                say(what="tune", M=M, **choice, us=round(times[blocks] * 1e6, 1), took=round(time.time() - began, 1))
            except Exception as fault:
                say(what="tune", M=M, **choice, failed=str(fault)[:300])
        same_bits = {blocks: s for blocks, s in times.items() if blocks.depth == Blocks().depth}
        if same_bits:
            won = min(same_bits, key=lambda blocks: same_bits[blocks])
            found[f"rows {M}"] = {"slots": won.slots, "x_slots": won.x_slots}
    device = tuning.device_name()
    if device and found:
        path = tuning.save({"streamed_sm90": found}, device, "python -m benchmarks.chain tune")
        say(what="tuned", file=path.name, **found)


def _choice(slots: int, x_slots: int, depth: int = 64) -> dict[str, int]:
    return {"slots": slots, "x_slots": x_slots, "depth": depth}


TUNED = {
    8: [_choice(12, 8), _choice(12, 12), _choice(6, 6, 128)],
    32: [_choice(10, 5), _choice(10, 10), _choice(9, 12)],
    128: [_choice(6, 3), _choice(5, 5), _choice(5, 4)],
}


def barrier() -> None:
    M, D = 8, 4096
    for depth in (512,):
        times = {}
        for n in (4, 20):
            st = (Stage(0, depth, D), *(Stage(-1 - i, depth, D) for i in range(n - 1)))
            ws = [normal(jax.random.key(i), (D, depth), depth**-0.5) for i in range(n)]
            run = jax.jit(lambda x, ws, st=st, n=n: kernel.chain([x], ws, [None] * n, [None] * n, st)[-1][0])
            times[n] = best(run, normal(jax.random.key(0), (M, depth), 1.0), ws)
        per = (times[20] - times[4]) / 16
        say(what="barrier", depth=depth, us_per_stage=per * 1e6, us_of_4=times[4] * 1e6, weight_MB=D * depth * 2e-6)


def whole(layer: Callable[..., Any], M: int, ws: Any) -> float:
    @jax.jit
    def run(a: jax.Array, x: jax.Array, ws: Any) -> Any:
        for w in ws:
            a, x, *_ = layer(a, x, w)
        return a, x

    D, Q = ws[0][0].shape[0], ws[0][3].shape[0]
    a, x = normal(jax.random.key(5), (M, Q), 1.0), normal(jax.random.key(6), (M, D), 1.0)
    began = time.time()
    lowered = run.lower(a, x, ws)
    middle = time.time()
    compiled = lowered.compile()
    say(what="compile", lower=round(middle - began, 1), compile=round(time.time() - middle, 1))
    return best(compiled, a, x, ws, reps=40)


def report(what: str, shape: str, M: int, ws: Any, layer: Callable[..., Any]) -> None:
    L, D, NH, F, Q = SHAPES[shape]
    began = time.time()
    try:
        s = whole(layer, M, ws)
    except Exception as fault:  # each choice's failure is reported, and the rest still measured
        traceback.print_exc(limit=-2)
        say(what=what, shape=shape, M=M, failed=str(fault)[:300])
        return
    terabytes = 2e-12 * L * (D * NH + 3 * D * F + Q * D)
    took = round(time.time() - began, 1)
    say(what=what, shape=shape, M=M, us_layer=round(s * 1e6 / L, 1), TBps=round(terabytes / s, 3), took=took)


def chains() -> None:
    for shape, (L, *dims) in SHAPES.items():
        ws = [layer_weights(i, *dims) for i in range(L)]
        for M in (8, 32, 128):
            report("chain", shape, M, ws, functools.partial(chain_layer, blocks=blocks_for(M)))
            report("xla", shape, M, ws, plain_layer)
        report("chain pdl", shape, 8, ws, functools.partial(chain_layer, blocks=blocks_for(8), pdl=True))
        del ws


def single(x: jax.Array, w: jax.Array, blocks: Any = None) -> jax.Array:
    """One product by the streamed kernel."""
    stage = Stage(0, x.shape[1], w.shape[0])
    return kernel.chain([x], [w], [None], [None], (stage,), blocks=blocks or blocks_for(x.shape[0]))[0][0]


def rounded(x: jax.Array, w: jax.Array) -> jax.Array:
    return project(x, w).astype(BF)


def matmuls() -> None:
    for K, N in ((4096, 28672), (4096, 4096), (4096, 6144), (14336, 4096)):
        L, M = max(2, min(8, int(2e9 // (K * N * 2)))), 8
        ws = [normal(jax.random.key(i), (N, K), K**-0.5) for i in range(L)]
        x = normal(jax.random.key(7), (M, K), 1.0)
        for label, product in (("xla", rounded), ("ours", single)):
            s = best(many(product), x, ws, reps=5) / L
            say(what="matmul", kind=label, K=K, N=N, M=M, us=round(s * 1e6, 1), TBps=round(K * N * 2e-12 / s, 3))
        del ws


def many(product: Callable[..., jax.Array]) -> Callable[..., Any]:
    return jax.jit(lambda x, ws: [product(x, w) for w in ws])


if __name__ == "__main__":
    known = {"smoke": smoke, "tune": tune, "correct": correct, "barrier": barrier, "chain": chains, "matmul": matmuls}
    for each in sys.argv[1:] or known:
        began = time.time()
        try:
            known[each]()
        except Exception as fault:
            traceback.print_exc()
            say(what=each, failed=str(fault)[:500])
        say(what="section", name=each, seconds=round(time.time() - began, 1))
