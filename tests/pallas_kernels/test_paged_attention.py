import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import kernel_oracles as oracles
from helpers.kernel_backends import ON_GPU, jitted, pairs

from pallas_kernels.paged_attention import reference
from pallas_kernels.paged_attention.api import paged_attention, paged_attention_decode, paged_attention_verify
from pallas_kernels.paged_attention.specs import (
    PAGED_ATTENTION_DECODE_SPECS,
    PAGED_ATTENTION_REDUCED,
    PAGED_ATTENTION_SPECS,
    PagedAttentionSpec,
)

# bf16 outputs round at 2^-9 of values below 4, and the weights are rounded before they meet V
TOLERANCE = {"float32": 3e-6, "bfloat16": 2e-2}

cpu_only = pytest.mark.skipif(ON_GPU, reason="bitwise promises of the reference hold for XLA's CPU backend")


def check(got, spec, inputs):
    assert got.shape == inputs[0].shape
    assert got.dtype == inputs[0].dtype
    got = np.asarray(got, np.float64)
    expected = oracles.attention(*inputs, **spec.options)
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE[spec.dtype])
    padding = expected == 0
    assert (got[padding] == 0).all()


# Sinks are of one spec of each op where the denominators are asked for too: it is run once, for both.
def without(specs, name):
    return [spec for spec in specs if spec.name != name]


def only(specs, name):
    return [spec for spec in specs if spec.name == name]


RAGGED_WITH_SINKS = only(PAGED_ATTENTION_SPECS, "gpt_oss_sinks")
SELDOM = dict.fromkeys(("mqa", "gpt_oss_sinks_window"))  # by warpgroups: heads and lengths as in others, sinks below
DECODE_WITH_SINKS = only(PAGED_ATTENTION_DECODE_SPECS, "gpt_oss_sinks")  # gpt_oss_sinks_window is run without


@pytest.mark.parametrize(("name", "spec"), pairs("paged_attention", PAGED_ATTENTION_SPECS, PAGED_ATTENTION_REDUCED))
def test_ragged_attention_matches_a_float64_oracle(name, spec):
    inputs = spec.inputs()
    check(jitted(paged_attention, name, **spec.options)(*inputs), spec, inputs)


def decode_inputs(spec):
    """Arguments of the oracle, and those of decode: a row without keys has a query slot there."""
    q, *arrays, starts = spec.inputs()
    rows = np.zeros((len(spec.rows), spec.N, spec.H), q.dtype)
    rows[arrays[-1] > 0] = q
    return (q, *arrays, starts), (rows, *arrays)


@pytest.mark.parametrize(
    ("name", "spec"), pairs("paged_attention.decode", without(PAGED_ATTENTION_DECODE_SPECS, "gpt_oss_sinks"), SELDOM)
)
def test_decode_attention_matches_a_float64_oracle(name, spec):
    inputs, arrays = decode_inputs(spec)
    got, lengths = jitted(paged_attention_decode, name, **spec.options)(*arrays), arrays[-1]
    assert (np.asarray(got)[lengths == 0] == 0).all()
    check(got[np.flatnonzero(lengths)], spec, inputs)


@pytest.mark.parametrize(("name", "spec"), pairs("paged_attention", RAGGED_WITH_SINKS))
def test_ragged_attention_gives_the_logarithms_of_its_denominators(name, spec):
    inputs = spec.inputs()
    out, lse = jitted(paged_attention, name, return_lse=True, **spec.options)(*inputs)
    check(out, spec, inputs)
    expected = oracles.attention_and_log_sums(*inputs, **spec.options)[1]
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(lse, np.float64), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "spec"), pairs("paged_attention.decode", DECODE_WITH_SINKS))
def test_decode_attention_gives_the_logarithms_of_its_denominators(name, spec):
    inputs, arrays = decode_inputs(spec)
    out, lse = jitted(paged_attention_decode, name, return_lse=True, **spec.options)(*arrays)
    out, lse, lengths = np.asarray(out), np.asarray(lse), arrays[-1]
    assert (out[lengths == 0] == 0).all()
    check(out[lengths > 0], spec, inputs)
    expected = oracles.attention_and_log_sums(*inputs, **spec.options)[1]
    np.testing.assert_allclose(lse[lengths > 0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse[lengths == 0], -1e30, rtol=1e-6)


VERIFIED = PagedAttentionSpec("llama_heads", N=32, K=8, H=128, rows=((4, 300), (4, 4), (4, 513)))


@pytest.mark.parametrize(
    ("name", "spec"),
    pairs(
        "paged_attention.verify",
        [
            VERIFIED,
            PagedAttentionSpec("sinks", N=4, K=2, H=64, rows=((3, 70), (3, 3)), with_sinks=True),
            PagedAttentionSpec("window_cap", N=4, K=2, H=64, rows=((5, 200), (5, 7)), window=20, soft_cap=2.0),
            PagedAttentionSpec("f32", N=4, K=2, H=32, rows=((3, 200), (3, 7)), dtype="float32"),
        ],
        {VERIFIED.name: None},
    ),
)
def test_verification_matches_a_float64_oracle(name, spec):
    inputs = spec.inputs()
    q, *rest = inputs[:-1]
    rows = q.reshape(len(spec.rows), -1, spec.N, spec.H)
    got = jitted(paged_attention_verify, name, **spec.options)(rows, *rest)
    check(np.asarray(got).reshape(q.shape), spec, inputs)


@pytest.mark.parametrize("chunk", [1, 60])
@pytest.mark.parametrize(
    ("name", "spec"),
    pairs(
        "paged_attention",
        [
            PagedAttentionSpec("llama_heads", N=32, K=8, H=128, rows=((150, 420),)),
            PagedAttentionSpec("window_f32", N=8, K=2, H=64, rows=((150, 420),), window=90, dtype="float32"),
        ],
    ),
)
def test_a_prompt_in_chunks_gives_what_it_gives_whole(name, spec, chunk):
    q, k_pages, v_pages, table, lengths, starts = spec.inputs()
    attend = jitted(paged_attention, name, **spec.options)
    whole = np.asarray(attend(q, k_pages, v_pages, table, lengths, starts))
    (count, length), parts = spec.rows[0], []
    for first in range(0, count, chunk):
        part = q[first : first + chunk]
        kv_lens = np.array([length - count + first + len(part)], np.int32)
        starts = np.array([0, len(part)], np.int32)
        parts.append(attend(part, k_pages, v_pages, table, kv_lens, starts))
    parts = np.concatenate([np.asarray(part) for part in parts])
    if name == "reference" and not ON_GPU:
        np.testing.assert_array_equal(parts, whole)
    else:
        np.testing.assert_allclose(
            parts.astype(np.float64), whole.astype(np.float64), rtol=0, atol=TOLERANCE[spec.dtype]
        )


HEADS = [
    (32, 8, 128, "bfloat16"),
    (16, 8, 128, "float32"),
    (8, 2, 64, "float32"),
    (7, 7, 64, "float32"),
    (4, 1, 64, "float32"),
]


@cpu_only
@pytest.mark.parametrize(("N", "K", "H", "dtype"), HEADS)
def test_a_decode_row_of_the_reference_is_bitwise_independent_of_its_batch(N, K, H, dtype):
    rows = tuple((1, length) for length in (700, 1, 256, 257, 33))
    spec = PagedAttentionSpec("batch", N=N, K=K, H=H, rows=rows, dtype=dtype)
    q, k_pages, v_pages, table, lengths, _ = spec.inputs()
    decode = jax.jit(lambda *arrays: paged_attention_decode(*arrays, implementation="reference", **spec.options))
    whole = np.asarray(decode(q, k_pages, v_pages, table, lengths))
    for batch in ([0], [4], [2, 4, 3], [3, 3, 3, 1, 2, 4, 0, 0, 1]):
        some = np.asarray(decode(q[batch], k_pages, v_pages, table[batch], lengths[batch]))
        np.testing.assert_array_equal(some, whole[batch])


@cpu_only
@pytest.mark.parametrize(("N", "K", "H", "dtype"), HEADS)
def test_a_ragged_row_of_the_reference_is_bitwise_independent_of_its_batch_and_equals_decode(N, K, H, dtype):
    rows = ((3, 40), (70, 600), (1, 300), (0, 0), (20, 20))
    spec = PagedAttentionSpec("mixed", N=N, K=K, H=H, rows=rows, dtype=dtype)
    q, k_pages, v_pages, table, lengths, starts = spec.inputs()
    ragged = jax.jit(lambda *arrays: paged_attention(*arrays, implementation="reference", **spec.options))
    whole = np.asarray(ragged(q, k_pages, v_pages, table, lengths, starts))
    for r in (1, 2):
        own = slice(starts[r], starts[r + 1])
        alone = ragged(q[own], k_pages, v_pages, table[[r]], lengths[[r]], np.array([0, rows[r][0]], np.int32))
        np.testing.assert_array_equal(np.asarray(alone), whole[own])
    one = slice(starts[2], starts[3])
    decode = jax.jit(lambda *arrays: paged_attention_decode(*arrays, implementation="reference", **spec.options))
    decoded = decode(q[one], k_pages, v_pages, table[[2]], lengths[[2]])
    np.testing.assert_array_equal(np.asarray(decoded), whole[one])


def test_tiles_that_attend_in_many_groups_give_what_they_give_in_one():
    spec = PAGED_ATTENTION_SPECS[0]
    inputs = spec.inputs()
    one, many = (
        jax.jit(
            lambda *arrays, at_once=at_once: reference.paged_attention(*arrays, scores_at_once=at_once, **spec.options)
        )(*inputs)
        for at_once in (1 << 30, 1)
    )
    np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(many, np.float32), rtol=0, atol=1e-6)


def test_the_references_memory_does_not_grow_with_the_page_tables_width():
    spec = dataclasses.replace(PAGED_ATTENTION_DECODE_SPECS[3], spare_width=0)
    used = []
    for width in (64, 4096):
        q, k_pages, v_pages, table, lengths, starts = spec.inputs()
        wide = np.resize(table, (table.shape[0], width))
        for op, arrays in (
            (paged_attention_decode, (np.resize(q, (len(lengths), spec.N, spec.H)), k_pages, v_pages, wide, lengths)),
            (paged_attention, (q, k_pages, v_pages, wide, lengths, starts)),
        ):
            run = jax.jit(lambda *a, op=op: op(*a, **spec.options))
            used.append(run.lower(*arrays).compile().memory_analysis().temp_size_in_bytes)
    table_bytes = len(spec.rows) * 4096 * 4
    assert used[2] - used[0] <= 2 * table_bytes
    assert used[3] - used[1] <= 8 * table_bytes  # each tile takes its row's table


@cpu_only
def test_a_windows_and_a_short_rows_cost_follow_the_keys_they_see():
    N, K, H, page_size, width = 8, 2, 64, 16, 4096
    q, pages = jnp.ones((1, N, H)), jnp.ones((2, K, page_size, H))
    table = jnp.ones((1, width), jnp.int32)

    def seconds(op, *rest, length, **options):
        compiled = jax.jit(lambda lengths: op(q, pages, pages, table, lengths, *rest, scale=0.1, **options))
        lengths, taken = jnp.array([length], jnp.int32), []
        for _ in range(4):
            begun = time.perf_counter()
            compiled(lengths).block_until_ready()
            taken.append(time.perf_counter() - begun)
        return min(taken)

    for op, *rest in ((paged_attention_decode,), (paged_attention, jnp.array([0, 1], jnp.int32))):
        whole = seconds(op, *rest, length=width * page_size)
        assert seconds(op, *rest, length=width * page_size, window=64) < whole / 8  # 2 blocks of 256
        assert seconds(op, *rest, length=100) < whole / 8


def arguments(**changes):
    base = {
        "q": jnp.zeros((5, 4, 32)),
        "k_pages": jnp.zeros((3, 2, 8, 32)),
        "v_pages": jnp.zeros((3, 2, 8, 32)),
        "page_table": jnp.zeros((2, 3), jnp.int32),
        "kv_lens": jnp.zeros(2, jnp.int32),
        "query_starts": jnp.zeros(3, jnp.int32),
        "scale": 0.1,
    }
    return base | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((5, 32))}, r"need q\[T, N, H\].*got \(5, 32\)"),
        ({"q": jnp.zeros((0, 4, 32))}, r"none empty; got \(0, 4, 32\)"),
        ({"q": jnp.zeros((5, 4, 16))}, r"\(5, 4, 16\) does not fit .*\(3, 2, 8, 32\)"),
        ({"q": jnp.zeros((5, 3, 32))}, r"\(5, 3, 32\) does not fit"),
        ({"q": jnp.zeros((5, 4, 32), jnp.int32)}, "q must be floating, got int32"),
        ({"v_pages": jnp.zeros((3, 2, 4, 32))}, r"v_pages float32\[3, 2, 4, 32\] must agree"),
        ({"page_table": jnp.zeros((2, 3), jnp.uint32)}, r"page_table must be i32\[rows, W\], got uint32\[2, 3\]"),
        ({"kv_lens": jnp.zeros(3, jnp.int32)}, r"kv_lens must be i32\[2\].*got int32\[3\]"),
        ({"query_starts": jnp.zeros(2, jnp.int32)}, r"query_starts must be i32\[R \+ 1\] = i32\[3\].*got int32\[2\]"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"window": 0}, "window must be None or at least 1.*got 0"),
        ({"sinks": jnp.zeros(3)}, r"sinks must be f32\[N\] = f32\[4\], got float32\[3\]"),
        ({"soft_cap": 0.0}, "soft_cap must be None or positive, got 0.0"),
    ],
)
def test_wrong_arguments_raise_an_error_that_names_the_shapes(changes, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(**arguments(**changes))


def test_decode_wants_one_query_a_row():
    decode = arguments()
    del decode["query_starts"]
    with pytest.raises(ValueError, match=r"q\[B, N, H\] \(5, 4, 32\) and page_table\[B, W\] \(2, 3\) disagree on B"):
        paged_attention_decode(**decode)
