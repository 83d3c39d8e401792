"""Routed experts on a GPU at the shape of Qwen3-30B-A3B, against what the card can read and compute in the same run.

In: nothing but a GPU. Out: a table: microseconds a layer's experts take, TB/s over the bytes of the experts in use (up
to 1024 tokens) or TFLOP/s, and the share of the ceiling. `whole` is the op as a model calls it (plan, both kernels,
sum); `kernels` is the two kernels on a plan made before, and one small XLA kernel that makes a call wait for the last.
Calls are chained in one jitted function, each with other experts, so that the L2 cache does not hold them.

    python -m benchmarks.routed_experts [--tokens 1,8,32,128,8192] [--sweep]
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels import Bench, ceilings
from pallas_kernels.grouped_matmul import api, mosaic_sm90, plan, reference, routed

D, F, E, K = 2048, 768, 128, 8
CALLS = 8


def weights() -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    gate_up = jax.random.normal(keys[0], (E, 2 * F, D), jnp.bfloat16) * D**-0.5
    return gate_up.astype(jnp.bfloat16), (jax.random.normal(keys[1], (E, D, F), jnp.bfloat16) * 0.3).astype(
        jnp.bfloat16
    )


def routing(T: int, calls: int) -> list[np.ndarray]:
    """Each call's experts; consecutive calls of one token share none."""
    rng = np.random.default_rng(T)
    if T == 1:
        return list(rng.permutation(E)[: calls * K].reshape(calls, 1, K).astype(np.int32))
    return list(np.argsort(rng.random((calls, T, E)), axis=2)[:, :, :K].astype(np.int32))


def work(ids: list[np.ndarray]) -> float:
    """Bytes of the experts in use, or operations, a call."""
    T = ids[0].shape[0]
    distinct = float(np.mean([len(np.unique(each)) for each in ids]))
    return distinct * 3 * D * F * 2 if T <= 1024 else T * K * 6.0 * D * F


def inputs(T: int, ids: list[np.ndarray]) -> tuple[Any, ...]:
    x = jax.random.normal(jax.random.key(1), (T, D), jnp.bfloat16)
    share = jnp.full((T, K), 1 / K, jnp.float32)
    return x, *weights(), [jnp.asarray(each) for each in ids], share


def add(bench: Bench, T: int, label: str, options: dict[str, Any]) -> None:
    ids = routing(T, CALLS if T <= 1024 else 2)
    op = "grouped_matmul.decode" if T <= 1024 else "grouped_matmul"
    names = op, f"{T} tokens"
    make = functools.partial(inputs, T, ids)

    def whole(x: Any, gate_up: Any, down: Any, ids: Any, share: Any) -> Any:
        call = jax.jit(functools.partial(routed.routed_mlp, elsewhere=False, **options))  # lowered once for all calls
        return functools.reduce(lambda x, each: call(x, gate_up, down, each, share), ids, x)

    bench.add((*names, f"whole {label}"), whole, make, len(ids), work(ids), 10)
    bench.add(
        (*names, f"kernels {label}"), _kernels(T, options), _planned(T, ids, options, make), len(ids), work(ids), 10
    )


def _plan(T: int, ids: Any, options: dict[str, Any]) -> plan.Plan:
    if options.get("shared_tokens", routed.SHARED_TOKENS) >= T:
        return plan.shared_tile(ids, E, max(8, -(-T // 8) * 8), False)
    return plan.sorted_tiles(ids, E, options.get("width") or plan.tile_width(T, K, E))


def _planned(T: int, ids: list[np.ndarray], options: dict[str, Any], make: Callable[[], Any]) -> Callable[[], Any]:
    def made() -> tuple[Any, ...]:
        x, gate_up, down, _, _ = make()
        plans = [_plan(T, jnp.asarray(each), options) for each in ids]
        tokens = plans[0].tokens
        x = x[None] if tokens is None else x[tokens]
        return x, gate_up, down, [(each.experts, each.live) for each in plans]

    return made


def _kernels(T: int, options: dict[str, Any]) -> Callable[..., Any]:
    product = functools.partial(mosaic_sm90.tiles_matmul, blocks=options.get("blocks"))
    call = jax.jit(product, static_argnames=("gated", "early"))

    def chain(x: Any, gate_up: Any, down: Any, plans: Any) -> Any:
        out = []
        for experts, count in plans:  # a call waits for the one before through its count
            if out:
                count = count + (out[-1][0, 0, 0] != out[-1][0, 0, 0]).astype(jnp.int32)
            hidden = call(x, gate_up, experts, count, gated=True)
            out.append(call(hidden, down, experts, count, gated=False, early=True))
        return out[-1]

    return chain


def check() -> float:
    """Worst relative error against the reference, over token counts, hot and absent experts; bits by tile width."""
    logits = jax.random.normal(jax.random.key(9), (64, E)) * 3
    found, expected = (api.route(logits, k=K, norm_topk=True, implementation=name) for name in ("triton", "reference"))
    same, apart = bool((found[0] == expected[0]).all()), float(jnp.abs(found[1] - expected[1]).max())
    print(f"router: same experts {same}, weights {apart:.1e} apart")
    gate_up, down = weights()
    reference_run, worst = jax.jit(reference.routed_mlp), 0.0
    for T, hot in ((9, True), (300, True)):
        ids = routing(T, 1)[0]
        if hot:
            ids = np.where((ids != 5).all(axis=1, keepdims=True) & (np.arange(K) == 3), 5, ids).astype(np.int32)
        ids[0, :2] = -1, E
        x = jax.random.normal(jax.random.key(T), (T, D), jnp.bfloat16)
        share = jax.random.uniform(jax.random.key(T + 1), (T, K))
        run = jax.jit(routed.routed_mlp, static_argnames=("shared_tokens", "width"))
        got = run(x, gate_up, down, ids, share)
        expected = np.asarray(reference_run(x, gate_up, down, ids, share), np.float32)
        error = float(np.linalg.norm(np.asarray(got, np.float32) - expected) / np.linalg.norm(expected))
        worst = error if not error <= worst else worst
        for width in (16, 128):
            other = run(x, gate_up, down, ids, share, shared_tokens=0, width=width)
            alone = run(x[-1:], gate_up, down, ids[-1:], share[-1:])
            same = bool((other == got).all() & (alone[0] == got[-1]).all())
            print(
                f"{T} tokens{' hot' * hot}: error {error:.1e}, bits {'same' if same else 'DIFFER'} in tiles of {width}"
            )
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,8,32,128,8192")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    worst = check()
    bench = Bench()
    for T in map(int, options.tokens.split(",")):
        add(bench, T, "as shipped", {})
        for label, changes in sweep(T) if options.sweep else ():
            add(bench, T, label, changes)
    measured = ceilings()
    print(measured, flush=True)
    bench.run(measured)
    return 0 if worst < 1e-2 else 1


def sweep(T: int) -> list[tuple[str, dict[str, Any]]]:
    if T > 128:
        return []
    return [("two programs a multiprocessor", {"blocks": mosaic_sm90.Blocks(stages=2 if T == 32 else 3)})]


if __name__ == "__main__":
    raise SystemExit(main())
