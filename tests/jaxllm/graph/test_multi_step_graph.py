"""What XLA makes of several decode steps: one loop that needs no answer from the device, and no copy of the pages."""

import jax
import jax.numpy as jnp

from jaxllm.graph.compile import Ladder, jobs_of
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import abstract
from jaxllm.graph.steps import Graph

PAGES, PAGE_SIZE, LAYERS, STEPS = 2048, 8, 2, 5
CONFIG = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 96,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    file="config.json",
)


def test_several_steps_are_one_loop_of_known_length_that_writes_the_pages_in_place():
    graphdef, params = abstract(CONFIG, jnp.float32)
    page = jax.ShapeDtypeStruct((PAGES, 1, PAGE_SIZE, 16), jnp.float32)
    counts = jax.ShapeDtypeStruct((5, CONFIG.vocab_size), jnp.uint16)
    alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=alone),
        (params, [(page, page)] * LAYERS, counts),
    )
    ladder = Ladder((4,), (32,), 8, decode_steps=STEPS)
    jobs = {job.key[0]: job for job in jobs_of(Graph(graphdef, CONFIG, PAGE_SIZE, PAGES), ladder, *arrays)}
    compiled = jobs["multi_step"].lower().compile()  # the last of them: with a sampler that truncates
    assert f'"known_trip_count":{{"n":"{STEPS}"}}' in compiled.as_text()
    pages = 2 * LAYERS * PAGES * PAGE_SIZE * 16 * 4
    analysis = compiled.memory_analysis()
    assert analysis.alias_size_in_bytes >= pages
    assert analysis.temp_size_in_bytes < pages // (2 * LAYERS)  # not even those of one layer's keys
