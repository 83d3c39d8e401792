"""Sums over simulated devices against sums on the host; on a GPU machine the same over its real devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.all_reduce import shots
from pallas_kernels.all_reduce.api import all_reduce
from pallas_kernels.all_reduce.specs import ALL_REDUCE_SPECS
from pallas_kernels.dispatch import implementations


def summed(spec, way, seed=0):
    """(what each device got [ranks, *shape], what was given)."""
    devices = jax.devices()[: spec.ranks]
    mesh = Mesh(np.array(devices), ("tensor",), axis_types=(AxisType.Auto,))
    given = np.random.default_rng(seed).standard_normal((spec.ranks, *spec.shape)).astype(jnp.dtype(spec.dtype))
    groups = (tuple(device.id for device in devices),)
    one = lambda x: all_reduce(x, "tensor", groups, implementation=way)  # noqa: E731
    f = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=P("tensor"), out_specs=P("tensor"), check_vma=False))
    return np.asarray(f(jax.device_put(given, NamedSharding(mesh, P("tensor"))))), given


def available(platform):
    return [each.name for each in implementations("all_reduce", platform)]


def check(spec, way):
    got, given = summed(spec, way)
    want = given.astype(np.float64).sum(axis=0)
    error = np.linalg.norm(got.astype(np.float64) - want) / (np.linalg.norm(want) * np.sqrt(spec.ranks))
    assert error < (1e-6 if spec.dtype == "float32" else 4e-3)
    bits = got.view(np.uint8)
    assert (bits == bits[0]).all(), "devices disagree"
    again, _ = summed(spec, way)
    assert (again.view(np.uint8) == bits).all(), "a repeat differs"


@pytest.mark.parametrize("way", available("cpu"))
@pytest.mark.parametrize("spec", ALL_REDUCE_SPECS[::4], ids=lambda spec: spec.name)
def test_every_device_gets_the_same_sum(spec, way):
    check(spec, way)


@pytest.mark.gpu
@pytest.mark.parametrize("way", available("gpu"))
@pytest.mark.parametrize("spec", ALL_REDUCE_SPECS, ids=lambda spec: spec.name)
def test_every_device_gets_the_same_sum_on_gpus(spec, way):
    if jax.default_backend() != "gpu" or len(jax.devices()) < spec.ranks:
        pytest.skip(f"needs {spec.ranks} GPUs")
    check(spec, way)


@pytest.mark.parametrize("ranks", shots.RANKS)
def test_two_shots_are_taken_only_where_every_rank_gets_whole_units(ranks):
    most = shots.ONE_SHOT_MOST_BYTES[ranks]
    assert not shots.takes_two_shots(most, ranks)
    assert shots.takes_two_shots(2 * most, ranks)
    assert not shots.takes_two_shots(2 * most + 8, ranks)


@pytest.mark.parametrize(
    ("array", "axes", "groups", "said"),
    [
        (jnp.zeros(4, jnp.int32), "tensor", None, "floating"),
        (jnp.zeros(4, jnp.float32), (), None, "mesh axis"),
        (jnp.zeros(4, jnp.float32), "tensor", ((0, 1), (2,)), "one size"),
    ],
)
def test_wrong_arguments_are_named(array, axes, groups, said):
    with pytest.raises(ValueError, match=said):
        all_reduce(array, axes, groups)
