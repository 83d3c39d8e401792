"""A kernel lowered for the longest arrays and called on shorter ones; the GPU runs it in attention's own suites."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import lowered_once
from pallas_kernels.grouped_matmul.mosaic_sm90 import tiles_matmul
from pallas_kernels.lowered_once import call_shorter
from pallas_kernels.paged_attention.mosaic_sm90 import Blocks, ragged_attention

WIDTH, LONGEST = 128, 4096
traced: list[int] = []


@functools.cache
def doubling(rows: int):
    """Of the first eight rows, however many there are."""

    def run(x, offsets):
        traced.append(x.shape[0])

        def kernel(x_ref, offset_ref, out_ref):
            out_ref.at[pl.ds(0, 8)][...] = x_ref.at[pl.ds(0, 8)][...] * 2 + offset_ref[0]

        out = jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32)
        return plgpu.kernel(kernel, out_type=out, grid=(1,), grid_names=("program",))(x, offsets)

    return run


def lowered(rows: int, call=None):
    call = call or doubling(LONGEST)

    def step(x, offsets):
        (out,) = call_shorter(call, (x, offsets), {0: LONGEST}, [jax.ShapeDtypeStruct(x.shape, x.dtype)])
        return out

    x, offsets = jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    return jax.jit(step).trace(x, offsets).lower(lowering_platforms=("cuda",)).as_text()


def kernel_of(text: str) -> str:
    return text.split('kernel_hash = "')[1].split('"')[0]


def test_arrays_of_many_lengths_have_one_kernel_that_is_lowered_once():
    traced.clear()
    short, long = lowered(64), lowered(1024)
    assert kernel_of(short) == kernel_of(long)
    assert "tensor<64x128xf32>" in short
    assert "tensor<1024x128xf32>" in long
    assert not any("tensor<4096x" in text for text in (short, long))
    assert traced == [LONGEST]


def test_a_kernel_of_its_own_would_be_another():
    whole = jax.ShapeDtypeStruct((64, WIDTH), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    own = jax.jit(doubling(64)).trace(*whole).lower(lowering_platforms=("cuda",)).as_text()
    assert kernel_of(own) != kernel_of(lowered(64))


@pytest.mark.parametrize("times", [0, 2])
def test_what_is_not_one_kernel_is_refused(times):
    def call(x, offsets):
        return functools.reduce(lambda x, _: doubling(LONGEST)(x, offsets), range(times), x)

    with pytest.raises(ValueError, match=r"must be one mosaic_gpu_v2"):
        lowered(64, call)


def test_an_array_that_the_kernel_does_not_take_is_an_error():
    x = jnp.zeros((64, WIDTH))
    with pytest.raises(ValueError, match="takes 2 operands, got 3"):
        call_shorter(lambda x, offsets, more: doubling(LONGEST)(x, offsets), (x, jnp.zeros(1), x), {0: LONGEST}, [])


def test_the_mesh_around_a_call_is_not_seen_by_the_kernel():
    mesh = jax.sharding.AbstractMesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        assert lowered_once.TARGET in lowered(64, functools.partial(doubling(LONGEST)))


def ragged(tokens):
    q, pages = [(tokens, 4, 64)], [(9, 2, 64, 64)] * 2
    floats = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (*q, *pages)]
    table, lens, starts = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((3, 4), (3,), (4,)))
    call = functools.partial(ragged_attention, scale=0.1, window=None, soft_cap=None, blocks=Blocks())
    return call, (*floats, table, lens, starts)


def grouped(tiles):
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((tiles, 16, 128), (4, 256, 128)))
    counts = jax.ShapeDtypeStruct((tiles,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return functools.partial(tiles_matmul, gated=True), (x, w, *counts)


@pytest.mark.parametrize(("made", "lengths"), [(ragged, (64, 200)), (grouped, (8, 20))])
def test_steps_of_all_lengths_share_the_kernel(made, lengths, monkeypatch):
    seen = []
    lower = lowered_once._lower
    monkeypatch.setattr(lowered_once, "_lower", lambda *given: (seen.append(given), lower(*given))[1])
    texts = []
    for length in lengths:
        call, arguments = made(length)
        texts.append(jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text())
    assert kernel_of(texts[0]) == kernel_of(texts[1])
    assert len(seen) == 1
