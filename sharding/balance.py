"""Which device holds which routed expert, and copies of it, so that measured load lies evenly. Host numbers only.

In: how many experts, spare slots and devices; how many tokens each expert got. Out: for every slot the expert in it
(slot s lies on device s // held), the table by which a step finds an expert's copies, and a new arrangement when the
load is uneven. Every expert has at least one slot, and at most one on a device. Knows nothing of arrays on devices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int32]  # [S]: the expert in each slot


def first_slots(experts: int, spare: int, devices: int) -> Slots:
    """Before anything is measured: experts in order, then again from the first for the spare slots."""
    slots = np.arange(experts + spare, dtype=np.int32) % experts
    check(slots, experts, devices)
    return slots


def check(slots: Slots, experts: int, devices: int) -> None:
    """Raises AssertionError when an expert has no slot, or two on one device."""
    assert slots.size % devices == 0, f"{slots.size} slots on {devices} devices"
    assert set(slots.tolist()) == set(range(experts)), "an expert has no slot"
    for held in slots.reshape(devices, -1):
        assert len(set(held.tolist())) == held.size, "a device holds an expert twice"


def most_copies(spare: int, devices: int) -> int:
    return min(devices, spare + 1)


def table_of(slots: Slots, experts: int, copies: int) -> NDArray[np.int32]:
    """i32[experts, 1 + copies]: how many copies an expert has, then their slots."""
    table = np.zeros((experts, 1 + copies), np.int32)
    for slot, expert in enumerate(slots.tolist()):
        table[expert, 1 + table[expert, 0]] = slot
        table[expert, 0] += 1
    return table


def slots_of(table: NDArray[np.int32]) -> Slots:
    """The inverse of `table_of`."""
    slots = np.zeros(int(table[:, 0].sum()), np.int32)
    for expert, (count, *places) in enumerate(table.tolist()):
        slots[places[:count]] = expert
    return slots


def device_loads(slots: Slots, load: NDArray[np.float64], devices: int) -> NDArray[np.float64]:
    """What each device gets when an expert's copies share its load."""
    copies = np.bincount(slots, minlength=load.size)
    return (load / copies)[slots].reshape(devices, -1).sum(axis=1)


def imbalance(slots: Slots, load: NDArray[np.float64], devices: int) -> float:
    """The fullest device's load over the mean: 1 is even, the number of devices is all on one."""
    loads = device_loads(slots, load, devices)
    return float(loads.max() / loads.mean()) if loads.sum() else 1.0


def rebalanced(slots: Slots, load: NDArray[np.float64], devices: int) -> Slots:
    """An arrangement for this load: spare slots go to the experts with the most load a copy, then copies to devices,
    the heaviest first, each to the lightest device with room. What can stay on its device stays in its slot."""
    experts, held = load.size, slots.size // devices
    copies = np.ones(experts, np.int64)
    for _ in range(slots.size - experts):
        share = np.where(copies < devices, load / copies, -1.0)
        copies[int(share.argmax())] += 1
    share = load / copies
    # Those with many copies first among equals: they have the fewest devices to choose from.
    order = sorted(np.repeat(np.arange(experts), copies).tolist(), key=lambda e: (-share[e], -copies[e], e))
    now = [set(part.tolist()) for part in slots.reshape(devices, -1)]
    holds: list[set[int]] = [set() for _ in range(devices)]
    loads = np.zeros(devices)
    for expert in order:
        open_to = [d for d in range(devices) if len(holds[d]) < held and expert not in holds[d]]
        if not open_to:
            _make_room(holds, loads, share, expert, held)
            continue
        best = min(open_to, key=lambda d: (loads[d], expert not in now[d], d))
        holds[best].add(expert)
        loads[best] += share[expert]
    found = _in_place(slots.reshape(devices, -1), holds)
    check(found, experts, devices)
    return found


def _make_room(
    holds: list[set[int]], loads: NDArray[np.float64], share: NDArray[np.float64], expert: int, held: int
) -> None:
    """Every device with room has this expert already: one without it takes it and gives one of its own there."""
    roomy = next(d for d in range(len(holds)) if len(holds[d]) < held)
    giver = min((d for d in range(len(holds)) if expert not in holds[d]), key=lambda d: (loads[d], d))
    # It is full, so it has one that the other has not.
    gift = min(holds[giver] - holds[roomy], key=lambda other: (abs(share[other] - share[expert]), other))
    holds[giver] ^= {gift, expert}
    holds[roomy].add(gift)
    loads[giver] += share[expert] - share[gift]
    loads[roomy] += share[gift]


def _in_place(now: NDArray[np.int32], holds: list[set[int]]) -> Slots:
    """Each device's experts in its slots, those that it has already where they are."""
    found = np.full(now.shape, -1, np.int32)
    for device, experts in enumerate(holds):
        stay = [expert in experts for expert in now[device].tolist()]
        found[device, stay] = now[device, stay]
        new = sorted(experts - set(now[device].tolist()))
        found[device, found[device] < 0] = new
    return found.reshape(-1)


def sources(old: Slots, new: Slots, devices: int) -> NDArray[np.int32]:
    """For every slot, an old slot that holds what the new arrangement wants there: its own, its device's, another's."""
    held = old.size // devices
    found = np.zeros(old.size, np.int32)
    for slot, expert in enumerate(new.tolist()):
        choices = np.flatnonzero(old == expert)
        found[slot] = min(choices.tolist(), key=lambda s: (s != slot, s // held != slot // held, s))
    return found
