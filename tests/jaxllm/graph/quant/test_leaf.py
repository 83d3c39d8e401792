"""Quantised leaves: their product is that of the weight they stand for, at any size, and they travel as pytrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.graph.layers.linear import linear, project
from jaxllm.graph.quant.leaf import Int4Weight, StackedWeight
from jaxllm.graph.quant.scheme import Scheme, to_fp8, to_int4, to_int8

OUTPUTS, INPUTS = 200, 192  # neither is what the kernels tile


def weight(seed=0, outputs=OUTPUTS, inputs=INPUTS):
    return 0.02 * jax.random.normal(jax.random.key(seed), (outputs, inputs), jnp.float32)


def with_zeros(seed=0, order=None):
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.integers(0, 16, (OUTPUTS, INPUTS)), jnp.int8)
    scale = jnp.asarray(rng.random((INPUTS // 32, OUTPUTS)) + 0.1, jnp.float16)
    zero = jnp.asarray(rng.integers(0, 16, (INPUTS // 32, OUTPUTS)), jnp.float16)
    return Int4Weight.of(q, scale, zero, order)


LEAVES = {
    "int8": lambda: to_int8(weight()),
    "int4": lambda: to_int4(weight(), 64),
    "int4_zeros": with_zeros,
    "int4_reordered": lambda: with_zeros(order=jnp.asarray(np.random.default_rng(1).permutation(INPUTS), jnp.int32)),
    "stacked": lambda: StackedWeight.of((to_int8(weight()), to_int4(weight(1, 70), 32))),
}


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_the_product_is_that_of_the_weight_the_leaf_stands_for(name, lead):
    leaf = LEAVES[name]()
    x = jax.random.normal(jax.random.key(9), (*lead, INPUTS), jnp.float32)
    wide = leaf.widened()
    assert wide.shape == leaf.shape == (leaf.outputs, leaf.inputs)
    got = jax.jit(project)(x, leaf)
    assert got.shape == (*lead, leaf.outputs)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, x @ wide.T, rtol=0, atol=2e-5 * float(jnp.abs(wide).max()) * INPUTS)


def test_fp8_rounds_the_activations_too_and_stays_within_three_percent():
    leaf, x = to_fp8(weight()), jax.random.normal(jax.random.key(9), (7, INPUTS), jnp.float32)
    expected = x @ leaf.widened().T
    assert np.linalg.norm(leaf.project(x) - expected) < 0.03 * np.linalg.norm(expected)


def test_a_linear_layer_casts_back_after_the_bias_as_with_a_plain_weight():
    leaf, x = to_int8(weight()), jnp.ones((3, INPUTS), jnp.bfloat16)
    bias = jnp.full((OUTPUTS,), 0.5, jnp.bfloat16)
    plain, biased = linear(x, leaf), linear(x, leaf, bias)
    assert plain.dtype == biased.dtype == jnp.bfloat16
    np.testing.assert_array_equal(biased, (leaf.project(x) + jnp.float32(0.5)).astype(jnp.bfloat16))


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_passes_through_jit_and_keeps_its_sizes(name):
    leaf = LEAVES[name]()
    again = jax.jit(lambda tree: tree)({"w": leaf})["w"]
    assert (again.shape, type(again)) == (leaf.shape, type(leaf))
    assert leaf[...] is leaf
    assert leaf.nbytes == sum(array.nbytes for array in jax.tree.leaves(leaf))


def test_the_shapes_a_scheme_foretells_are_those_it_makes():
    for scheme in (Scheme("int8"), Scheme("int4", 64), Scheme("fp8")):
        tree = {"layers": {0: {"mlp": {"down": weight()}, "norms": jnp.ones((2, 8))}}, "head": weight(1)}
        told = scheme.shapes(jax.eval_shape(lambda tree=tree: tree))
        made = {
            "layers": {
                0: {"mlp": {"down": scheme.leaf(("layers", 0, "mlp", "down"), weight())}, "norms": jnp.ones((2, 8))}
            },
            "head": scheme.leaf(("head",), weight(1)),
        }
        assert jax.tree.structure(told) == jax.tree.structure(made)
        assert [(a.shape, a.dtype) for a in jax.tree.leaves(told)] == [
            (a.shape, a.dtype) for a in jax.tree.leaves(made)
        ]
