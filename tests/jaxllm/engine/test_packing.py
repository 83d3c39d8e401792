"""When a model's matrices get twins: where that is asked for and something reads them."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxllm.config import ConfigError, EngineConfig, ModelSource, resolve
from jaxllm.engine import packing
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.spread import Home

MODEL = ModelConfig(vocab_size=128, num_layers=2, d_model=256, num_heads=2, num_kv_heads=1, head_dim=128, d_ff=512)
WHOLE = (1, 256)


def gpu() -> Any:
    """What is asked of one, on a machine that has none."""
    return SimpleNamespace(platform="gpu", device_kind="H200", process_index=0)


class OnGpu(Home):
    """Its arrays would lie on this machine's CPU."""

    whole = property(lambda self: jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    own_device = property(lambda self: self.device)


def decided(model=MODEL, whole=WHOLE, asked=True, **sections):
    config = EngineConfig(model=ModelSource(packed_weights=asked), **sections)
    config = resolve(config, 128, "gpu")
    ((home,),) = packing.with_packed(config, [(OnGpu(model, gpu()),)], whole)
    return home.packed


def test_a_gpu_makes_them_where_it_is_told_to():
    assert decided()
    assert not decided(asked=False)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (dict(model=replace(MODEL, head_dim=64)), "no kernel takes heads of 64"),
        (dict(whole=None), "runs no decode step as one op"),
        (dict(whole=(200, 256)), "no decode bucket has 9 to 32 rows"),
        (dict(model=replace(MODEL, d_ff=96)), "not of multiples of 64"),
    ],
)
def test_where_they_could_not_be_read_the_error_says_why(given, why):
    with pytest.raises(ConfigError, match=rf"model\.packed_weights = true: .*{why}"):
        decided(**given)
