"""Twins of a model's matrices in 12 bits: every bit of them, part by part, and why there are none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import abstract
from jaxllm.graph.spread import Home
from jaxllm.graph.weights import packed
from jaxllm.graph.weights.random import dummy
from pallas_kernels import bf12
from sharding.axes import MeshConfig
from sharding.mesh import stage_meshes

SIZES = dict(vocab_size=128, num_layers=2, d_model=64, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=320)
CONFIG = ModelConfig(**SIZES)


def bits(array):
    return np.asarray(array).view(np.uint16)


@pytest.mark.parametrize("at_once", [1, 3 * 64 * 64, packed.AT_ONCE])
def test_twins_made_some_rows_at_a_time_hold_every_bit(at_once, monkeypatch):
    monkeypatch.setattr(packed, "AT_ONCE", at_once)
    monkeypatch.setattr(packed, "_BEGUN", {})
    jax.clear_caches()
    params = dummy(CONFIG)
    twins = packed.with_twins(params)
    assert packed.without_twins(twins).keys() == params.keys()
    for number, layer in params["layers"].items():
        for name, place in packed.PLACES.items():
            weight = bf12.unpack(twins[packed.KEY]["layers"][number][name])
            weight = bf12.in_order(weight) if name == "gate_up" else weight
            np.testing.assert_array_equal(bits(weight), bits(layer[place][name]))
    jax.clear_caches()


def test_a_program_that_could_not_be_compiled_is_tried_again(monkeypatch):
    params, packer = dummy(CONFIG), packed._packer

    def full(_):
        raise MemoryError("for once")

    monkeypatch.setattr(packed, "_BEGUN", {})
    monkeypatch.setattr(packed, "_packer", full)
    begun = packed.begin(params).values()
    assert all(isinstance(future.exception(), MemoryError) for future in begun)
    monkeypatch.setattr(packed, "_packer", packer)
    assert packed.KEY in packed.with_twins(params)


def test_shapes_are_those_of_what_is_made():
    _, shapes = abstract(CONFIG)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
    made, said = packed.with_twins(dummy(CONFIG)), packed.with_shapes(shapes)
    assert jax.tree.structure(made) == jax.tree.structure(said)
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(said), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_one_slab_of_numbers_too_far_apart_is_named():
    params = dummy(CONFIG)
    o = params["layers"][1]["attention"]["o"]
    params["layers"][1]["attention"]["o"] = o.at[5, :8].set(jnp.asarray(2.0 ** -np.arange(40, 48), o.dtype))
    with pytest.raises(packed.PackingError, match=r"layers\.1\.o: 1 slab of 16 x 64 weights"):
        packed.with_twins(params)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (dict(windows=(16, None)), "attention within a window"),
        (dict(mlp_bias=True), "a bias of gate and up"),
        (dict(d_ff=96), r"layer 0: down is \[64, 96\]"),
    ],
)
def test_a_model_that_is_not_plain_is_refused_with_the_reason(changed, why):
    config = ModelConfig(**SIZES | changed)
    assert why.replace("\\", "") in (packed.refusal(config, abstract(config)[1]) or "")


def test_a_plain_model_is_not_refused():
    assert packed.refusal(CONFIG, abstract(CONFIG)[1]) is None


def test_devices_that_share_matrices_pack_their_own_parts():
    """Rows of gate and up take turns within each device's share; what one cannot pack, all of them know."""
    model = ModelConfig(**SIZES | dict(d_model=128, num_heads=8, num_kv_heads=4, d_ff=256))
    config = MeshConfig(tensor=2)
    (mesh,) = stage_meshes(config, jax.devices()[:2])[0]
    home = Home.on(mesh, model, config)
    home = dataclasses.replace(home, packed=True)
    params = jax.tree.map_with_path(lambda path, leaf: home.place(tuple(part.key for part in path), leaf), dummy(model))
    made, said = packed.with_twins(params), home.shapes(jnp.bfloat16)
    assert jax.tree.structure(made) == jax.tree.structure(said)
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(said), strict=True):
        assert one.shape == other.shape
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
    assert made[packed.KEY].keys() == {"layers"}
    for name, place in packed.PLACES.items():
        words, plain = made[packed.KEY]["layers"][1][name], params["layers"][1][place][name]
        for twin, own in zip(words.addressable_shards, plain.addressable_shards, strict=True):
            weight = bf12.unpack(twin.data)
            weight = bf12.in_order(weight) if name == "gate_up" else weight
            np.testing.assert_array_equal(bits(weight), bits(own.data))
    down = params["layers"][0]["mlp"]["down"]
    odd = down.at[5, 200:208].set(jnp.asarray(2.0 ** -np.arange(40, 48), down.dtype))
    params["layers"][0]["mlp"]["down"] = jax.device_put(odd, down.sharding)
    with pytest.raises(packed.PackingError, match=r"layers\.0\.down: 1 slab"):
        packed.with_twins(params)
