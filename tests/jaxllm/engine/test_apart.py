import jax
import numpy as np

from jaxllm.engine import apart


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
