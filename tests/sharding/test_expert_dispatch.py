"""Tokens sent to their experts' devices and back, against every expert on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.grouped_matmul.api import routed_mlp
from sharding.axes import MeshConfig
from sharding.balance import first_slots, most_copies, table_of
from sharding.dispatch import Dispatch, choose, copies_of, moved
from sharding.mesh import stage_meshes

E, D, F, K = 8, 16, 8, 3


def mesh_of(devices):
    return stage_meshes(MeshConfig(expert=devices))[0][0]


def experts(seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((E, 2 * F, D), np.float32), rng.standard_normal((E, D, F), np.float32)


def tokens_of(count, seed=1, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, D), np.float32).astype(dtype)
    ids = np.argsort(rng.random((count, E)), axis=1)[:, :K].astype(np.int32)
    return x, ids, rng.random((count, K), np.float32)


@functools.cache
def exchange(devices, spare):
    """All tokens through all-to-all over `devices`, each expert in as many slots as there are spare ones for."""
    slots = first_slots(E, spare, devices)
    table, held = jnp.asarray(table_of(slots, E, most_copies(spare, devices))), len(slots) // devices
    dispatch = Dispatch(devices, ragged=False)

    def body(x, ids, weights, gate_up, down):
        parcel, sent = dispatch.send(x, copies_of(ids, table), weights, held)
        sums = routed_mlp(parcel.tokens, gate_up, down, parcel.slots, parcel.weights)
        return dispatch.back(sums, sent), parcel.slots

    mapped = jax.jit(
        jax.shard_map(body, mesh=mesh_of(devices), in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
    )
    return lambda x, *routing: mapped(x, *routing, *(jnp.asarray(leaf[slots], x.dtype) for leaf in experts()))


def exchanged(devices, x, ids, weights, spare=0):
    """The sums, and what slots each device was sent."""
    return [np.asarray(out) for out in exchange(devices, spare)(x, ids, weights)]


@pytest.mark.parametrize(("devices", "spare", "dtype"), [(2, 0, np.float32), (4, 4, np.float32), (4, 4, jnp.bfloat16)])
def test_what_comes_back_is_what_one_device_gives(devices, spare, dtype):
    x, ids, weights = tokens_of(24, dtype=dtype)
    got, _ = exchanged(devices, x, ids, weights, spare)
    gate_up, down = (jnp.asarray(leaf, x.dtype) for leaf in experts())
    want = np.asarray(routed_mlp(x, gate_up, down, ids, weights), np.float32)
    tolerance = 1e-5 if dtype == np.float32 else 0.03
    np.testing.assert_allclose(got.astype(np.float32), want, atol=tolerance * abs(want).max())


def test_no_token_is_dropped_when_all_of_them_want_one_device():
    x, _, weights = tokens_of(24)
    ids = np.broadcast_to(np.arange(K, dtype=np.int32), (24, K)).copy()  # all on the first of two devices
    got, slots = exchanged(2, x, ids, weights)
    want = np.asarray(routed_mlp(x, *map(jnp.asarray, experts()), ids, weights))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert (slots[:24] >= 0).all(), "each token came to the first device, once"
    assert (slots[24:] < 0).all(), "and none to the second"


def test_a_token_travels_once_to_a_device_whatever_it_wants_there():
    x, ids, weights = tokens_of(24)
    _, slots = exchanged(4, x, ids, weights)
    came = (slots.reshape(4, 24, K) >= 0).any(axis=2).sum(axis=1)
    reached = np.array([(ids // 2 == device).any(axis=1).sum() for device in range(4)])
    np.testing.assert_array_equal(came, reached)
    assert came.sum() < ids.size


def test_a_tokens_bits_depend_on_no_other_token_and_on_no_place():
    x, ids, weights = tokens_of(24)
    whole, _ = exchanged(4, x, ids, weights, 4)
    order = np.random.default_rng(5).permutation(24)
    shuffled, _ = exchanged(4, x[order], ids[order], weights[order], 4)
    np.testing.assert_array_equal(shuffled, whole[order])
    others = tokens_of(24, seed=7)
    for mine, other in zip((x, ids, weights), others):
        other[5] = mine[5]
    company, _ = exchanged(4, *others, 4)
    np.testing.assert_array_equal(company[5], whole[5])


def test_a_token_with_nan_spoils_no_other():
    x, ids, weights = tokens_of(24)
    whole, _ = exchanged(2, x, ids, weights)
    weights[3] = np.nan
    got, _ = exchanged(2, x, ids, weights)
    assert np.isnan(got[3]).all()
    np.testing.assert_array_equal(np.delete(got, 3, axis=0), np.delete(whole, 3, axis=0))


def test_copies_share_an_experts_tokens_by_what_a_token_is():
    slots = first_slots(E, 4, 2)
    table = jnp.asarray(table_of(slots, E, most_copies(4, 2)))
    _, ids, _ = tokens_of(200)
    found = np.asarray(copies_of(jnp.asarray(ids), table))
    np.testing.assert_array_equal(slots[found], ids)
    used = np.bincount(found.ravel(), minlength=slots.size)
    assert used.min() > 0
    assert abs(used[0] - used[8]) < 0.5 * (used[0] + used[8]), "both copies of expert 0 work"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_experts_are_moved_bit_for_bit(dtype):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 255, (12, 6, 4 * np.dtype(jnp.dtype(dtype)).itemsize), np.uint8)
    leaf = np.nan_to_num(bits.view(jnp.dtype(dtype)).astype(np.float32)).astype(jnp.dtype(dtype))
    source = rng.integers(0, 12, 12).astype(np.int32)
    body = lambda leaf, source: moved(leaf, source, "expert", 4)  # noqa: E731
    run = jax.shard_map(body, mesh=mesh_of(4), in_specs=(P("expert"), P()), out_specs=P("expert"), check_vma=False)
    np.testing.assert_array_equal(np.asarray(jax.jit(run)(leaf, source)), leaf[source])


def test_the_ragged_exchange_lowers_for_a_gpu_with_buffers_that_hold_every_token():
    dispatch = Dispatch(4, ragged=True)

    def body(x, ids, weights):
        parcel, sent = dispatch.send(x, ids, weights, 2)
        return dispatch.back(parcel.tokens, sent)

    mapped = jax.shard_map(body, mesh=mesh_of(4), in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in tokens_of(24)]
    text = jax.jit(mapped).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "ragged_all_to_all" in line]
    columns = D + 2 * K
    assert [f"-> tensor<{rows}x{width}xui32>" in call for call, rows, width in zip(calls, (24, 18), (columns, D))] == [
        True,
        True,
    ]


def test_the_way_is_chosen_by_what_it_sends():
    assert not choose("auto", 0, 8, 2, 4096).all_to_all  # nothing is dealt out
    assert not choose("all_to_all", 64, 1, 2, 4096).all_to_all
    assert not choose("auto", 8, 8, 2, 4096).all_to_all  # a few tokens: what it costs more is not won back
    assert choose("auto", 4096, 8, 2, 8192).all_to_all
    assert not choose("auto", 4096, 2, 8, 4096).all_to_all  # every token goes everywhere anyway
    assert choose("all_to_all", 8, 8, 2, 4096).all_to_all
    assert "sum" in choose("sum", 4096, 8, 2, 4096).why
    assert "4096 tokens a device go to 1.64 of 7 others" in choose("auto", 4096, 8, 2, 8192).why
