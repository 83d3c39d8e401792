import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.kernel_backends import ON_GPU, jitted, pairs
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.decode_attention.reference import apart
from pallas_kernels.decode_attention.specs import DECODE_ATTENTION_SPECS, DecodeAttentionSpec
from pallas_kernels.paged_attention import interpreted, reference, triton
from pallas_kernels.paged_attention.specs import PagedAttentionSpec
from pallas_kernels.rope_page_write.interpreted import rope_page_write as triton_write
from pallas_kernels.rope_page_write.reference import separated

OP = "decode_attention"
cpu_only = pytest.mark.skipif(ON_GPU, reason="the interpreter is for machines without a GPU")


def bits(array):
    return np.asarray(array).view(np.uint8)


@pytest.mark.parametrize(("name", "spec"), pairs(OP, DECODE_ATTENTION_SPECS[1:4]))
def test_output_and_pages_are_those_of_writing_first_and_attending_then(name, spec):
    compare(name, spec)


@pytest.mark.kernels
@pytest.mark.parametrize(("name", "spec"), pairs(OP, DECODE_ATTENTION_SPECS[:1] + DECODE_ATTENTION_SPECS[4:]))
def test_other_shapes_agree_with_writing_first_and_attending_then(name, spec):
    compare(name, spec)


def compare(name, spec):
    heads, *pools, table, lengths = spec.inputs()
    q, k, v = separated(heads)
    written = [pool.copy() for pool in pools]
    for row in np.flatnonzero(lengths):
        position = lengths[row] - 1
        for pool, new in zip(written, (k, v), strict=True):
            pool[table[row, position // spec.page_size], :, position % spec.page_size] = new[row]
    expected = reference.paged_attention_decode(
        jnp.asarray(q, jnp.float32), *(x.astype(np.float32) for x in written), table, lengths, **spec.paged.options
    )
    out, *pages = jitted(decode_attention, name, **spec.paged.options)(heads, *pools, table, lengths)
    atol = 2e-2 if spec.dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=0, atol=atol)
    assert not np.asarray(out, np.float32)[lengths == 0].any()
    for got, wanted in zip(pages, written, strict=True):
        near = np.testing.assert_allclose
        near(np.asarray(got, np.float32), wanted.astype(np.float32), rtol=2**-7, atol=2**-6, equal_nan=True)


SPLIT = DecodeAttentionSpec("splits", N=8, K=2, H=64, lengths=(1300, 1, 512, 513, 700), norms=True)


@pytest.mark.kernels
@cpu_only
def test_a_row_has_the_same_bits_alone_in_a_batch_dealt_out_and_in_the_two_kernels_apart(monkeypatch):
    heads, *pools, table, lengths = SPLIT.inputs()
    run = functools.partial(decode_attention, implementation="triton_interpret", **SPLIT.paged.options)
    out, *pages = jax.jit(run)(heads, *pools, table, lengths)
    kernels = jax.jit(functools.partial(in_two, options=SPLIT.paged.options))(heads, *pools, table, lengths)
    for one, other in zip(kernels, (out, *pages), strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))
    alone = jax.tree.map(lambda array: array[:1], (heads.qkv, heads.cos, heads.sin))
    first = type(heads)(*alone, heads.norms, K=heads.K, dtype=heads.dtype)
    np.testing.assert_array_equal(bits(jax.jit(run)(first, *pools, table[:1], lengths[:1])[0])[0], bits(out)[0])
    monkeypatch.setattr(triton, "DIRECT_PROGRAMS", 0)
    monkeypatch.setattr(triton, "DEALT_PROGRAMS", 6)
    dealt = jax.jit(functools.partial(run))(heads, *pools, table, lengths)
    np.testing.assert_array_equal(bits(dealt[0]), bits(out))


def in_two(heads, k_pages, v_pages, table, lengths, options):
    with pytest.MonkeyPatch.context() as patch:
        room = "pallas_kernels.decode_attention.reference"
        patch.setattr(f"{room}.rope_page_write", lambda *a, implementation: triton_write(*a))
        patch.setattr(
            f"{room}.paged_attention_decode", lambda *a, implementation, **o: interpreted.triton_decode(*a, **o)
        )
        return apart(heads, k_pages, v_pages, table, lengths, **options)


@cpu_only
@pytest.mark.parametrize("dealt", [pytest.param(False, marks=pytest.mark.kernels), True])
def test_rows_among_other_tokens_fill_their_own_outputs_and_leave_the_rest(dealt, monkeypatch):
    if dealt:
        monkeypatch.setattr(triton, "DIRECT_PROGRAMS", 0)
        monkeypatch.setattr(triton, "DEALT_PROGRAMS", 6)
    spec = PagedAttentionSpec("rows", N=4, K=2, H=64, rows=((1, 600), (0, 0), (1, 17), (0, 0)))
    q, *pages, table, lengths, _ = spec.inputs()
    tokens = np.array([5, 2, 0, 10**6], np.int32)  # those of empty rows are never followed
    among = np.zeros((7, 4, 64), q.dtype)
    among[[5, 0]] = q
    before = np.full_like(among, 3.0)
    run = jax.jit(functools.partial(triton.decode_among, interpret=True, **spec.options))
    out = np.asarray(run(among, before, tokens, *pages, table, lengths))
    rows = np.zeros((4, *q.shape[1:]), q.dtype)
    rows[[0, 2]] = q
    alone = np.asarray(
        jax.jit(functools.partial(interpreted.triton_decode, **spec.options))(rows, *pages, table, lengths)
    )
    np.testing.assert_array_equal(out[[5, 0]], alone[[0, 2]])
    np.testing.assert_array_equal(out[[1, 2, 3, 4, 6]], before[[1, 2, 3, 4, 6]])


@cpu_only
@pytest.mark.parametrize("spec", DECODE_ATTENTION_SPECS[:1] + DECODE_ATTENTION_SPECS[4:5])
def test_it_lowers_to_one_triton_kernel_without_a_gpu(spec):
    heads, *arrays = spec.inputs()
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    run = jax.jit(functools.partial(decode_attention, implementation="triton", **spec.paged.options))
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The Pallas Triton backend")
        text = run.trace(heads, *arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({1: jnp.zeros((3, 2, 16, 64), jnp.bfloat16)}, r"K = 8, H = 128 do not fit .* \[3, 2, 16, 64\]"),
        ({3: jnp.zeros((2, 4), jnp.int32)}, r"page_table must be i32\[B = 7, W\], got \[2, 4\]"),
        ({4: jnp.zeros(7)}, r"kv_lens must be i32\[B = 7\], got float32\[7\]"),
    ],
)
def test_wrong_arguments_raise_an_error_that_names_the_shapes(changes, message):
    arguments = dict(enumerate(DECODE_ATTENTION_SPECS[0].inputs())) | changes
    with pytest.raises(ValueError, match=message):
        decode_attention(*arguments.values(), scale=0.1)


def test_the_kernel_says_why_it_declines_pages_of_another_dtype():
    heads, *_, table, lengths = DecodeAttentionSpec("narrow", N=4, K=2, H=64, lengths=(4,)).inputs()
    pages = jnp.zeros((2, 2, 16, 64), jnp.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="only pages as wide as the heads"):
        triton.decode_heads(heads, pages, pages, table, lengths, scale=0.1)
