"""Arrangements of experts on devices: whole, even, and moved as little as may be. No JAX."""

import numpy as np
import pytest

from sharding import balance
from sharding.axes import MeshConfig, MeshError


@pytest.mark.parametrize(("experts", "spare", "devices"), [(8, 0, 2), (8, 4, 4), (6, 2, 4), (4, 4, 2), (128, 16, 8)])
def test_any_load_gives_an_arrangement_that_holds_every_expert_and_none_twice_on_a_device(experts, spare, devices):
    slots = balance.first_slots(experts, spare, devices)
    rng = np.random.default_rng(experts + spare)
    for sharpness in (0, 1, 3, 50):
        load = rng.random(experts) ** sharpness
        load[rng.integers(experts)] = 0
        slots = balance.rebalanced(slots, load, devices)
        balance.check(slots, experts, devices)
        table = balance.table_of(slots, experts, balance.most_copies(spare, devices))
        np.testing.assert_array_equal(balance.slots_of(table), slots)


def test_a_hot_expert_gets_the_spare_slots_and_the_load_becomes_even():
    load = np.ones(8)
    load[3] = 13.0
    before = balance.first_slots(8, 4, 4)
    after = balance.rebalanced(before, load, 4)
    assert np.bincount(after)[3] == 4
    assert balance.imbalance(before, load, 4) == pytest.approx(1.7)
    assert balance.imbalance(after, load, 4) < 1.2


def test_without_spare_slots_hot_experts_are_parted():
    load = np.array([9.0, 9, 1, 1, 1, 1, 1, 1])
    before = balance.first_slots(8, 0, 2)
    after = balance.rebalanced(before, load, 2)
    assert balance.imbalance(before, load, 2) == pytest.approx(20 / 12)
    assert balance.imbalance(after, load, 2) == pytest.approx(1.0)


def test_what_can_stay_stays_in_its_slot():
    load = np.ones(16)
    slots = balance.first_slots(16, 0, 4)
    even = balance.rebalanced(slots, load, 4)
    again = balance.rebalanced(even, load, 4)
    np.testing.assert_array_equal(again, even)
    source = balance.sources(slots, even, 4)
    np.testing.assert_array_equal(slots[source], even)
    stays = slots == even
    np.testing.assert_array_equal(source[stays], np.flatnonzero(stays))


def test_no_load_is_even():
    assert balance.imbalance(balance.first_slots(8, 0, 2), np.zeros(8), 2) == 1.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"redundant_experts": 4}, "need mesh.expert > 1"),
        ({"expert": 2, "redundant_experts": -1}, "redundant_experts = -1"),
        ({"expert": 2, "rebalance_threshold": 0.9}, "must be over 1"),
        ({"expert": 2, "rebalance_interval": 0}, "rebalance_interval = 0"),
        ({"expert": 2, "pipe": 2, "redundant_experts": 2}, "mesh.pipe = 2"),
        ({"attention_data": True}, "needs mesh.expert > 1"),
        ({"expert": 2, "pipe": 2, "attention_data": True}, "mesh.pipe = 2 and mesh.seq = 1: not built"),
        ({"expert": 2, "expert_exchange": "deepep"}, "must be auto, sum or all_to_all"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(MeshError, match=said):
        MeshConfig(**settings)
