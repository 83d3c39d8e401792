"""Quantising plain weights: what is lost, what is left alone, what is refused and with which figure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import ConfigError, ModelSource
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import abstract
from jaxllm.graph.models.quantised import StoredQuantisation
from jaxllm.graph.quant.leaf import Fp8Weight, Int4Weight, Int8Weight
from jaxllm.graph.quant.scheme import Scheme, complaint, lost_share, quantisation
from jaxllm.graph.weights.random import dummy

SIZES = {
    "vocab_size": 96,
    "num_layers": 1,
    "d_model": 64,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 32,
    "d_ff": 96,
}


def weight():
    return 0.02 * jax.random.normal(jax.random.key(0), (128, 256), jnp.float32)


@pytest.mark.parametrize(
    ("scheme", "most"),
    [
        (Scheme("int8"), 0.008),
        (Scheme("fp8"), 0.028),
        (Scheme("int4", 32), 0.085),
        (Scheme("int4", 64), 0.095),
        (Scheme("int4", 128), 0.105),
    ],
    ids=str,
)
def test_a_normal_weight_loses_little(scheme, most):
    leaf = scheme.leaf(("layers", 0, "qkv"), weight())
    assert float(lost_share(weight(), leaf)) < most
    assert complaint(("layers", 0, "qkv"), weight(), leaf) is None


def test_int8_is_off_by_at_most_half_a_step():
    leaf = Scheme("int8").leaf(("qkv",), weight())
    step = jnp.abs(weight()).max(axis=1, keepdims=True) / 127
    assert bool((jnp.abs(leaf.widened() - weight()) <= step * 0.5001).all())


def test_a_weight_of_zeros_stays_zero():
    for scheme in (Scheme("int8"), Scheme("int4", 64), Scheme("fp8")):
        leaf = scheme.leaf(("qkv",), jnp.zeros((64, 128)))
        np.testing.assert_array_equal(leaf.widened(), 0.0)


def test_a_weight_that_would_be_lost_is_named_with_the_figure():
    lone = weight().at[:, ::32].multiply(50.0)  # one weight of each group takes the scale of all
    leaf = Scheme("int4", 32).leaf(("qkv",), lone)
    spoilt = weight().at[3, 3].set(jnp.nan)
    assert complaint(("qkv",), lone, leaf) is None or "lose" in str(complaint(("qkv",), lone, leaf))
    said = complaint(("layers", 7, "mlp", "down"), spoilt, Scheme("int4", 32).leaf(("down",), spoilt))
    assert said is not None
    assert said.startswith("layers.7.mlp.down: quantised, it would lose nan% of its size, more than 20%")


def test_embeddings_norms_and_a_tied_head_stay_and_int4_keeps_the_head_at_int8():
    config = ModelConfig(**SIZES)
    kinds = {"int8": (Int8Weight, Int8Weight), "int4": (Int4Weight, Int8Weight), "fp8": (Fp8Weight, Fp8Weight)}
    for kind, (matrix, head) in kinds.items():
        params = dummy(config, jnp.float32, scheme=Scheme(kind, 32))
        assert isinstance(params["head"], head)
        assert isinstance(params["layers"][0]["attention"]["qkv"], matrix)
        assert isinstance(params["layers"][0]["mlp"]["down"], matrix)
        assert isinstance(params["embed"], jax.Array)
        assert isinstance(params["layers"][0]["norms"], jax.Array)
    tied = dummy(ModelConfig(**SIZES, tie_embeddings=True), jnp.float32, scheme=Scheme("int8"))
    assert "head" not in tied or tied["head"] is None


def test_a_group_that_does_not_divide_a_width_is_refused_with_the_width_and_what_to_use():
    config = ModelConfig(**SIZES)
    with pytest.raises(ConfigError, match=r"quantization_group = 128: does not divide d_model = 64; use .*= 64"):
        Scheme("int4", 128).check(config)
    with pytest.raises(ConfigError, match=r"quantization_group = 64: does not divide d_ff = 96; use .*= 32"):
        Scheme("int4", 64).check(config)
    Scheme("int4", 32).check(config)
    Scheme("int8", 128).check(config)
    with pytest.raises(ConfigError, match=r"the checkpoint is quantised already \(awq\)"):
        Scheme("int8").check(ModelConfig(**SIZES, stored=StoredQuantisation(method="awq", group=32)))


def test_the_scheme_is_what_the_config_asks_for():
    assert quantisation(ModelSource(quantization="int4", quantization_group=64)) == Scheme("int4", 64)
    assert quantisation(ModelSource()) == Scheme("none")
    assert abstract(ModelConfig(**SIZES))[1].keys() == Scheme().shapes(abstract(ModelConfig(**SIZES))[1]).keys()


@pytest.mark.parametrize(("knob", "value"), [("quantization", "int3"), ("quantization_group", 48)])
def test_a_wrong_setting_is_named_with_what_is_allowed(knob, value):
    with pytest.raises(ConfigError, match=f"model.{knob} = .*must be one of"):
        ModelSource(**{knob: value})
