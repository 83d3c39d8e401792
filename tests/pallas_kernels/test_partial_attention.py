"""Attention over parts of the keys, and parts merged, against softmax over all of them in f64."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.kernel_backends import ON_GPU
from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import get_races

from pallas_kernels.dispatch import implementations
from pallas_kernels.partial_attention.api import partial_attention
from pallas_kernels.partial_attention.specs import PARTIAL_ATTENTION_SPECS, Spec

KERNELS = {"gpu": "mosaic_sm90", "interpret": "mosaic_sm90_interpret"}


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


@pytest.mark.parametrize("platform", ["gpu"] if ON_GPU else ["interpret"])
@pytest.mark.parametrize(("name", "queries"), [("decode", 1), ("chunk", 40)])
def test_kernels_give_outputs_and_log_sums_of_the_visible_keys(platform, name, queries):
    """A device of two holds every second page of 32 keys of a row; a row of nothing and padding come after."""
    own = np.arange(queries) + 100 - queries
    visible = own // 64 * 32 + np.minimum(own % 64 + 1, 32)
    spec = Spec(name, 4, 2, 64, 32, (*visible, 0, 0), (*[0] * queries, 1, 1))
    q, k, v, table = arrays(spec)
    q, k, v = (array.astype(jnp.bfloat16) for array in (q, k, v))
    rows, visible = np.array(spec.rows, np.int32), np.array(spec.visible, np.int32)
    starts = None if name == "decode" else jnp.array([0, queries, queries + 1], jnp.int32)
    args = map(jnp.asarray, (q, k, v, table, rows, visible))
    out, lse = partial_attention(*args, scale=0.1, query_starts=starts, implementation=KERNELS[platform])
    assert out.dtype == lse.dtype == jnp.float32
    for t in (0, queries // 2, queries - 1, queries):
        want_out, want_lse = expected(spec, *(x.astype(np.float32) for x in (q, k, v)), table, t)
        np.testing.assert_allclose(out[t], want_out, atol=2e-2)
        np.testing.assert_allclose(lse[t], want_lse, rtol=1e-5, atol=1e-5)
    if platform == "interpret" and starts is not None:
        assert not get_races().races_found


def test_narrow_pages_mean_their_scaled_values():
    spec = PARTIAL_ATTENTION_SPECS[1]
    q, k, v, table = arrays(spec)
    k, v = (np.nan_to_num(pool).astype(jnp.float8_e4m3fn) for pool in (k, v))
    scales = np.array([[0.5, 2.0], [4.0, 0.25]], np.float32)
    wide = [pool.astype(np.float32) * scale[:, None, None] for pool, scale in zip((k, v), scales)]
    rest = table, np.array(spec.rows, np.int32), np.array(spec.visible, np.int32)
    same, narrow = (
        partial_attention(*map(jnp.asarray, (q, *pools, *rest)), scale=0.1, **options)
        for pools, options in ((wide, {}), ((k, v), dict(zip(("k_scale", "v_scale"), map(jnp.asarray, scales)))))
    )
    for got, want in zip(narrow, same):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_wrong_arguments_are_named():
    q, pages = jnp.zeros((3, 4, 8), jnp.float32), jnp.zeros((2, 3, 4, 8), jnp.float32)
    table, count = jnp.zeros((1, 1), jnp.int32), jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match=r"does not fit k_pages.*K \| N"):
        partial_attention(q, pages, pages, table, count, count, scale=1.0)
    pages = pages[:, :2]
    with pytest.raises(ValueError, match="visible"):
        partial_attention(q, pages, pages, table, count, count[:2], scale=1.0)
