import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.kernel_backends import ON_GPU, jitted, pairs

from pallas_kernels.gated_matmul import cuda, emulated, reference
from pallas_kernels.gated_matmul.api import gated_matmul
from pallas_kernels.gated_matmul.specs import GATED_SPECS, REAL_GATED_SPECS, GatedSpec

SPECS = GATED_SPECS + (REAL_GATED_SPECS if ON_GPU else ())
SMALL = next(spec for spec in GATED_SPECS if spec.name == "small_three_tiles")


def exact(spec):
    """In float32, nothing rounded between."""
    x, gate_up = (array.astype(np.float32) for array in spec.inputs())
    gate, up = np.split(x @ gate_up.T, 2, -1)
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize(("name", "spec"), pairs("gated_matmul", SPECS))
def test_agrees_with_exact_arithmetic(name, spec):
    want = exact(spec)
    got = jitted(gated_matmul, name)(*map(jnp.asarray, spec.inputs()))
    assert got.dtype == jnp.dtype(spec.dtype)
    limit = 6e-3 if spec.dtype == "bfloat16" else 1e-5
    assert np.linalg.norm(np.asarray(got, np.float32) - want) <= limit * np.linalg.norm(want)


@pytest.mark.skipif(ON_GPU, reason="the GPU's cuts are benchmarks.gated_matmul check")
def test_every_cut_gives_a_row_the_same_bits():
    x, gate_up = map(jnp.asarray, SMALL.inputs())
    want = emulated.gated_matmul(x, gate_up)
    for cut in (*cuda.CUTS, cuda.Cut(128, "weights", run=1)):
        np.testing.assert_array_equal(np.asarray(emulated.gated_matmul(x, gate_up, cut)), np.asarray(want))
    np.testing.assert_array_equal(np.asarray(emulated.gated_matmul(x[140:150], gate_up)), np.asarray(want)[140:150])


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("spec", REAL_GATED_SPECS, ids=lambda spec: spec.name)
def test_the_same_bits_again_and_whatever_the_other_rows(spec):
    run = jitted(gated_matmul, "cuda")
    x, gate_up = map(jnp.asarray, spec.inputs())
    want, others = np.asarray(run(x, gate_up)), np.asarray(run(x.at[7:].set(1), gate_up))
    np.testing.assert_array_equal(others[:7], want[:7])
    for _ in range(20):
        np.testing.assert_array_equal(np.asarray(run(x, gate_up)), want)


@pytest.mark.parametrize(
    ("rows", "columns", "cut"),
    [
        (128, 14336, cuda.Cut(224, "rows")),  # 8B: one tile for all but four multiprocessors
        (256, 14336, cuda.Cut(224, "weights")),
        (1024, 14336, cuda.Cut(256, "weights")),
        (128, 7168, cuda.Cut(128, "rows")),  # over two devices
        (256, 3072, cuda.Cut(128, "weights")),
    ],
)
def test_a_product_is_cut_so_that_multiprocessors_end_together(rows, columns, cut):
    assert cuda.cut_for(rows, columns, 132) == cut


@pytest.mark.parametrize("rows", [64, 160, 192, 300])
def test_rows_that_padding_makes_many_more_of_are_declined(rows):
    x = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=f"{rows} rows is as fast"):
        cuda.gated_matmul(x, jax.ShapeDtypeStruct((28672, 4096), jnp.bfloat16))


def test_wrong_shapes_raise_an_error_that_names_them():
    x = jnp.zeros((2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"gate_up\[2F, D\], not empty; got \[2, 64\] and \[8, 32\]"):
        gated_matmul(x, jnp.zeros((8, 32), jnp.bfloat16))
    with pytest.raises(ValueError, match="as many rows of gate as of up"):
        gated_matmul(x, jnp.zeros((7, 64), jnp.bfloat16))
    with pytest.raises(ValueError, match="one dtype"):
        gated_matmul(x, jnp.zeros((8, 64), jnp.float32))


def test_the_kernel_has_the_reference_s_gradients(monkeypatch):
    """Its own product stands in for the kernel's, which a CPU does not run."""
    x, gate_up = map(jnp.asarray, GatedSpec("any", T=4, D=64, F=16).inputs())
    monkeypatch.setattr(cuda, "register", lambda *_: None)
    monkeypatch.setattr(cuda, "library", lambda: None)
    monkeypatch.setattr(cuda, "call", lambda target, blocks, x, gate_up, cut: reference.gated_matmul(x, gate_up))

    def loss(function):
        return jax.grad(lambda x, w: function(x, w).astype(jnp.float32).sum(), argnums=(0, 1))(x, gate_up)

    for got, want in zip(loss(cuda._run), loss(reference.gated_matmul), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
