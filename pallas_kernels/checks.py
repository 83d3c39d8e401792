"""What every attention op asks of its arguments, whatever holds the keys.

In: arrays and settings, with the words that name them. Out: nothing, or ValueError with what was asked and what came.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def check_heads(q_form: str, q: jax.Array, k_form: str, k: jax.Array, v: jax.Array) -> None:
    """`k_form` names the keys and their axes, "k[S, K, H]": heads are the second, and the last as wide as the queries'.

    Values are named as the keys are, with a v.
    """
    name, rank = k_form.partition("[")[0], k_form.count(",") + 1
    if q.ndim != 3 or k.ndim != rank or 0 in q.shape or 0 in k.shape:
        raise ValueError(f"need {q_form} and {k_form}, none empty; got {q.shape}, {k.shape}")
    if k.shape != v.shape or k.dtype != v.dtype:
        keys, values = (f"{each.dtype}{list(each.shape)}" for each in (k, v))
        raise ValueError(f"{name} {keys} and v{name[1:]} {values} must agree")
    if q.shape[2] != k.shape[-1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q_form} {q.shape} does not fit {k_form} {k.shape}: H = H, K | N")
    for each, array in (("q", q), (name, k)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{each} must be floating, got {array.dtype}")


def check_scores(
    N: int, scale: float, window: int | None = None, soft_cap: float | None = None, sinks: jax.Array | None = None
) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be None or at least 1 (it counts the query itself), got {window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap must be None or positive, got {soft_cap}")
    if sinks is not None and (sinks.shape != (N,) or sinks.dtype != jnp.float32):
        raise ValueError(f"sinks must be f32[N] = f32[{N}], got {sinks.dtype}{list(sinks.shape)}")
