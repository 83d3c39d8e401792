"""Which rows a shard holds, and the arithmetic that refuses a mesh. No JAX."""

from dataclasses import dataclass

import numpy as np
import pytest

from sharding.axes import MeshConfig, MeshError, check, local_sizes, rows_of_shards, stage_layers


@dataclass(frozen=True)
class Experts:
    count: int = 8
    d_ff: int = 16
    shared_d_ff: int = 0


@dataclass(frozen=True)
class Model:
    vocab_size: int = 96
    d_model: int = 24
    num_layers: int = 5
    num_heads: int = 8
    num_kv_heads: int = 2
    d_ff: int = 48
    windows: tuple = (None,) * 5
    experts: Experts | None = None


def test_a_shards_queries_keys_and_values_lie_together():
    rows = rows_of_shards("qkv", Model(), 2, (8 + 2 * 2) * 3)  # three rows a head
    assert rows[0].tolist() == [*range(12), *range(24, 27), *range(30, 33)]
    assert rows[1].tolist() == [*range(12, 24), *range(27, 30), *range(33, 36)]
    assert sorted(rows.ravel()) == list(range(36))


def test_a_kv_head_is_repeated_for_neighbouring_shards_when_there_are_fewer_than_shards():
    rows = rows_of_shards("qkv", Model(), 4, 8 + 2 * 2)
    assert rows[:, 2].tolist() == [8, 8, 9, 9]
    assert rows[:, 3].tolist() == [10, 10, 11, 11]
    assert local_sizes(Model(), MeshConfig(tensor=4)).num_kv_heads == 1


def test_gate_and_up_are_cut_each_by_itself_also_in_groups_of_rows():
    assert rows_of_shards("gate_up", Model(), 2, 96)[1].tolist() == [*range(24, 48), *range(72, 96)]
    assert rows_of_shards("gate_up", Model(), 2, 8)[1].tolist() == [2, 3, 6, 7]  # six rows a scale


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize(("axis", "size"), [("heads", 64), ("ffn", 48), ("vocab", 96)])
def test_shards_hold_every_row_once(axis, size, shards):
    rows = rows_of_shards(axis, Model(), shards, size)
    assert np.array_equal(rows.ravel(), np.arange(size))


@pytest.mark.parametrize(
    ("model", "mesh", "said"),
    [
        (Model(num_heads=6), {"tensor": 4}, "num_heads = 6 .* 4 x 1 \\+ 2"),
        (Model(num_kv_heads=4, num_heads=8), {"tensor": 8, "expert": 1}, None),
        (Model(num_kv_heads=3, num_heads=12), {"tensor": 2}, "num_kv_heads = 3 .* nor 2 by 3"),
        (Model(d_ff=50), {"tensor": 4}, "d_ff = 50"),
        (Model(vocab_size=97), {"tensor": 2}, "vocab_size = 97"),
        (Model(), {"expert": 2}, "no experts"),
        (Model(experts=Experts(count=6)), {"expert": 4}, "experts.count = 6"),
        (
            Model(experts=Experts(count=6)),
            {"expert": 4, "redundant_experts": 3},
            "redundant_experts = 9 .* 4 x 2 \\+ 1",
        ),
        (Model(experts=Experts(count=2)), {"expert": 2, "redundant_experts": 4}, "hold 3 of 2 experts"),
        (Model(experts=Experts(d_ff=15)), {"tensor": 2}, "experts.d_ff = 15"),
        (Model(windows=(None, 8, None, None, None)), {"seq": 2}, "window"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_arithmetic(model, mesh, said):
    if said is None:
        check(model, MeshConfig(**mesh))
        return
    with pytest.raises(MeshError, match=said):
        check(model, MeshConfig(**mesh))


@pytest.mark.parametrize("settings", [{"tensor": 0}, {"data": True}, {"seq": 2.0}, {"sequence_parallel": True}])
def test_a_mesh_of_nonsense_is_refused(settings):
    with pytest.raises(MeshError, match="mesh"):
        MeshConfig(**settings)


def test_layers_are_dealt_to_stages_in_order_and_as_evenly_as_they_go():
    assert [len(layers) for layers in stage_layers(5, 3)] == [2, 2, 1]
    assert [layer for layers in stage_layers(5, 3) for layer in layers] == list(range(5))
    with pytest.raises(MeshError, match="only 5 layers"):
        stage_layers(5, 6)
