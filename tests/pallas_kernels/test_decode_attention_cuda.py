"""The CUDA kernel of decode attention, played by a CPU: right wherever rows are cut, and always the same bits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.kernel_backends import ON_GPU

from pallas_kernels.decode_attention import cuda, emulated
from pallas_kernels.decode_attention.reference import decode_attention as reference
from pallas_kernels.decode_attention.specs import DecodeAttentionSpec
from pallas_kernels.rope_page_write.heads import Heads

pytestmark = pytest.mark.skipif(ON_GPU, reason="the emulator is for machines without a GPU")
EDGES = DecodeAttentionSpec("edges", N=8, K=2, H=128, lengths=(1, 0, 15, 16, 17, 63, 64, 65, 127, 128, 129, 130, 500))
SPECS = (
    EDGES,
    dataclasses.replace(EDGES, name="norms_page_64", lengths=(70, 0, 300), page_size=64, norms=True),
    DecodeAttentionSpec(
        "a_query_a_key_parts_bias", N=2, K=2, H=128, lengths=(5, 130), page_size=128, parts=3, bias=True
    ),
    DecodeAttentionSpec("eight_queries_a_key", N=8, K=1, H=128, lengths=(200, 33, 1)),
    DecodeAttentionSpec("three_queries_a_key", N=3, K=1, H=128, lengths=(97,)),
    DecodeAttentionSpec("several_runs", N=4, K=1, H=128, lengths=(2200, 40, 2048), page_size=64),
    DecodeAttentionSpec("longer_splits", N=1, K=1, H=128, lengths=(8300,), page_size=128),
    DecodeAttentionSpec("alike_and_whole", N=2, K=2, H=128, lengths=(100,) * 3),
    DecodeAttentionSpec("all_rows_empty", N=4, K=2, H=128, lengths=(0, 0)),
)
MACHINES = (1, 2), (2, 5), (13, 5)  # multiprocessors and slots


def bits(array):
    return np.asarray(array).view(np.uint8)


def run(given, spec, kernel=None):
    attend = functools.partial(cuda.decode_heads, scale=spec.paged.scale, kernel=kernel or emulated.machine())
    return [np.asarray(each) for each in jax.jit(attend)(*given)]


def refuses(**changes):
    """What `refuse` says of a call that would be taken but for these."""
    given = (
        dict(N=8, K=2, H=128, page_size=16, dtype=jnp.bfloat16, rows=4, scale=0.1, window=None, soft_cap=None) | changes
    )
    N, K, H, page_size, dtype, *rest = (given.pop(name) for name in tuple(given)[:9])
    q, pages = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((4, N, H), (9, K, page_size, H)))
    return functools.partial(cuda.refuse, q, pages, *rest, **given)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_it_agrees_with_the_reference_on_any_machine_with_the_same_bits(spec):
    given = spec.inputs()
    expected = jax.jit(functools.partial(reference, scale=spec.paged.scale))(*given)
    results = [run(given, spec, emulated.machine(*machine)) for machine in MACHINES]
    for got, want in zip(results[0], expected, strict=True):
        near = np.testing.assert_allclose
        near(got.astype(np.float32), np.asarray(want, np.float32), rtol=2**-7, atol=2e-2, equal_nan=True)
    assert not results[0][0][np.array(spec.lengths) == 0].astype(np.float32).any()
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(bits(got), bits(want))


def test_probabilities_have_more_bits_than_a_bfloat16():
    spec = SPECS[3]
    heads, *pools, table, lengths = spec.inputs()
    heads = dataclasses.replace(heads, cos=np.ones_like(heads.cos), sin=np.zeros_like(heads.sin))
    out, *pages = run((heads, *pools, table, lengths), spec, emulated.machine(*MACHINES[1]))
    queries = np.asarray(heads.qkv[:, : spec.N * spec.H], np.float64).reshape(-1, spec.N, spec.H)
    exact = []
    for row, length in enumerate(lengths):
        keys, values = (
            page[table[row, : -(-length // 16)], 0].reshape(-1, spec.H)[:length].astype(np.float64) for page in pages
        )
        scores = np.exp(queries[row] @ keys.T * spec.paged.scale)
        exact.append(scores / scores.sum(-1, keepdims=True) @ values)
    rounded = np.array(exact).astype(out.dtype)
    assert (rounded == out)[:2].mean() > 0.99  # with rounded probabilities 0.8 and less


@pytest.mark.parametrize("spec", [EDGES, SPECS[5]], ids=lambda spec: spec.name)
def test_a_row_has_the_same_bits_alone_and_in_the_kernels_other_calls(spec):
    heads, *pools, table, lengths = spec.inputs()
    heads = dataclasses.replace(heads, cos=np.ones_like(heads.cos), sin=np.zeros_like(heads.sin))
    options = {"scale": spec.paged.scale, "kernel": emulated.machine()}
    out, *pages = run((heads, *pools, table, lengths), spec, emulated.machine())
    for row in np.flatnonzero(lengths)[[0, -1]]:
        part = slice(row, row + 1)
        own = Heads(heads.qkv[part], heads.cos[part], heads.sin[part], K=spec.K, eps=heads.eps, dtype=heads.dtype)
        alone = run((own, *pools, table[part], lengths[part]), spec, emulated.machine())
        np.testing.assert_array_equal(bits(alone[0])[0], bits(out)[row])
    q = heads.qkv[:, : spec.N * spec.H].reshape(-1, spec.N, spec.H)
    plain = jax.jit(functools.partial(cuda.paged_attention_decode, **options))(q, *pages, table, lengths)
    np.testing.assert_array_equal(bits(plain), bits(out))
    tokens = np.arange(len(lengths), dtype=np.int32)[::-1] + 2  # among others, backwards
    tokens = np.where(lengths > 0, tokens, 10**6).astype(np.int32)  # those of empty rows are never followed
    among = np.zeros((len(lengths) + 2, *q.shape[1:]), q.dtype)
    live = lengths > 0
    among[tokens[live]] = np.asarray(q)[live]
    before = np.full_like(among, 3.0)
    mixed = jax.jit(functools.partial(cuda.decode_among, **options))(among, before, tokens, *pages, table, lengths)
    np.testing.assert_array_equal(bits(mixed)[tokens[live]], bits(out)[live])
    rest = np.setdiff1d(np.arange(len(among)), tokens[live])
    np.testing.assert_array_equal(np.asarray(mixed)[rest], before[rest])


@pytest.mark.kernels
def test_rows_of_random_lengths_have_the_bits_of_each_alone():
    rng = np.random.default_rng(0)
    for seed in range(6):
        lengths = tuple(int(each) for each in rng.integers(0, (40, 400, 3000)[seed % 3], 5 + seed))
        spec = DecodeAttentionSpec("random", N=2, K=1, H=128, lengths=lengths, page_size=16 << seed % 4)
        heads, *pools, table, kv_lens = spec.inputs(seed)
        out = run((heads, *pools, table, kv_lens), spec, emulated.machine(programs=1 + 3 * seed))[0]
        for row, length in enumerate(lengths):
            part = slice(row, row + 1)
            own = Heads(heads.qkv[part], heads.cos[part], heads.sin[part], K=1, eps=heads.eps, dtype=heads.dtype)
            alone = run((own, *pools, table[part], kv_lens[part]), spec, emulated.machine(programs=7))[0]
            np.testing.assert_array_equal(bits(alone)[0], bits(out)[row], err_msg=f"{lengths} row {row}: {length}")


def test_pages_that_no_row_owns_are_left_alone():
    given = EDGES.inputs()
    pools = [np.array(pool, copy=True) for pool in given[1:3]]
    for before, after in zip(pools, run(given, EDGES, emulated.machine())[1:], strict=True):
        new = np.zeros(before.shape, bool)
        for row, length in enumerate(EDGES.lengths):
            if length:
                new[given[3][row, (length - 1) // 16], :, (length - 1) % 16] = True
        np.testing.assert_array_equal(bits(after[~new]), bits(before[~new]))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"window": 100}, "neither windows nor soft caps"),
        ({"soft_cap": 30.0}, "neither windows nor soft caps"),
        ({"sinks": np.zeros(8)}, "does not take sinks"),
        ({"return_lse": True}, "does not take return_lse"),
        ({"H": 64}, "heads of 128"),
        ({"page_size": 48}, "a power of two more"),
        ({"page_size": 8}, "a power of two more"),
        ({"N": 18}, "at most 8 queries a key"),
        ({"dtype": jnp.float32}, "must be bfloat16"),
        ({"scale": -1.0}, "positive scale"),
    ],
)
def test_what_it_does_not_do_is_declined_with_the_reason(changes, why):
    refuses()()
    with pytest.raises(NotImplementedError, match=why):
        refuses(**changes)()
