"""Routed experts: argument checks, then the best implementation that accepts.

In: a router's logits (route), which experts each token goes to (planned), or tokens, every expert's weights, and which
experts each token goes to with what weight (routed_mlp). Out: experts and weights, tiles, or the weighted sums of their
outputs. Group sizes are data: no expert, or one for all tokens, costs no other compile. This module knows no layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch, imported, register
from pallas_kernels.grouped_matmul.plan import Plan

_ROOM = "pallas_kernels.grouped_matmul"
register("grouped_matmul", "mosaic_sm90", imported(f"{_ROOM}.routed:routed_mlp"), platforms=("gpu",))
register("grouped_matmul", "mosaic_sm90_interpret", imported(f"{_ROOM}.interpreted:routed_mlp"), ("interpret",))
register("grouped_matmul", "reference", imported(f"{_ROOM}.reference:routed_mlp"))
register("grouped_matmul.route", "triton", imported(f"{_ROOM}.router:route"), platforms=("gpu",))
register("grouped_matmul.route", "triton_interpret", imported(f"{_ROOM}.interpreted:route"), platforms=("interpret",))
register("grouped_matmul.route", "reference", imported(f"{_ROOM}.reference:route"))
register("grouped_matmul.plan", "triton", imported(f"{_ROOM}.planner:tiles"), platforms=("gpu",))
register("grouped_matmul.plan", "triton_interpret", imported(f"{_ROOM}.interpreted:tiles"), platforms=("interpret",))
register("grouped_matmul.plan", "reference", imported(f"{_ROOM}.plan:tiles"))


def route(
    logits: jax.Array,  # f32[T, E]
    *,
    k: int,
    norm_topk: bool,
    implementation: str | None = None,
    platform: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-> i32[T, k], f32[T, k]: each token's k most likely experts, best first, ties to the lower number.

    Weights are their softmax probabilities, with `norm_topk` scaled to sum to 1. A token with a NaN logit has NaN
    weights and experts in range.
    """
    if logits.ndim != 2 or 0 in logits.shape or logits.dtype != jnp.float32:
        raise ValueError(f"logits must be f32[T, E], not empty, got {logits.dtype}{list(logits.shape)}")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k must be 1 to E = {logits.shape[1]}, got {k}")
    run = dispatch("grouped_matmul.route", implementation=implementation, platform=platform)
    return run(logits, k=k, norm_topk=norm_topk)


def planned(
    expert_ids: jax.Array,  # i32[T, k]
    E: int,
    N: int,
    *,
    shared: bool,
    implementation: str | None = None,
    platform: str | None = None,
) -> Plan:
    """Tiles of N tokens and one of E experts each: with `shared` all T <= N tokens in every tile, else sorted pairs.

    A token's choices are distinct; one outside 0..E-1 takes part in nothing.
    """
    if expert_ids.ndim != 2 or 0 in expert_ids.shape or expert_ids.dtype != jnp.int32:
        raise ValueError(f"expert_ids must be i32[T, k], not empty, got {expert_ids.dtype}{list(expert_ids.shape)}")
    if shared and expert_ids.shape[0] > N:
        raise ValueError(f"{expert_ids.shape[0]} tokens do not fit a tile of {N}")
    run = dispatch("grouped_matmul.plan", implementation=implementation, platform=platform)
    return run(expert_ids, E, N, shared=shared)


def routed_mlp(
    x: jax.Array,  # [T, D]
    gate_up: jax.Array,  # [E, 2F, D]
    down: jax.Array,  # [E, D, F]
    expert_ids: jax.Array,  # i32[T, k]
    expert_weights: jax.Array,  # f32[T, k]
    *,
    elsewhere: bool = True,
    implementation: str | None = None,
    platform: str | None = None,
) -> jax.Array:
    """Sum over a token's choices of weight * down(silu(gate x) * up x) -> [T, D].

    `gate_up` holds all of an expert's gate rows, then its up rows. Products and the sum are f32; the hidden layer and
    an expert's output are rounded to x's dtype. A token's choices are distinct; one outside 0..E-1 adds nothing (under
    expert parallelism it is another device's). `elsewhere` False promises that there is none such, which saves work.
    """
    if x.ndim != 2 or gate_up.ndim != 3 or down.ndim != 3 or 0 in x.shape:
        raise ValueError(
            f"need x[T, D], gate_up[E, 2F, D], down[E, D, F]; got {x.shape}, {gate_up.shape}, {down.shape}"
        )
    E, D, F = down.shape
    if gate_up.shape != (E, 2 * F, D) or x.shape[1] != D:
        raise ValueError(f"x {x.shape}, gate_up {gate_up.shape} and down {down.shape} disagree on E, D or F")
    if gate_up.dtype != down.dtype:
        raise ValueError(f"gate_up and down must have one dtype, got {gate_up.dtype} and {down.dtype}")
    T = x.shape[0]
    if expert_ids.ndim != 2 or expert_ids.shape[0] != T or expert_ids.dtype != jnp.int32 or 0 in expert_ids.shape:
        raise ValueError(f"expert_ids must be i32[T, k] = i32[{T}, k], got {expert_ids.dtype}{list(expert_ids.shape)}")
    if expert_weights.shape != expert_ids.shape or expert_weights.dtype != jnp.float32:
        raise ValueError(
            f"expert_weights must be f32{list(expert_ids.shape)} like expert_ids, "
            f"got {expert_weights.dtype}{list(expert_weights.shape)}"
        )
    run = dispatch("grouped_matmul", implementation=implementation, platform=platform)
    return run(x, gate_up, down, expert_ids, expert_weights, elsewhere=elsewhere)
