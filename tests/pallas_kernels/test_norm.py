import jax.numpy as jnp
import numpy as np
import pytest
from helpers.kernel_backends import jitted, pairs

from pallas_kernels.norm.api import add_norm
from pallas_kernels.norm.specs import ADD_NORM_SPECS


@pytest.mark.parametrize(("name", "spec"), pairs("norm.add", ADD_NORM_SPECS))
def test_the_sum_is_rounded_once_and_its_norm_is_that_of_the_rounded_sum(name, spec):
    x, delta, weights = spec.inputs()
    run = jitted(lambda *a, **o: add_norm(*a, spec.which, eps=spec.eps, **o), name)
    total, normed = (np.asarray(each) for each in run(x, delta, weights))
    dtype = jnp.dtype(spec.dtype)
    added = delta.astype(np.float64).sum(axis=0).astype(dtype) if spec.parts else delta
    exact = x.astype(np.float64) + added.astype(np.float64)
    step = 2.0 ** (-8 if spec.dtype == "bfloat16" else -23)
    # An f32 sum of parts in another order may round delta the other way.
    np.testing.assert_allclose(total.astype(np.float64), exact, rtol=step, atol=8 * step if spec.parts else 2 * step)
    scale = 1 / np.sqrt(np.square(total.astype(np.float64)).mean(axis=-1, keepdims=True) + spec.eps)
    expected = total.astype(np.float64) * scale * weights[spec.which].astype(np.float64)
    np.testing.assert_allclose(normed.astype(np.float64), expected, rtol=2 * step, atol=1e-6)
    assert total.dtype == normed.dtype == dtype


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (1, jnp.zeros((3, 9)), r"need x\[T, D\] and delta"),
        (1, jnp.zeros((2, 3, 8), jnp.bfloat16), "float32 in parts; got bfloat16"),
        (2, jnp.zeros((1, 8)), r"weights must be \[n, D = 8\] with n > 1"),
    ],
)
def test_wrong_arguments_raise_an_error_that_names_the_shapes(position, wrong, message):
    arguments = [jnp.zeros((3, 8)), jnp.zeros((3, 8)), jnp.zeros((2, 8))]
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        add_norm(*arguments, 1, eps=1e-5)
