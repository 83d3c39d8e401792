"""bf16 in 12 bits: every bit comes back, or the slabs that cannot hold theirs are counted."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.decode_layers import run

from pallas_kernels import bf12
from pallas_kernels.decode_layers.api import Few, decode_layers
from pallas_kernels.decode_layers.specs import BF12_SPECS, EPS, LayersSpec


def _bits(array: jax.Array) -> np.ndarray:
    return np.asarray(jax.lax.bitcast_convert_type(array, jnp.uint16))


def _weight(seed: int = 0, shape: tuple[int, int] = (128, 192)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.02


def _odd() -> np.ndarray:
    weight = _weight(1)
    weight[0, :5] = 0.0, -0.0, np.inf, -np.inf, np.nan
    weight[17, 3:6] = 1e-39, -3e-40, 1e-30  # two subnormal numbers, and one far below
    weight[40:60, 70:100] = 0.0
    weight[100, 100] = 300.0  # an outlier
    weight[64:80, 64:128] = 0.0  # all of a slab
    return weight


@pytest.mark.parametrize(
    "weight", [_weight(), _odd(), _weight(2) * 1e38, _weight(3) * 1e-33], ids=["plain", "odd", "large", "small"]
)
def test_every_bit_comes_back(weight: np.ndarray) -> None:
    given = jnp.asarray(weight, jnp.bfloat16)
    words, failed = jax.jit(bf12.pack)(given)
    assert words.shape == (2, 3, 4, bf12.WORDS)
    assert failed == 0
    np.testing.assert_array_equal(_bits(bf12.unpack(words)), _bits(given))


def test_slabs_that_cannot_hold_their_escapes_are_counted() -> None:
    weight = _weight()
    weight[16, :8] = 2.0 ** -np.arange(100, 108)
    weight[33, 64:71] = 2.0 ** -np.arange(100, 107)  # seven are held
    _, failed = bf12.pack(jnp.asarray(weight, jnp.bfloat16))
    assert failed == 1


def test_gates_and_ups_take_turns() -> None:
    weight = jnp.arange(64)[:, None] * jnp.ones((1, 2), jnp.int32)
    rows = bf12.in_turns(weight)[:, 0]
    assert rows[:20].tolist() == [*range(8), *range(32, 40), *range(8, 12)]


def test_other_shapes_and_types_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 64"):
        bf12.pack(jnp.zeros((64, 96), jnp.bfloat16))
    with pytest.raises(ValueError, match="float32"):
        bf12.pack(jnp.zeros((64, 64)))
    with pytest.raises(ValueError, match="388"):
        bf12.unpack(jnp.zeros((1, 1, 4, 128), jnp.int32))


@pytest.mark.parametrize("spec", BF12_SPECS, ids=lambda spec: spec.name)
def test_layers_in_12_bits_give_every_bit_of_those_in_16(spec: LayersSpec) -> None:
    given = spec.inputs()
    x, pages = run("reference", spec, given)
    expected, written = run("reference", replace(spec, kind="bf16"), given)
    for got, want in zip(jax.tree.leaves((x, pages)), jax.tree.leaves((expected, written)), strict=True):
        np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


def test_gates_and_ups_come_back_from_their_turns() -> None:
    weight = jnp.arange(64)[:, None] * jnp.ones((1, 2), jnp.int32)
    np.testing.assert_array_equal(bf12.in_order(bf12.in_turns(weight)), weight)


def test_a_weight_of_12_bits_knows_its_sizes_and_has_no_scales() -> None:
    weight = Few(bf12.pack(jnp.asarray(_weight(), jnp.bfloat16))[0], None)
    weight.check("good")
    assert (weight.kind, weight.shape, weight.group) == ("bf12", (128, 192), 192)
    with pytest.raises(ValueError, match=r"layer 3: bf12\[128, 192\] with scales"):
        replace(weight, scale=jnp.ones(128)).check("layer 3")
    with pytest.raises(ValueError, match="need e4m3"):
        replace(weight, values=weight.values[..., :-1]).check("layer 3")


def test_a_kernel_that_does_not_read_it_says_so() -> None:
    spec = replace(BF12_SPECS[0], lengths=(1,), L=1)
    x, layers, pages, *rows = spec.arguments(spec.inputs())
    with pytest.raises(NotImplementedError):
        decode_layers(x, layers, pages, *rows, eps=EPS, scale=1.0, implementation="wide")
