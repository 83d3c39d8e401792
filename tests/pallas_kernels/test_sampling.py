import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import kernel_oracles as oracles
from helpers.kernel_backends import jitted, pairs

from pallas_kernels.sampling import reference
from pallas_kernels.sampling.api import sample
from pallas_kernels.sampling.specs import SAMPLING_SPECS, SamplingSpec


@pytest.mark.parametrize(("name", "spec"), pairs("sampling", SAMPLING_SPECS))
def test_tokens_equal_those_of_a_sorting_float64_oracle_with_the_same_noise(name, spec):
    inputs = spec.inputs()
    tokens = np.asarray(jitted(sample, name)(*inputs))
    expected, certain = oracles.sample(*inputs)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens[certain], expected[certain])
    assert certain.mean() > 0.8  # the comparison is one
    assert np.isfinite(inputs[0][np.arange(spec.B), tokens]).all()


DRAWS = [
    SamplingSpec("top_k", B=2000, V=40, spread=1.0, parameters=((1.5, 5, 1.0, 0.0),)),
    SamplingSpec("top_p", B=2000, V=40, spread=1.0, parameters=((1.5, 0, 0.7, 0.0),)),
    SamplingSpec("min_p", B=2000, V=40, spread=1.0, parameters=((1.5, 0, 1.0, 0.2),)),
    SamplingSpec("all", B=2000, V=40, spread=1.0, parameters=((1.5, 20, 0.8, 0.1),)),
    SamplingSpec("ties", B=2000, V=40, spread=1.0, parameters=((1.5, 7, 0.8, 0.0),), levels=2),
]


@pytest.mark.parametrize(("name", "spec"), pairs("sampling", DRAWS))
def test_many_draws_of_one_row_reach_every_kept_token_and_no_other(name, spec):
    logits, keys, *parameters = spec.inputs(seed=3)
    logits[:] = logits[0]
    keep = oracles.kept(logits[0], *spec.parameters[0])
    assert 1 < keep.sum() < spec.V
    tokens = np.asarray(jitted(sample, name)(logits, keys, *parameters))
    assert set(tokens) == set(np.flatnonzero(keep))


@pytest.mark.parametrize(("name", "spec"), pairs("sampling", SAMPLING_SPECS[2:3]))
def test_a_rows_token_does_not_depend_on_its_batch(name, spec):
    inputs = spec.inputs()
    run = jitted(sample, name)
    whole = np.asarray(run(*inputs))
    for rows in ([0], [9], [7, 7, 3], list(range(0, 36, 2)), list(range(36))[::-1]):
        np.testing.assert_array_equal(np.asarray(run(*(array[rows] for array in inputs))), whole[rows])


def test_the_references_bits_are_those_of_jax_random_and_of_the_published_algorithm():
    keys = np.random.default_rng(0).integers(0, 2**32, (4, 2), dtype=np.uint32)
    keys[0] = 0
    counter = jnp.broadcast_to(jnp.arange(300, dtype=jnp.uint32), (4, 300))
    bits = np.asarray(reference.threefry(keys[:, :1], keys[:, 1:], counter))
    for key, row in zip(keys, bits, strict=True):
        np.testing.assert_array_equal(row, oracles.threefry_bits(key, 300))
        with jax.threefry_partitionable(True):
            np.testing.assert_array_equal(row, jax.random.bits(jax.random.wrap_key_data(key), (300,)))


def test_gumbel_noise_has_the_gumbel_distribution():
    noise = np.sort(np.asarray(reference.gumbel(jnp.array([[3, 5]], jnp.uint32), 200_000))[0].astype(np.float64))
    distance = np.abs(np.exp(-np.exp(-noise)) - (np.arange(len(noise)) + 0.5) / len(noise)).max()
    assert distance < 1.95 / np.sqrt(len(noise))  # Kolmogorov-Smirnov, p = 0.001


def test_ordered_bits_compare_as_the_floats_do():
    values = np.array(
        [-np.inf, -3e38, -1.5, -1e-37, -0.0, 0.0, 1e-37, 1.0, np.nextafter(np.float32(1), 2), 3e38, np.inf]
    )
    bits = np.asarray(reference.ordered_bits(jnp.asarray(values, jnp.float32))).astype(np.int64)
    steps = np.diff(bits)
    assert (steps[np.diff(values.astype(np.float32)) > 0] > 0).all()
    assert bits[4] == bits[5]
    assert bits[0] > 0


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, jnp.zeros((3, 0)), r"logits must be f32\[B, V\], not empty, got float32\[3, 0\]"),
        (0, jnp.zeros((3, 9), jnp.bfloat16), r"logits must be f32\[B, V\].*got bfloat16\[3, 9\]"),
        (1, jnp.zeros((3, 2), jnp.int32), r"keys must be u32\[B, 2\] = u32\[3, 2\], got int32\[3, 2\]"),
        (2, jnp.zeros(4), r"temperature must be float32\[B\] = float32\[3\], got float32\[4\]"),
        (3, jnp.zeros(3), r"top_k must be int32\[B\] = int32\[3\], got float32\[3\]"),
        (5, jnp.zeros((3, 1)), r"min_p must be float32\[B\] = float32\[3\], got float32\[3, 1\]"),
    ],
)
def test_wrong_arguments_raise_an_error_that_names_the_shapes(position, wrong, message):
    arguments = [jnp.zeros((3, 9)), jnp.zeros((3, 2), jnp.uint32), jnp.zeros(3), jnp.zeros(3, jnp.int32)]
    arguments += [jnp.zeros(3), jnp.zeros(3)]
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        sample(*arguments)
