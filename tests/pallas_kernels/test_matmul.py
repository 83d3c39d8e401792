import jax.numpy as jnp
import numpy as np
import pytest
from helpers.kernel_backends import ON_GPU, jitted, pairs

from pallas_kernels.matmul.api import matmul
from pallas_kernels.matmul.specs import MATMUL_SPECS, REAL_MATMUL_SPECS

SPECS = MATMUL_SPECS + (REAL_MATMUL_SPECS if ON_GPU else ())


@pytest.mark.parametrize(("name", "spec"), pairs("matmul", SPECS))
def test_agrees_with_exact_arithmetic(name, spec):
    x, weight, bias = spec.inputs()
    want = x.astype(np.float64) @ weight.astype(np.float64).T
    want = want if bias is None else want + bias.astype(np.float64)
    got = jitted(matmul, name)(x, weight, *([] if bias is None else [bias]))
    assert got.dtype == jnp.dtype(spec.dtype)
    limit = 4e-3 if spec.dtype == "bfloat16" else 1e-5
    assert np.linalg.norm(np.asarray(got, np.float64) - want) <= limit * np.linalg.norm(want)


def test_wrong_shapes_raise_an_error_that_names_them():
    x, weight = jnp.zeros((2, 64)), jnp.zeros((32, 64))
    with pytest.raises(ValueError, match=r"got \[2, 64\] and \[64, 32\]"):
        matmul(x, weight.T)
    with pytest.raises(ValueError, match=r"bias must be \[32\]"):
        matmul(x, weight, jnp.zeros(31))
