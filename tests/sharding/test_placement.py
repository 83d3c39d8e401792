"""Leaves on a mesh, the exchange between its devices, and meshes that cannot be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.graph.models.config import ExpertsConfig, ModelConfig
from sharding.axes import MeshConfig, MeshError
from sharding.collectives import ALONE
from sharding.mesh import stage_meshes
from sharding.placement import Placement

MODEL = ModelConfig(vocab_size=32, num_layers=1, d_model=8, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=12)


def placed(**mesh):
    config = MeshConfig(**mesh)
    return Placement(stage_meshes(config)[0][0], config, MODEL)


def shards_of(array):
    return [np.asarray(shard.data) for shard in sorted(array.addressable_shards, key=lambda shard: shard.device.id)]


def test_a_leaf_is_cut_by_shard_and_a_matrix_stays_one():
    weight = np.arange((4 + 2 * 2) * 4 * 8, dtype=np.float32).reshape(32, 8)
    q, k, v = weight[:16], weight[16:24], weight[24:]
    for shard, held in enumerate(shards_of(placed(tensor=2).place(("qkv", "embed"), weight))):
        half = [part[shard * len(part) // 2 : (shard + 1) * len(part) // 2] for part in (q, k, v)]
        np.testing.assert_array_equal(held, np.concatenate(half))
    repeated = shards_of(placed(tensor=4).place(("qkv", "embed"), weight))
    np.testing.assert_array_equal(repeated[0][4:8], repeated[1][4:8])
    columns = shards_of(placed(tensor=2).place(("embed", "heads"), weight.T[:, :16]))
    np.testing.assert_array_equal(columns[1], weight.T[:, 8:16])


def test_what_is_added_to_a_sum_is_held_once():
    bias = np.arange(1, 9, dtype=np.float32)
    held = shards_of(placed(tensor=4).place(("once",), bias))
    np.testing.assert_array_equal(sum(held), bias)


def test_the_shape_of_a_placed_leaf_is_known_before():
    place = placed(tensor=4)
    for axes, shape in ((("qkv", "embed"), (32, 8)), (("once",), (8,)), ((None, "embed"), (2, 8)), (("ffn",), (12,))):
        leaf = np.zeros(shape, np.float32)
        made, said = place.place(axes, leaf), place.shape(axes, jax.ShapeDtypeStruct(shape, jnp.float32))
        assert (made.shape, made.sharding) == (said.shape, said.sharding)


@pytest.mark.parametrize("ties", [False, True])
def test_the_largest_logit_is_found_among_shards_the_lowest_token_among_ties(ties):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 32)).astype(np.float32)
    if ties:
        logits = np.round(logits)
    logits[2, 5] = np.nan
    place = placed(tensor=4)
    exchange = place.exchange()
    got, bad = place.wrap(exchange.greedy, ("logits",), ("whole", "whole"))(jnp.asarray(logits))
    want, want_bad = ALONE.greedy(jnp.asarray(logits))
    np.testing.assert_array_equal(bad, want_bad)
    np.testing.assert_array_equal(np.delete(got, 2), np.delete(want, 2))
    whole = place.wrap(exchange.vocabulary, ("logits",), "whole")(jnp.asarray(logits))
    np.testing.assert_array_equal(whole, logits)


def test_a_table_cut_by_vocabulary_is_looked_up_as_one():
    place = placed(tensor=4)
    exchange, table = place.exchange(), np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
    ids = jnp.asarray([0, 31, 8, 7, 16], jnp.int32)
    look = lambda table, ids: exchange.leave(exchange.lookup(table, ids))  # noqa: E731
    place.roles["table"] = place.spec(("vocab", "embed"))
    got = place.wrap(look, ("table", "whole"), "whole")(place.place(("vocab", "embed"), table), ids)
    np.testing.assert_array_equal(got, table[ids])


@pytest.mark.parametrize("most_bytes", [0, 1 << 20])
@pytest.mark.parametrize("tensor", [1, 2])
def test_shards_of_attention_bring_their_tokens_together_for_the_experts_and_sums_home(tensor, most_bytes):
    """By a sum with zeros, or by a gather: the same numbers."""
    config = MeshConfig(expert=2, tensor=tensor, attention_data=True)
    experts = ExpertsConfig(count=4, per_token=2, d_ff=4)
    place = Placement(stage_meshes(config)[0][0], config, dataclasses.replace(MODEL, experts=experts))
    exchange = dataclasses.replace(place.exchange(3, decode=True), summed_most_bytes=most_bytes)
    x = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)  # three tokens a shard

    def body(x):
        near = exchange.near(x)
        part = near * (1.0 + jax.lax.axis_index("expert").astype(jnp.float32))
        return jnp.stack([near, near]), exchange.far(part)

    near, far = place.wrap(body, ("rows",), ("rows", "rows"))(jnp.asarray(x))
    np.testing.assert_array_equal(near, np.stack([x] * 4))
    np.testing.assert_allclose(far, 3 * tensor * x, rtol=1e-6)


@dataclasses.dataclass
class Elsewhere:
    """A device of one of two processes."""

    process_index: int
    platform: str = "cpu"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"expert": 2, "attention_data": True}, "mesh.attention_data over 2 processes"),
        ({"expert": 2, "redundant_experts": 2}, "experts are moved within one process only"),
    ],
)
def test_what_one_process_must_drive_is_refused_over_two(settings, said):
    with pytest.raises(MeshError, match=said):
        stage_meshes(MeshConfig(**settings), [Elsewhere(0), Elsewhere(1)])


def test_a_mesh_larger_than_the_machine_counts_devices():
    with pytest.raises(MeshError, match=r"1 x 2 x 1 x 1 x 8 = 16 devices; there are 8"):
        stage_meshes(MeshConfig(pipe=2, tensor=8))
    groups = [mesh.devices.size for replica in stage_meshes(MeshConfig(data=2, pipe=2, tensor=2)) for mesh in replica]
    assert groups == [2, 2, 2, 2]
