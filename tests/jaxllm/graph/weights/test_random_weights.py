"""Random weights on the device from nothing but a config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attends import causal
from helpers.goldens import DIRECTORY, NAMES

from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import abstract, merge
from jaxllm.graph.weights.random import dummy


@pytest.mark.parametrize("name", NAMES)
def test_every_config_gives_random_weights_that_run(name):
    config = ModelConfig.from_directory(DIRECTORY / name)
    graphdef, shapes = abstract(config, jnp.bfloat16)
    params = dummy(config, jnp.bfloat16, seed=1)
    jax.tree.map(
        lambda leaf, shape: np.testing.assert_equal((leaf.shape, leaf.dtype), (shape.shape, shape.dtype)),
        params,
        shapes,
    )
    model = merge(graphdef, params)
    logits = model.logits(model(jnp.arange(5), jnp.arange(5), causal(config)))
    assert logits.shape == (5, config.vocab_size)
    assert np.isfinite(logits).all()
    assert np.std(logits) > 0.01


def test_the_seed_alone_decides_the_weights():
    config = ModelConfig.from_directory(DIRECTORY / "qwen3")
    first, again, other = (dummy(config, jnp.float32, seed) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["embed"], other["embed"])
    assert dummy(config, device=jax.devices()[-1])["embed"].devices() == {jax.devices()[-1]}
    assert not np.array_equal(first["layers"][0]["mlp"]["down"], first["layers"][1]["mlp"]["down"])


def test_matrices_have_the_spread_of_a_fresh_model_and_norms_are_one():
    params = dummy(ModelConfig.from_directory(DIRECTORY / "llama-wide-heads-biases"), jnp.float32)
    assert np.std(params["embed"]) == pytest.approx(0.02, rel=0.1)
    assert np.std(params["layers"][1]["mlp"]["gate_up"]) == pytest.approx(0.02, rel=0.1)
    assert (np.asarray(params["layers"][0]["norms"]) == 1).all()
    assert (np.asarray(params["layers"][0]["attention"]["qkv_bias"]) == 0).all()
