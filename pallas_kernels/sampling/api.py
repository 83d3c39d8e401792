"""One token a row from logits: argument checks, then the best implementation that accepts.

In: logits, and what rows ask for. Out: tokens. The greedy choice; what requests change about logits (masks, biases,
penalties); a token from changed logits, in which one that must not be chosen is -inf; and `draw`, the last two in one.
The same row gives the same token whatever its batch. This module does not know logprobs, nor requests.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import current_platform, dispatch, imported, register

_ROOM = "pallas_kernels.sampling"
register("sampling.greedy", "triton", imported(f"{_ROOM}.adjust:greedy"), platforms=("gpu",))
register("sampling.greedy", "triton_interpret", imported(f"{_ROOM}.interpreted:greedy"), platforms=("interpret",))
register("sampling.greedy", "reference", imported(f"{_ROOM}.reference:greedy"))
register("sampling.adjusted", "triton", imported(f"{_ROOM}.adjust:adjusted"), platforms=("gpu",))
register("sampling.adjusted", "triton_interpret", imported(f"{_ROOM}.interpreted:adjusted"), platforms=("interpret",))
register("sampling.adjusted", "reference", imported(f"{_ROOM}.reference:adjusted"))
register("sampling", "triton", imported(f"{_ROOM}.triton:sample"), platforms=("gpu",))
register("sampling", "triton_interpret", imported(f"{_ROOM}.interpreted:sample"), ("interpret",))
register("sampling", "reference", imported(f"{_ROOM}.reference:sample"))
register("sampling.draw", "cuda", imported(f"{_ROOM}.cuda:draw"), platforms=("gpu",))
register("sampling.draw", "apart", imported(f"{_ROOM}.api:draw_apart"), platforms=("gpu",))
register("sampling.draw", "cuda_emulated", imported(f"{_ROOM}.interpreted:draw"), platforms=("interpret",))
register("sampling.draw", "reference", imported(f"{_ROOM}.reference:draw"))


def greedy(
    logits: jax.Array,  # f32[B, V]
    *,
    implementation: str | None = None,
    platform: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-> i32[B], the largest logit's token, the lowest among ties; bool[B], which rows hold one that is not finite."""
    _check_logits(logits)
    return dispatch("sampling.greedy", implementation=implementation, platform=platform)(logits)


def adjusted(
    logits: jax.Array,  # f32[B, V]
    counts: jax.Array,  # u16[S1, V]
    row: jax.Array,  # i32[B]
    mask: jax.Array,  # u32[B, ceil(V / 32)]
    bias_ids: jax.Array,  # i32[B, Nb]
    bias: jax.Array,  # f32[B, Nb]
    repetition: jax.Array,  # f32[B]
    frequency: jax.Array,  # f32[B]
    presence: jax.Array,  # f32[B]
    *,
    implementation: str | None = None,
    platform: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> (f32[B, V], each row's largest f32[B], bool[B]: which rows of `logits` hold one that is not finite).

    In this order: tokens whose bit t % 32 of word t // 32 is not set in `mask` get -inf; bias is added to the tokens
    bias_ids, distinct in a row, V = no entry; where the row's line of `counts` (its low 15 bits how often the token was
    generated, its high bit whether it is in the prompt) is not 0, positive logits are divided by `repetition` and
    others multiplied; `frequency` times the generations and `presence`, once if there are any, are taken off.
    """
    _check_asked(logits, counts, row, mask, bias_ids, bias, repetition, frequency, presence)
    run = dispatch("sampling.adjusted", implementation=implementation, platform=platform)
    return run(logits, counts, row, mask, bias_ids, bias, repetition, frequency, presence)


def _check_asked(
    logits: jax.Array,
    counts: jax.Array,
    row: jax.Array,
    mask: jax.Array,
    bias_ids: jax.Array,
    bias: jax.Array,
    repetition: jax.Array,
    frequency: jax.Array,
    presence: jax.Array,
) -> None:
    _check_logits(logits)
    B, V = logits.shape
    if counts.ndim != 2 or counts.shape[1] != V or counts.dtype != jnp.uint16:
        raise ValueError(f"counts must be u16[S1, V = {V}], got {counts.dtype}{list(counts.shape)}")
    if mask.shape != (B, -(-V // 32)) or mask.dtype != jnp.uint32:
        raise ValueError(f"mask must be u32[{B}, {-(-V // 32)}] for V = {V}, got {mask.dtype}{list(mask.shape)}")
    if bias.ndim != 2 or bias_ids.shape != bias.shape or bias.shape[0] != B or bias.shape[1] == 0:
        raise ValueError(f"bias_ids and bias must be [B = {B}, Nb] alike, got {bias_ids.shape}, {bias.shape}")
    penalties = {"repetition": repetition, "frequency": frequency, "presence": presence}
    for name, array, dtype in (("row", row, jnp.int32), *((name, of, jnp.float32) for name, of in penalties.items())):
        if array.shape != (B,) or array.dtype != dtype:
            raise ValueError(f"{name} must be {jnp.dtype(dtype).name}[{B}], got {array.dtype}{list(array.shape)}")


def _check_logits(logits: jax.Array) -> None:
    if logits.ndim != 2 or 0 in logits.shape or logits.dtype != jnp.float32:
        raise ValueError(f"logits must be f32[B, V], not empty, got {logits.dtype}{list(logits.shape)}")


def sample(
    logits: jax.Array,  # f32[B, V]
    keys: jax.Array,  # u32[B, 2]
    temperature: jax.Array,  # f32[B]
    top_k: jax.Array,  # i32[B]
    top_p: jax.Array,  # f32[B]
    min_p: jax.Array,  # f32[B]
    best: jax.Array | None = None,  # f32[B]
    *,
    truncates: bool = True,
    implementation: str | None = None,
    platform: str | None = None,
) -> jax.Array:
    """-> i32[B]. Each row keeps a set of tokens and draws one with probability ~ exp(logit / temperature).

    In this order: min_p drops tokens less likely than min_p times the most likely; top_k (<= 0: off) keeps the k most
    likely of those, and all that tie with the k-th; top_p (1: off) keeps the smallest set of most likely tokens that
    holds top_p of what is left, at least one, and all that tie with its last. Probabilities are after temperature.
    temperature 0 takes the largest logit, the lowest index among ties, and ignores the rest.

    The draw is argmax of logits / temperature + Gumbel noise over the kept tokens. Token v's noise is
    -log(-log(1 - u)), u = (b + 1/2) / 2^32, where b is word v % 2 of Threefry-2x32 of the block (0, v // 2) under the
    row's key: every implementation draws the same token, up to rounding.
    `best` is each row's largest logit, for callers that know it; `truncates` false: top_k, top_p and min_p are off in
    every row. A row needs one finite logit, and neither NaN nor +inf; else its token is in range and means nothing.
    """
    _check_logits(logits)
    _check_drawn(logits.shape[0], keys, temperature, top_k, top_p, min_p)
    run = dispatch("sampling", implementation=implementation, platform=platform)
    best = logits.max(axis=1) if best is None else best
    return run(logits, keys, temperature, top_k, top_p, min_p, best, truncates=truncates)


def _check_drawn(
    B: int, keys: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array
) -> None:
    if keys.shape != (B, 2) or keys.dtype != jnp.uint32:
        raise ValueError(f"keys must be u32[B, 2] = u32[{B}, 2], got {keys.dtype}{list(keys.shape)}")
    for name, array, dtype in (
        ("temperature", temperature, jnp.float32),
        ("top_k", top_k, jnp.int32),
        ("top_p", top_p, jnp.float32),
        ("min_p", min_p, jnp.float32),
    ):
        if array.shape != (B,) or array.dtype != dtype:
            wanted = f"{jnp.dtype(dtype).name}[B] = {jnp.dtype(dtype).name}[{B}]"
            raise ValueError(f"{name} must be {wanted}, got {array.dtype}{list(array.shape)}")


def draw(
    logits: jax.Array,  # f32[B, V]
    counts: jax.Array,  # u16[S1, V]
    row: jax.Array,  # i32[B]
    mask: jax.Array,  # u32[B, ceil(V / 32)]
    bias_ids: jax.Array,  # i32[B, Nb]
    bias: jax.Array,  # f32[B, Nb]
    repetition: jax.Array,  # f32[B]
    frequency: jax.Array,  # f32[B]
    presence: jax.Array,  # f32[B]
    keys: jax.Array,  # u32[B, 2]
    temperature: jax.Array,  # f32[B]
    top_k: jax.Array,  # i32[B]
    top_p: jax.Array,  # f32[B]
    min_p: jax.Array,  # f32[B]
    *,
    truncates: bool = True,
    implementation: str | None = None,
    platform: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-> (i32[B], bool[B]): `sample` of what `adjusted` makes of the logits, and which rows are bad.

    A row is bad if it holds a logit that is not finite, or if no token is allowed; its token is in range.
    """
    asked = logits, counts, row, mask, bias_ids, bias, repetition, frequency, presence
    drawn = keys, temperature, top_k, top_p, min_p
    _check_asked(*asked)
    _check_drawn(logits.shape[0], *drawn)
    run = dispatch("sampling.draw", implementation=implementation, platform=platform)
    return run(*asked, *drawn, truncates=truncates)


def draws_alike(vocab_size: int) -> bool:
    """Whether `draw` is one kernel here, which takes as long and gives the same bits whatever `truncates` says."""
    if current_platform() != "gpu":
        return False
    from pallas_kernels.sampling import cuda

    try:
        cuda.refuse(jax.ShapeDtypeStruct((1, vocab_size), jnp.float32))
        cuda.library()
    except NotImplementedError:
        return False
    return True


def draw_apart(*arrays: jax.Array, truncates: bool = True) -> tuple[jax.Array, jax.Array]:
    """`draw` as two ops, each by the best that accepts it."""
    changed, best, bad = dispatch("sampling.adjusted")(*arrays[:9])
    return dispatch("sampling")(changed, *arrays[9:], best, truncates=truncates), bad | ~jnp.isfinite(best)
