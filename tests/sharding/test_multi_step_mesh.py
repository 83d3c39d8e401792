"""Several decode steps in one dispatch over a mesh give the tokens of single steps; some meshes go on step by step."""

import json

import pytest
from helpers.byte_tokenizer import EOS, VOCAB_SIZE

from jaxllm.config import load
from jaxllm.core import SamplingParams
from jaxllm.engine.startup import start

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB_SIZE + 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": EOS,
    "bos_token_id": 0,
}
EXPERTS = MODEL | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}
SHAPE = dict(
    load_format="dummy",
    cache_dir="",
    dtype="float32",
    page_size=8,
    num_pages=64,
    decode_buckets=[4],
    token_buckets=[32],
    max_num_seqs=4,
    max_num_batched_tokens=32,
    max_model_len=64,
    threads=2,
)
ASKED = [
    SamplingParams(temperature=0.0, max_tokens=22, ignore_eos=True),
    SamplingParams(max_tokens=22, seed=3, ignore_eos=True),
    SamplingParams(max_tokens=22, seed=4, top_p=0.7, frequency_penalty=0.6, stop_token_ids=[*range(50, 120)]),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return written(tmp_path_factory.mktemp("mesh"), MODEL)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return written(tmp_path_factory.mktemp("experts"), EXPERTS)


def written(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def served(directory, **settings):
    """What each request gives, with others and alone; and the dispatches that were saved."""
    engine, _ = start(load(model=directory, **SHAPE | settings))
    together = [engine.add(engine.make_request([5, 9, 30 + i], params))[0] for i, params in enumerate(ASKED)]
    found = []
    for batch in (together, *([params] for params in ASKED)):
        here = batch if batch is together else [engine.add(engine.make_request([5, 9, 77], batch[0]))[0]]
        while engine.has_work:
            engine.step()
            engine.check()
        found += [(sequence.output_token_ids, sequence.finish_reason) for sequence in here]
    counts = engine.scheduler.metrics.as_dict()
    assert counts["compiles_after_ready"] == 0
    return found, counts["steps"] - counts["dispatches"]


@pytest.mark.mesh
@pytest.mark.parametrize("mesh", [{"tensor_parallel_size": 2}, {"data_parallel_size": 2}], ids=str)
def test_steps_over_a_mesh_go_together_and_give_the_same_tokens(directory, mesh):
    single, none = served(directory, decode_steps=1, **mesh)
    several, saved = served(directory, decode_steps=4, **mesh)
    assert several == single
    assert (none, saved > 10) == (0, True)


def test_steps_of_spread_experts_go_together_and_give_the_same_tokens(experts):
    single, none = served(experts, decode_steps=1, ep=2)
    several, saved = served(experts, decode_steps=4, ep=2)
    assert several == single
    assert (none, saved > 10) == (0, True)


@pytest.mark.mesh
def test_a_pipeline_goes_step_by_step(directory):
    _, saved = served(directory, decode_steps=4, pipeline_parallel_size=2)
    assert saved == 0
