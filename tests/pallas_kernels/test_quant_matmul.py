"""Quantised products: every implementation against float64, the packing, bits, races, refusals."""

import dataclasses
import functools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.kernel_backends import ON_GPU, jitted, pairs
from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quant_matmul import api, interpreted, mosaic_sm90, packing, reference
from pallas_kernels.quant_matmul.specs import QUANT_MATMUL_SPECS, QuantMatmulSpec

OPS = {"int8": api.int8_matmul, "int4": api.int4_matmul, "fp8": api.fp8_matmul}
BY_KIND = {kind: [spec for spec in QUANT_MATMUL_SPECS if spec.kind == kind] for kind in OPS}
ALL_PAIRS = [pair for kind in OPS for pair in pairs(f"quant_matmul.{kind}", BY_KIND[kind])]
cpu_only = pytest.mark.skipif(ON_GPU, reason="the interpreter is for machines without a GPU")


def present(arrays):
    return tuple(None if array is None else jnp.asarray(array) for array in arrays)


@pytest.mark.parametrize(("name", "spec"), ALL_PAIRS)
def test_the_product_is_that_of_the_widened_weight(name, spec):
    arrays = spec.inputs()
    got = jitted(OPS[spec.kind], name)(*present(arrays))
    x = arrays[0].astype(np.float64)
    if spec.kind == "fp8":  # what rounding x to e4m3 costs is no error of the product
        narrow, scales = reference.narrowed(jnp.asarray(arrays[0]), spec.group is not None, arrays[3])
        wide = np.asarray(narrow, np.float64)
        scales = np.asarray(scales, np.float64)
        x = wide * (scales[:, None] if spec.group is None else np.repeat(scales, 128, axis=0).T)
    expected = x @ spec.weight(arrays).T
    error = np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected)
    exact = spec.dtype == "float32" or name.startswith("mosaic") or (name.startswith("widen") and spec.kind == "int8")
    assert got.shape == (spec.M, spec.N)
    assert error < (1e-6 if exact and not ON_GPU else 3e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_and_unpacking_are_inverse(bits):
    q = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (128, 192)).astype(np.int8)
    np.testing.assert_array_equal(packing.unpack(packing.pack(jnp.asarray(q), bits), bits), q)
    if bits == 4:
        unsigned = packing.unpack(packing.pack(jnp.asarray(q & 15), bits), bits, signed=False)
        np.testing.assert_array_equal(unsigned, q & 15)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_thread_of_a_warpgroup_finds_its_operand_in_its_own_words(bits):
    low = -(2 ** (bits - 1))
    q = np.random.default_rng(1).integers(low, -low, (128, 128)).astype(np.int8)
    flat = np.asarray(packing.pack(jnp.asarray(q), bits))[1, 0].reshape(-1).view(np.uint32)
    for thread in (0, 37, 127):
        warp, lane = divmod(thread, 32)
        row, column = divmod(lane, 4)
        for step in range(4):
            for register in range(4):
                half, part = register % 2, register // 2  # WGMMA's order: both rows of a part, then the next part
                for element in range(2):
                    wanted = q[64 + 16 * warp + 8 * half + row, 16 * step + 8 * part + 2 * column + element]
                    if bits == 4:
                        found = int(flat[4 * thread + step]) >> (4 * register + 16 * element) & 15
                        found -= 16 * (found >= 8)
                    else:
                        word = int(flat[512 * (step // 2) + 4 * thread + 2 * (step % 2) + part])
                        found = np.int64(word >> (8 * (2 * half + element)) & 255)
                        found -= 256 * (found >= 128)
                    assert found == wanted


def bits_of(array):
    return np.asarray(array).view(np.uint32)


@pytest.mark.parametrize("kind", OPS)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(kind):
    if ON_GPU or kind != "int4":
        compare_rows(kind)
    else:  # XLA's older emitters (tests/conftest.py) give an interpreted int4 row other bits in another place
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
            child.submit(compare_rows, kind).result()


def compare_rows(kind):
    group = {"int8": None, "int4": 64, "fp8": 128}[kind]
    spec = QuantMatmulSpec("rows", kind, M=150, N=128, K=512, group=group)
    x, *rest = present(spec.inputs())
    name = "mosaic_sm90" if ON_GPU else "mosaic_sm90_interpret"
    product = jax.jit(functools.partial(OPS[kind], implementation=name))
    whole = bits_of(product(x, *rest))
    for first, last in ((3, 4), (3, 20), (3, 60), (140, 150)):
        np.testing.assert_array_equal(bits_of(product(x[first:last], *rest)), whole[first:last])


@cpu_only
@pytest.mark.parametrize("kind", OPS)
def test_the_kernels_have_no_races(kind):
    spec = next(spec for spec in QUANT_MATMUL_SPECS if spec.kind == kind and spec.K > 256)
    arrays = present(spec.inputs())
    jax.block_until_ready(getattr(interpreted, f"{kind}_matmul")(*arrays))
    assert not get_races().races_found
    if kind != "fp8":
        jax.block_until_ready(getattr(interpreted, f"{kind}_widened")(*arrays, out_dtype=jnp.float32))
        assert not get_races().races_found


def test_programs_of_a_cluster_that_fetch_x_together_change_no_bits():
    spec = QuantMatmulSpec("together", "int4", M=40, N=256, K=512, group=64)
    arrays = present(spec.inputs())
    blocks = dataclasses.replace(mosaic_sm90.default_blocks(40, 256, 4), warpgroups=1, stages=2, programs=4)
    options = {} if ON_GPU else {"interpret": plgpu.InterpretGPUParams(detect_races=True)}
    alone, together = (
        mosaic_sm90.int4_matmul(*arrays, blocks=dataclasses.replace(blocks, cluster=size), splits=2, **options)
        for size in (1, 2)
    )
    np.testing.assert_array_equal(bits_of(together), bits_of(alone))


def test_many_rows_of_e4m3_are_left_to_xla():
    x, weight = jnp.zeros((513, 128), jnp.bfloat16), jnp.zeros((64, 128), jnp.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="513 rows, more than 512, are faster in XLA's own e4m3 product"):
        mosaic_sm90.fp8_matmul(x, weight, jnp.ones(64))


@pytest.mark.parametrize("warpgroups", [1, 2, 3, 4])
@pytest.mark.parametrize("columns", [8, 64, 128])
def test_warpgroups_never_ask_for_more_registers_than_a_block_was_launched_with(warpgroups, columns):
    # setmaxnreg waits for registers that somebody gives up; too many asked for is a hang that only a GPU shows.
    found = mosaic_sm90._registers(mosaic_sm90.Blocks(warpgroups=warpgroups, columns=columns))
    launched = 65536 // (128 * (warpgroups + 1)) // 8 * 8
    if found is not None:
        fetching, computing = found
        assert fetching + warpgroups * computing <= launched * (warpgroups + 1)
        assert fetching % 8 == computing % 8 == 0
        assert fetching < launched <= computing <= 255


def test_the_kernel_takes_bf16_only():
    with pytest.raises(NotImplementedError, match="bfloat16 activations here, got float32"):
        mosaic_sm90.refuse(jnp.zeros((1, 128)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w, s: api.int8_matmul(x[:, :64], w, s), r"hold \[N, K\] = \[64, 128\], x is \[2, 64\]"),
        (lambda x, w, s: api.int8_matmul(x, w, s[:3]), r"scale must be f32\[N\] = f32\[64\]"),
        (lambda x, w, s: api.int4_matmul(x, w[:, :, :4], s), r"scale must be \[K / group, N\]"),
        (lambda x, w, s: api.int4_matmul(x, w[:, :, :4], s.reshape(1, 64), s.reshape(64, 1)), "must agree with scale"),
        (lambda x, w, s: api.fp8_matmul(x, jnp.zeros((64, 128)), s), "weight must be float8_e4m3fn"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, 128), jnp.bfloat16), jnp.zeros((1, 2, 8, 128), jnp.int32), jnp.ones((64,)))
