"""The models in the wheel read here as in Hugging Face transformers (goldens: tools/make_bundled_golden.py)."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attends import causal

from jaxllm.config import bundled_model_dir
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import abstract, merge
from jaxllm.graph.weights.loader import load
from jaxllm.tokenizer import Tokenizer
from tools.make_bundled_golden_texts import COLUMNS, MESSAGES, TEXT

GOLDENS = Path(__file__).parents[2] / "goldens"


@pytest.mark.parametrize("name", ["first-light", "first-light-draft"])
def test_a_bundled_model_gives_the_ids_the_chat_text_and_the_logits_of_transformers(name):
    golden = np.load(GOLDENS / f"bundled-{name}.npz")
    directory = bundled_model_dir(name)
    tokenizer = Tokenizer.from_directory(directory)
    assert list(tokenizer.encode(TEXT, add_special_tokens=True)) == golden["ids"].tolist()
    assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True) == str(golden["chat"])
    config = ModelConfig.from_directory(directory)
    model = merge(abstract(config, jnp.float32)[0], load(directory, config, jnp.float32))
    ids = jnp.asarray(golden["ids"], jnp.int32)
    logits = model.logits(model(ids, jnp.arange(len(ids), dtype=jnp.int32), causal(config)))
    np.testing.assert_allclose(logits[:, ::COLUMNS], golden["logits"], atol=1e-3)


def test_both_bundled_models_together_stay_within_sixty_megabytes():
    sizes = [(bundled_model_dir(n) / "model.safetensors").stat().st_size for n in ("first-light", "first-light-draft")]
    assert sum(sizes) <= 60e6
