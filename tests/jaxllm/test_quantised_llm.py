"""LLM with weights quantised on load: a tiny random model through everything below."""

import json
import shutil

import pytest

from jaxllm.config import ConfigError
from jaxllm.core import SamplingParams
from jaxllm.llm import LLM

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SMALL = {"load_format": "dummy", "cache_dir": "", "max_num_seqs": 2, "max_num_batched_tokens": 32, "page_size": 8}
BUCKETS = {"decode_buckets": [2], "token_buckets": [32], "max_model_len": 64}


@pytest.fixture(scope="module")
def directory(vocabulary_directories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised") / "tiny"
    shutil.copytree(vocabulary_directories["byte_level"], folder)
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


def test_a_quantised_model_gives_each_prompt_the_same_tokens_alone_and_in_company(directory):
    llm = LLM(directory, quantization="int4", quantization_group=32, **SMALL, **BUCKETS)
    prompts = ["the first prompt", "another one, longer"]
    together = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    alone = [llm.generate([prompt], GREEDY)[0].outputs[0].token_ids for prompt in prompts]
    assert together == alone
    assert all(len(tokens) == 12 for tokens in together)


def test_a_group_that_does_not_fit_the_model_is_refused_before_anything_is_loaded(directory):
    with pytest.raises(ConfigError, match="quantization_group = 64: does not divide d_ff = 96"):
        LLM(directory, quantization="int4", quantization_group=64, **SMALL, **BUCKETS)
