"""Every family's logits are those of Hugging Face transformers, prefill and decode, however attention is done."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attends import WAYS, causal
from helpers.goldens import NAMES, golden

from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import abstract, merge
from jaxllm.graph.weights.loader import load

TOLERANCE = 1e-3


def prefill_and_decode(config, params, way, prompt, tokens):
    """Logits of the whole prompt at once, then of one token a step; one compile for both."""
    graphdef, _ = abstract(config, jnp.float32)

    @jax.jit
    def run(params, prompt, tokens):
        model = merge(graphdef, params)

        def step(cache, inputs):
            token_ids, positions = inputs
            cache = list(cache)
            hidden = model(token_ids, positions, way.attend(config, cache, positions))
            return cache, model.logits(hidden)

        cache = way.cache(config, len(prompt) + len(tokens), jnp.float32)
        cache, prefill = step(cache, (prompt, jnp.arange(len(prompt))))
        later = len(prompt) + jnp.arange(len(tokens))
        _, decode = jax.lax.scan(step, cache, (tokens[:, None], later[:, None]))
        return prefill, decode[:, 0]

    return jax.tree.map(np.asarray, run(params, jnp.asarray(prompt), jnp.asarray(tokens)))


# Pages are what is served. Dense attention is these tests' own: that a model takes any is seen on one of each kind.
ANY_WAY = ("llama", "qwen2-windows", "qwen3-moe-dense-first-window")


@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name in NAMES for way in WAYS if way == "paged" or name in ANY_WAY]
)
def test_logits_of_prefill_and_twenty_decode_steps_are_those_of_transformers(name, way):
    expected = golden(name)
    config = ModelConfig.from_directory(expected.directory)
    params = load(expected.directory, config, jnp.float32)
    prefill, decode = prefill_and_decode(config, params, WAYS[way](), expected.prompt, expected.tokens[:-1])
    worst_prefill = np.abs(prefill - expected.prefill_logits).max()
    worst_decode = np.abs(decode - expected.decode_logits).max()
    print(f"{name} {way}: largest difference {worst_prefill:.1e} in prefill, {worst_decode:.1e} in decode")
    assert decode.shape[0] == 20
    assert worst_prefill < TOLERANCE
    assert worst_decode < TOLERANCE
    np.testing.assert_array_equal([prefill[-1].argmax(), *decode.argmax(-1)], expected.tokens)


def rope(**changes):
    return lambda config: dataclasses.replace(config, rope=dataclasses.replace(config.rope, **changes))


def model(**changes):
    return lambda config: dataclasses.replace(config, **changes)


def experts(**changes):
    return lambda config: dataclasses.replace(config, experts=dataclasses.replace(config.experts, **changes))


WRONG = {
    "llama-linear": [rope(factor=2.4)],
    "llama-llama3": [rope(kind="default"), rope(factor=7.0), rope(low_freq_factor=1.5), rope(high_freq_factor=3.0)],
    "llama-yarn": [rope(kind="linear"), rope(attention_factor=1.0), rope(beta_slow=2.0), rope(truncate=False)],
    "llama-yarn-mscale": [rope(mscale=None), rope(truncate=True), rope(beta_fast=32.0)],
    "qwen2-yarn": [rope(attention_factor=None)],
    "qwen2-windows": [model(windows=()), model(windows=(8, None)), model(windows=(None, 7))],
    "qwen3": [rope(theta=10000.0), model(norm_eps=1e-2)],
    "qwen3-layer-types": [model(windows=()), model(windows=(None, 6))],
    "mixtral": [experts(norm_topk=False), experts(per_token=1)],
    "mixtral-window": [model(windows=())],
    "qwen2-moe": [experts(norm_topk=True), experts(per_token=2)],
    "qwen2-moe-windows": [model(windows=()), model(windows=(8, 8)), experts(norm_topk=False)],
    "qwen3-moe": [experts(norm_topk=False), experts(per_token=4)],
    "qwen3-moe-dense-first-window": [model(windows=(10, None)), experts(norm_topk=True)],
    "mistral-window": [model(windows=()), model(windows=(13, 13)), model(windows=(12, 11))],
}


@pytest.mark.parametrize(("name", "number"), [(name, n) for name, wrongs in WRONG.items() for n in range(len(wrongs))])
def test_the_goldens_notice_a_description_that_is_slightly_wrong(name, number):
    expected = golden(name)
    config = WRONG[name][number](ModelConfig.from_directory(expected.directory))
    params = load(expected.directory, config, jnp.float32)
    logits = forward(config, params, expected.prompt)
    assert np.abs(logits - expected.prefill_logits).max() > 10 * TOLERANCE


def forward(config, params, token_ids):
    """Op by op: the same few operations serve every variant, where a jit would compile each anew."""
    model = merge(abstract(config)[0], params)
    positions = jnp.broadcast_to(jnp.arange(token_ids.shape[-1]), token_ids.shape)
    return np.asarray(model.logits(model(jnp.asarray(token_ids), positions, causal(config))))


def test_leading_dimensions_are_free():
    expected = golden("llama")
    config = ModelConfig.from_directory(expected.directory)
    params = load(expected.directory, config, jnp.float32)
    batch = np.stack([expected.prompt, expected.prompt[::-1]])
    logits = forward(config, params, batch)
    assert logits.shape == (2, 48, 96)
    np.testing.assert_allclose(logits[0], expected.prefill_logits, atol=TOLERANCE)
    np.testing.assert_allclose(logits[1], forward(config, params, batch[1]), atol=1e-5)


def test_bf16_weights_give_f32_logits_near_those_of_f32():
    expected = golden("llama")
    config = ModelConfig.from_directory(expected.directory)
    logits = forward(config, load(expected.directory, config, jnp.bfloat16), expected.prompt)
    assert logits.dtype == np.float32
    error = np.abs(logits - expected.prefill_logits)
    assert 1e-3 < error.max() < 0.5
    assert error.mean() < 0.05
