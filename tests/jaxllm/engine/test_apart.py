from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxllm.engine import apart, startup


def test_what_stays_lies_between_what_goes_on_every_device_and_nothing_else_is_held():
    devices = jax.local_devices()
    before = {id(array) for array in jax.live_arrays()}
    stay = apart.keep_apart(devices, largest=3000)
    held = [array for array in jax.live_arrays() if id(array) not in before]
    assert len(stay) == len(devices) * (apart.EACH * len(apart.SIZES) + 1)
    assert {id(array) for array in held} == {id(array) for array in stay}
    assert {array.nbytes for array in stay} == {apart.GRAIN}
    assert {array.device for array in stay} == set(devices)
    assert not any(np.asarray(array).any() for array in stay[:2])


@pytest.mark.parametrize(("here", "asked"), [([1], []), ([2], [(2, 128)]), ([1, 1], [(2, 128)]), ([1, 0], [])])
def test_engines_of_several_devices_keep_room_for_a_prompts_hidden_states(monkeypatch, here, asked):
    seen = []
    monkeypatch.setattr(startup, "keep_apart", lambda devices, largest: seen.append((len(devices), largest)))
    homes = tuple(
        SimpleNamespace(
            here=count > 0, mesh=SimpleNamespace(local_devices=[None] * count), model=SimpleNamespace(d_model=8)
        )
        for count in here
    )
    config = SimpleNamespace(scheduler=SimpleNamespace(token_budget=4), model=SimpleNamespace(dtype="float32"))
    startup._keep_apart(config, homes, SimpleNamespace(stay=[]))
    assert seen == asked
