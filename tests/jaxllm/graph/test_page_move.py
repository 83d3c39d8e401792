"""Pages between caches on devices of their own, cut alike or not: what is taken out is what is put in, and no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxllm.graph.page_move import Layout, PagePutter, PageTaker, block_sizes, layer_groups
from sharding.axes import Block

HEADS, PAGES, SIZE, DIM, LAYERS = 2, 12, 4, 8, 3


def cache(first, count, fill):
    """Layers of pages over `count` devices from `first` on; kv heads repeat where there are more devices than heads.

    `fill(layer, keys or values)` is [P, K, page, H] of the model's own heads.
    """
    devices = jax.devices()[first : first + count]
    if count == 1:
        sharding = SingleDeviceSharding(devices[0])
    else:
        mesh = Mesh(np.array(devices), ("tensor",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    heads = Block("num_kv_heads", HEADS, may_repeat=True).units(count).reshape(-1)
    return [tuple(jax.device_put(fill(layer, i)[:, heads], sharding) for i in (0, 1)) for layer in range(LAYERS)]


def numbers(layer, i):
    values = np.arange(PAGES * HEADS * SIZE * DIM, dtype=np.float32).reshape(PAGES, HEADS, SIZE, DIM)
    return values + 10_000 * layer + 100_000 * i


def nothing(layer, i):
    return np.zeros((PAGES, HEADS, SIZE, DIM), np.float32)


def own_heads(kv):
    """Host copies with the model's heads, which every repetition must agree on."""
    layout = Layout.of(kv, HEADS)
    found = []
    for layer in kv:
        for pages in map(np.asarray, layer):
            for place, head in enumerate(layout.heads):
                np.testing.assert_array_equal(pages[:, place], pages[:, layout.heads.index(head)])
            found.append(pages[:, [layout.heads.index(head) for head in range(HEADS)]])
    return np.array(found).reshape(LAYERS, 2, PAGES, HEADS, SIZE, DIM)


@pytest.mark.parametrize(("source", "target"), [(1, 1), (2, 2), (1, 4), (4, 1)])
def test_pages_arrive_where_they_are_put_whatever_shards_lie_on_either_side(source, target):
    theirs, ours = cache(0, source, numbers), cache(4, target, nothing)
    layouts = Layout.of(theirs, HEADS), Layout.of(ours, HEADS)
    take = PageTaker.compiled(theirs, HEADS, 2, layouts[1], most=4)
    put = PagePutter.compiled(ours, HEADS, 2, layouts[0], most=4)
    for layers in take.groups:
        block = jax.device_put(take(theirs, layers, [7, 3, 9]), put.block)
        assert block.shape == (len(layers), 2, 4, HEADS, SIZE, DIM)
        before = ours[layers.start][0]
        ours = put(ours, layers, block, [2, None, 11])
        assert before.is_deleted()  # in place
    wanted = np.zeros_like(own_heads(theirs))
    wanted[:, :, 2], wanted[:, :, 11] = own_heads(theirs)[:, :, 7], own_heads(theirs)[:, :, 9]
    np.testing.assert_array_equal(own_heads(ours), wanted)
    assert ours[0][0].sharding == layouts[1].sharding


def test_pages_go_through_a_host_bit_by_bit():
    theirs = [tuple(x.astype(jnp.bfloat16) for x in layer) for layer in cache(0, 4, numbers)]
    ours = [tuple(x.astype(jnp.bfloat16) for x in layer) for layer in cache(4, 2, nothing)]
    take, put = PageTaker.compiled(theirs, HEADS, 8, None, most=1), PagePutter.compiled(ours, HEADS, 8, None, most=1)
    sent = np.asarray(take(theirs, range(LAYERS), [5])).tobytes()
    block = np.frombuffer(sent, jnp.bfloat16).reshape(LAYERS, 2, 1, HEADS, SIZE, DIM)
    ours = put(ours, range(LAYERS), jax.device_put(block, put.block), [0])
    np.testing.assert_array_equal(own_heads(ours)[:, :, 0], own_heads(theirs)[:, :, 5])


def test_nothing_is_compiled_once_all_sizes_are_there():
    theirs, ours = cache(0, 1, numbers), cache(4, 1, nothing)
    take = PageTaker.compiled(theirs, HEADS, 2, Layout.of(ours, HEADS), most=5)
    put = PagePutter.compiled(ours, HEADS, 2, Layout.of(theirs, HEADS), most=5)
    assert take.sizes == (1, 2, 4)
    assert set(take.executables.table) == {("take", n, size) for n in (1, 2) for size in take.sizes}
    assert set(put.executables.table) == {("put", n, size) for n in (1, 2) for size in take.sizes}


def test_sizes_and_groups_cover_what_there_is():
    assert block_sizes(64) == (1, 2, 4, 8, 16, 32, 64)
    assert block_sizes(63) == (1, 2, 4, 8, 16, 32)
    assert layer_groups(5, 2) == (range(2), range(2, 4), range(4, 5))
