import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.kernel_backends import jitted, pairs

from pallas_kernels.rope_page_write import reference
from pallas_kernels.rope_page_write.api import rope_page_write
from pallas_kernels.rope_page_write.heads import Heads
from pallas_kernels.rope_page_write.specs import ROPE_PAGE_WRITE_SPECS, RopePageWriteSpec

OP = "rope_page_write"


def in_float64(spec, heads):
    """q, k and v [T, heads, H] without any rounding but the ones of the op's own steps."""
    dtype = jnp.dtype(spec.dtype)

    def rounded(x):
        return x.astype(dtype).astype(np.float64)

    qkv = np.asarray(heads.qkv, np.float64)
    if spec.parts:
        qkv = qkv.sum(axis=0) + (0 if heads.bias is None else np.asarray(heads.bias, np.float64))
    q, k, v = np.split(rounded(qkv).reshape(spec.T, -1, spec.H), [spec.N, spec.N + spec.K], axis=1)
    cos, sin = (np.asarray(each, np.float64)[:, None] for each in (heads.cos, heads.sin))
    turned = []
    for which, x in enumerate((q, k)):
        if heads.norms is not None:
            scale = 1 / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + heads.eps)
            x = rounded(x * scale * np.asarray(heads.norms[which], np.float64))
        first, second = np.split(x, 2, axis=-1)
        turned.append(np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1))
    return *turned, v


@pytest.mark.parametrize(("name", "spec"), pairs(OP, ROPE_PAGE_WRITE_SPECS[:2] + ROPE_PAGE_WRITE_SPECS[5:6]))
def test_queries_come_out_turned_and_keys_and_values_land_in_their_slots_and_nothing_else_changes(name, spec):
    compare(name, spec)


@pytest.mark.kernels
@pytest.mark.parametrize(("name", "spec"), pairs(OP, ROPE_PAGE_WRITE_SPECS[2:5] + ROPE_PAGE_WRITE_SPECS[6:]))
def test_other_shapes_come_out_turned_and_written(name, spec):
    compare(name, spec)


def compare(name, spec):
    heads, *pools, slots = spec.inputs()
    q, k, v = in_float64(spec, heads)
    got_q, *got = jitted(rope_page_write, name)(heads, *pools, slots)
    one_step = 2.0 ** (-7 if spec.dtype == "bfloat16" else -21)  # an f32 sum in another order may round the other way
    assert got_q.dtype == jnp.dtype(spec.dtype)
    np.testing.assert_allclose(np.asarray(got_q, np.float64), q, rtol=one_step, atol=4 * one_step)
    for pool, tokens, result in zip(pools, (k, v), got, strict=True):
        written = np.zeros(spec.P * spec.page_size, bool)
        result = np.asarray(result)
        for t, slot in enumerate(slots):
            if 0 <= slot < len(written):
                written[slot] = True
                there = result[slot // spec.page_size, :, slot % spec.page_size].astype(np.float64)
                np.testing.assert_allclose(there, tokens[t], rtol=one_step, atol=4 * one_step)
        untouched = ~written.reshape(spec.P, spec.page_size)
        same = [array.swapaxes(1, 2)[untouched].view(np.uint8) for array in (result, pool)]
        np.testing.assert_array_equal(*same)


@pytest.mark.parametrize(("name", "spec"), pairs(OP, ROPE_PAGE_WRITE_SPECS[:1]))
def test_donated_pages_are_written_in_place(name, spec):
    arrays = dataclasses.replace(spec, P=96).inputs()
    write = jax.jit(lambda *a: rope_page_write(*a, implementation=name), donate_argnums=(1, 2))
    memory = write.lower(*arrays).compile().memory_analysis()
    assert memory.alias_size_in_bytes == arrays[1].nbytes + arrays[2].nbytes
    if "interpret" not in name:  # the interpreter keeps copies
        assert memory.temp_size_in_bytes < arrays[1].nbytes / 4


def test_parts_give_the_bits_of_their_rounded_sum():
    spec = ROPE_PAGE_WRITE_SPECS[1]
    heads = spec.heads()
    whole = dataclasses.replace(heads, qkv=heads.qkv.sum(axis=0).astype(jnp.bfloat16))
    for one, other in zip(reference.separated(heads), reference.separated(whole), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_leading_dimensions_of_training_pass_through_the_reference():
    heads = RopePageWriteSpec("rows", N=4, K=2, H=32, T=6, norms=True).heads()
    q, k, v = reference.separated(heads)
    rows = dataclasses.replace(
        heads, qkv=heads.qkv.reshape(2, 3, -1), cos=heads.cos.reshape(2, 3, -1), sin=heads.sin.reshape(2, 3, -1)
    )
    for one, other in zip(reference.separated(rows), (q, k, v), strict=True):
        np.testing.assert_array_equal(np.asarray(one).reshape(other.shape), np.asarray(other))


FITTING = {"qkv": jnp.zeros((5, 4 * 32)), "cos": jnp.zeros((5, 16)), "sin": jnp.zeros((5, 16))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sin": jnp.zeros((4, 16))}, r"cos and sin must be f32\[T, H / 2\] alike, got float32\[5, 16\], \[4, 16\]"),
        ({"qkv": jnp.zeros((5, 4 * 32 + 1))}, r"qkv must be .* with T = 5, K = 1 .* got \[5, 129\]"),
        ({"qkv": jnp.zeros((5, 128), jnp.bfloat16)}, "qkv must be float32, or float32 in parts; got bfloat16"),
        ({"norms": jnp.zeros((2, 16))}, r"norms must be \[2, H\] = \[2, 32\], got \[2, 16\]"),
        ({"bias": jnp.zeros(128)}, r"bias \[128\] goes with qkv in parts"),
    ],
)
def test_heads_that_do_not_fit_raise_an_error_that_names_the_shapes(changes, message):
    with pytest.raises(ValueError, match=message):
        Heads(**(FITTING | changes), K=1, dtype=jnp.float32).check()


@pytest.mark.parametrize(
    ("pages", "slots", "message"),
    [
        ((3, 2, 8, 32), jnp.zeros(5, jnp.int32), r"K = 1, H = 32 do not fit .* \[3, 2, 8, 32\]"),
        ((3, 1, 8, 32), jnp.zeros(4, jnp.int32), r"slots must be i32\[T\] = i32\[5\], got int32\[4\]"),
    ],
)
def test_pages_and_slots_that_do_not_fit_raise_an_error_that_names_the_shapes(pages, slots, message):
    heads = Heads(**FITTING, K=1, dtype=jnp.float32)
    with pytest.raises(ValueError, match=message):
        rope_page_write(heads, jnp.zeros(pages), jnp.zeros(pages), slots)
