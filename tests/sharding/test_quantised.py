"""Quantised leaves on a mesh: each shard's part stands for the same weights, products agree with one device's, and
what cannot be cut is refused with its arithmetic."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.quant.leaf import Fp8Weight, Int4Weight, StackedWeight
from jaxllm.graph.quant.scheme import to_fp8, to_int4, to_int8
from jaxllm.graph.spread import place_quantised, shape_of_quantised
from sharding.axes import MeshConfig, MeshError
from sharding.mesh import stage_meshes
from sharding.placement import Placement

ROWS, COLUMNS = ("qkv", "embed"), ("embed", "ffn")
MODEL = functools.partial(ModelConfig, vocab_size=64, num_layers=1, num_kv_heads=2)
SMALL = MODEL(d_model=192, num_heads=4, head_dim=24, d_ff=256)  # parts of packed tiles
ALIGNED = MODEL(d_model=256, num_heads=4, head_dim=64, d_ff=512)  # whole tiles


def placed(model, **mesh):
    config = MeshConfig(**mesh)
    return Placement(stage_meshes(config)[0][0], config, model)


def weight(outputs, inputs, seed=0):
    return 0.02 * jax.random.normal(jax.random.key(seed), (outputs, inputs), jnp.float32)


def four_bits(outputs, inputs, order=None):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.integers(0, 16, (outputs, inputs)), jnp.int8)
    scale = jnp.asarray(rng.random((inputs // 64, outputs)) * 0.01 + 0.001, jnp.float16)
    zero = jnp.asarray(rng.integers(0, 16, (inputs // 64, outputs)), jnp.float16)
    return Int4Weight.of(q, scale, zero, order)


def in_blocks(outputs, inputs):
    rng = np.random.default_rng(1)
    values = jnp.asarray(rng.standard_normal((outputs, inputs)), jnp.float8_e4m3fn)
    return Fp8Weight.of(values, jnp.asarray(rng.random((-(-inputs // 128), outputs)) + 0.1, jnp.float32))


def shuffled(outputs, inputs, seed=2):
    return four_bits(outputs, inputs, jnp.asarray(np.random.default_rng(seed).permutation(inputs), jnp.int32))


def stacked(outputs, inputs):
    return StackedWeight.of((to_int8(weight(outputs // 2, inputs)), shuffled(outputs - outputs // 2, inputs)))


LEAVES = {
    "int8": lambda *shape: to_int8(weight(*shape)),
    "int4": lambda *shape: to_int4(weight(*shape), 64),
    "int4_zeros": four_bits,
    "int4_reordered": shuffled,
    "fp8": lambda *shape: to_fp8(weight(*shape)),
    "fp8_fixed": lambda *shape: Fp8Weight.of(to_fp8(weight(*shape)).values, jnp.ones(shape[0]), jnp.float32(0.01)),
    "fp8_blocks": in_blocks,
    "stacked": stacked,
}


def sizes(model, names):
    """[outputs, inputs] of the leaf with these logical axes."""
    rows = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    return (rows, model.d_model) if names is ROWS else (model.d_model, model.d_ff)


def product(place, names, leaf, x):
    """x @ leaf.T over the mesh, on one array again."""
    axes = place.shard_axes
    specs = jax.tree.map(lambda part: part.sharding.spec, leaf)
    split = P(None, axes)

    def run(held, x):
        out = held.project(x)
        return out if names is ROWS else jax.lax.psum(out, axes)

    takes, gives = (specs, P() if names is ROWS else split), split if names is ROWS else P()
    return jax.jit(jax.shard_map(run, mesh=place.mesh, in_specs=takes, out_specs=gives, check_vma=False))(leaf, x)


@pytest.mark.parametrize("model", [SMALL, ALIGNED], ids=["pieces of tiles", "whole tiles"])
@pytest.mark.parametrize("names", [ROWS, COLUMNS], ids=["outputs", "inputs"])
@pytest.mark.parametrize("kind", LEAVES)
def test_a_spread_leaf_gives_the_product_of_one_device(kind, names, model):
    if names is COLUMNS and kind in ("int4_reordered", "stacked"):
        pytest.skip("refused: see below")
    leaf, place = LEAVES[kind](*sizes(model, names)), placed(model, tensor=2)
    x = jax.random.normal(jax.random.key(9), (5, leaf.inputs), jnp.float32)
    expected = np.asarray(leaf.project(x))
    if names is ROWS:  # shards hold rows in an order of their own
        expected = expected[:, place.held(names, leaf.shape)[0].reshape(-1)]
    spread = place_quantised(place, names, leaf)
    got = product(place, names, spread, x)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("names", [ROWS, COLUMNS], ids=["outputs", "inputs"])
@pytest.mark.parametrize("kind", LEAVES)
def test_parts_stand_for_the_same_weights_and_their_shapes_are_known_before(kind, names):
    if names is COLUMNS and kind in ("int4_reordered", "stacked"):
        pytest.skip("refused: see below")
    leaf, place = LEAVES[kind](*sizes(SMALL, names)), placed(SMALL, tensor=2, seq=2)
    outputs, inputs = place.held(names, leaf.shape)
    wide = np.asarray(leaf.widened())
    for shard in range(2):
        part = leaf.part(*(rows if rows is None else rows[shard] for rows in (outputs, inputs)), ("tensor",))
        expected = wide[outputs[shard]] if inputs is None else wide[:, inputs[shard]]
        np.testing.assert_array_equal(part.widened(), expected)
    spread, said = place_quantised(place, names, leaf), shape_of_quantised(place, names, leaf)
    assert jax.tree.structure(spread) == jax.tree.structure(said)
    for made, told in zip(jax.tree.leaves(spread), jax.tree.leaves(said)):
        assert (made.shape, made.dtype, made.sharding) == (told.shape, told.dtype, told.sharding)


def test_kv_heads_are_repeated_where_there_are_fewer_than_shards():
    leaf, place = to_int4(weight(*sizes(SMALL, ROWS)), 64), placed(SMALL, tensor=4)
    spread = place_quantised(place, ROWS, leaf)
    assert spread.outputs == (1 + 1 + 1) * 24
    x = jax.random.normal(jax.random.key(9), (3, leaf.inputs), jnp.float32)
    expected = np.asarray(leaf.project(x))[:, place.held(ROWS, leaf.shape)[0].reshape(-1)]
    np.testing.assert_allclose(product(place, ROWS, spread, x), expected, rtol=0, atol=1e-6)


def test_groups_become_smaller_where_a_part_holds_less_than_one():
    leaf = to_int4(weight(192, 256), 128)
    part = leaf.part(None, np.arange(64, 128), ("tensor",))
    assert part.scale.shape[0] == 2  # of 64 inputs each, the second of them padding
    np.testing.assert_array_equal(part.widened(), leaf.widened()[:, 64:128])


@pytest.mark.parametrize(
    ("leaf", "count", "said"),
    [
        (lambda: to_int4(weight(64, 256), 64), 16, "into parts of 16 inputs: 16 = 0 x 64 + 16"),
        (lambda: in_blocks(64, 256), 64, "groups of 128 cannot be cut into parts of 64 inputs: 64 = 0 x 128 + 64"),
        (lambda: shuffled(64, 256), 128, "desc_act"),
        (lambda: stacked(64, 256), 128, "desc_act"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_its_arithmetic(leaf, count, said):
    with pytest.raises(MeshError, match=re.escape(said)):
        leaf().part(None, np.arange(count), ("tensor",))
