"""When a model's matrices get twins by themselves: on a GPU whose kernels read them, and where they fit."""

import logging
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


def gpu(memory: int = 2**30) -> Any:
    """What is asked of one, on a machine that has none."""
    stats = {"bytes_limit": memory}
    return SimpleNamespace(platform="gpu", device_kind="H200", process_index=0, memory_stats=lambda: stats)


class OnGpu(Home):
    """Its arrays would lie on this machine's CPU."""

    whole = property(lambda self: jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    own_device = property(lambda self: self.device)


@pytest.fixture(autouse=True)
def narrow_models_too(monkeypatch):
    monkeypatch.setattr(packing, "LEAST_WIDTH", MODEL.d_model)


def decided(model=MODEL, device=None, whole=WHOLE, asked=None, **sections):
    config = EngineConfig(model=ModelSource(packed_weights=asked), **sections)
    config = resolve(config, 128, "gpu")
    ((home,),) = packing.with_packed(config, [(OnGpu(model, device or gpu()),)], whole)
    return home.packed


def test_a_gpu_makes_them_where_they_fit_or_it_is_told_to(caplog):
    assert decided()
    assert not decided(asked=False)
    with caplog.at_level(logging.INFO):
        assert not decided(device=gpu(2**20))
    assert "more than 15% of the device's memory" in caplog.text
    assert decided(device=gpu(2**20), asked=True)


def test_a_narrow_model_has_none_by_itself(caplog, monkeypatch):
    monkeypatch.setattr(packing, "LEAST_WIDTH", MODEL.d_model + 1)
    with caplog.at_level(logging.INFO):
        assert not decided()
    assert "a residual stream of 256 numbers, fewer than 257" in caplog.text
    assert decided(asked=True)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (dict(model=replace(MODEL, head_dim=64)), "no kernel takes heads of 64"),
        (dict(whole=None), "runs no decode step as one op"),
        (dict(whole=(200, 256)), "no decode bucket has 9 to 32 rows"),
        (dict(model=replace(MODEL, d_ff=96)), "not of multiples of 64"),
    ],
)
def test_where_they_could_not_be_read_there_are_none_and_the_line_says_why(given, why, caplog):
    with caplog.at_level(logging.INFO):
        assert not decided(**given)
    assert "weights in 12 bits for decode steps: none" in caplog.text
    assert why in caplog.text
    with pytest.raises(ConfigError, match=r"model\.packed_weights = true: "):
        decided(**given, asked=True)
