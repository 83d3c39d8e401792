"""Attention over parts of the keys, and parts merged, against softmax over all of them in f64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import implementations
from pallas_kernels.partial_attention.api import partial_attention
from pallas_kernels.partial_attention.specs import PARTIAL_ATTENTION_SPECS


def arrays(spec):
    """Pages in a shuffled order; entries past the visible keys are poisoned, memory no query sees is NaN."""
    rng = np.random.default_rng(0)
    rows = max(spec.rows) + 1
    most = [max((v for v, r in zip(spec.visible, spec.rows) if r == row), default=0) for row in range(rows)]
    width = max(1, -(-max(most) // spec.page_size))
    pages = rng.permutation(rows * width).reshape(rows, width).astype(np.int32)
    shape = (rows * width, spec.kv_heads, spec.page_size, spec.head_dim)
    k, v = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    table = np.full((rows, width), -123456, np.int32)
    for row, count in enumerate(most):
        for key in range(count):
            page, at = pages[row, key // spec.page_size], key % spec.page_size
            table[row, key // spec.page_size] = page
            k[page, :, at], v[page, :, at] = rng.standard_normal((2, spec.kv_heads, spec.head_dim))
    q = rng.standard_normal((len(spec.rows), spec.heads, spec.head_dim)).astype(np.float32)
    return q, k, v, table


def expected(spec, q, k, v, table, t):
    seen, table_row = spec.visible[t], table[spec.rows[t]]
    places = [(table_row[i // spec.page_size], i % spec.page_size) for i in range(seen)]
    if not seen:
        return np.zeros(q.shape[1:]), np.full(spec.heads, -1e30)
    group = spec.heads // spec.kv_heads
    keys = np.repeat(np.array([k[p, :, a] for p, a in places], np.float64), group, axis=1)  # [keys, N, H]
    values = np.repeat(np.array([v[p, :, a] for p, a in places], np.float64), group, axis=1)
    scores = np.einsum("nh,snh->ns", q[t].astype(np.float64), keys) * 0.1
    lse = np.log(np.exp(scores).sum(axis=1))
    return np.einsum("ns,snh->nh", np.exp(scores - lse[:, None]), values), lse


@pytest.mark.parametrize("way", [each.name for each in implementations("partial_attention", "cpu")])
@pytest.mark.parametrize("spec", PARTIAL_ATTENTION_SPECS, ids=lambda spec: spec.name)
def test_outputs_and_log_sums_are_those_of_the_visible_keys(spec, way):
    q, k, v, table = arrays(spec)
    rows, visible = np.array(spec.rows, np.int32), np.array(spec.visible, np.int32)
    args = map(jnp.asarray, (q, k, v, table, rows, visible))
    out, lse = partial_attention(*args, scale=0.1, implementation=way)
    for t in range(len(rows)):
        want_out, want_lse = expected(spec, q, k, v, table, t)
        np.testing.assert_allclose(out[t], want_out, atol=2e-6)
        np.testing.assert_allclose(lse[t], want_lse, rtol=2e-6, atol=2e-6)


def test_wrong_arguments_are_named():
    q, pages = jnp.zeros((3, 4, 8), jnp.float32), jnp.zeros((2, 3, 4, 8), jnp.float32)
    table, count = jnp.zeros((1, 1), jnp.int32), jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match="multiple of 3 kv heads"):
        partial_attention(q, pages, pages, table, count, count, scale=1.0)
    pages = pages[:, :2]
    with pytest.raises(ValueError, match="visible"):
        partial_attention(q, pages, pages, table, count, count[:2], scale=1.0)
