"""cache.kv_dtype = "fp8": tiny random models through everything below, and what is refused."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.config import ConfigError, load
from jaxllm.core import SamplingParams
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.weights import kv_scales
from jaxllm.llm import LLM

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
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
BUCKETS = {"decode_buckets": [2], "token_buckets": [32], "max_model_len": 128}
PROMPTS = [
    "the first prompt, which is long enough to be computed in several chunks of thirty-two tokens",
    "another one",
]


@pytest.fixture(scope="module")
def directory(vocabulary_directories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrow") / "tiny"
    shutil.copytree(vocabulary_directories["byte_level"], folder)
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


def tokens(llm, prompts):
    return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]


def test_a_model_with_fp8_pages_gives_each_prompt_the_same_tokens_alone_and_in_company_of_twice_as_many_pages(
    directory,
):
    llm = LLM(directory, kv_cache_dtype="fp8", dtype="bfloat16", **SMALL, **BUCKETS, cpu_cache_bytes=2**13)
    pages, memory = llm.engine.runner.kv[0][0], llm.report.memory
    assert pages.dtype == jnp.float8_e4m3fn
    assert (memory.page_bytes, memory.num_pages) == (1024 * 2 // 2, 8)  # 8 tokens of 2 layers, K and V of 2 x 16
    together = tokens(llm, PROMPTS)
    assert together == [tokens(llm, [prompt])[0] for prompt in PROMPTS]
    assert float(jnp.abs(llm.engine.runner.kv[0][0].astype(jnp.float32)).max()) > 0


@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"seq": 2}, {"pipe": 2}])
@pytest.mark.mesh
def test_fp8_pages_on_a_mesh_and_unchunked_give_the_tokens_of_one_device_in_chunks(directory, mesh):
    alone = tokens(LLM(directory, kv_dtype="fp8", **SMALL, **BUCKETS), PROMPTS)
    whole = SMALL | {"max_num_batched_tokens": 128, "prefix_cache": False}, BUCKETS | {"token_buckets": [128]}
    assert tokens(LLM(directory, kv_dtype="fp8", mesh=mesh, **whole[0], **whole[1]), PROMPTS) == alone


def test_another_name_or_value_of_the_setting_says_what_is_allowed():
    assert load(kv_cache_dtype="fp8_e4m3").cache.kv_dtype == "fp8"
    with pytest.raises(ConfigError, match=r"cache\.kv_dtype = 'fp8_e5m2': must be one of auto, fp8"):
        load(kv_cache_dtype="fp8_e5m2")


def scales_file(folder, scales):
    folder.mkdir()
    save_file({name: np.array(value, np.float32) for name, value in scales.items()}, folder / "model.safetensors")
    return folder


def test_a_checkpoints_scales_are_read_under_the_names_quantisers_write(tmp_path):
    layer = "model.layers.{}.self_attn.{}"
    for number, (keys, values) in enumerate(kv_scales.NAMES):
        names = {layer.format(i, name): s for i in range(2) for name, s in ((keys, 0.5 + i), (values, [2.0 + i]))}
        assert kv_scales.read(scales_file(tmp_path / str(number), names), 2) == ((0.5, 2.0), (1.5, 3.0))
    assert kv_scales.read(scales_file(tmp_path / "none", {"model.norm.weight": [1.0]}), 2) == ((1.0, 1.0),) * 2
    some = {layer.format(0, name): 1.0 for name in ("k_scale", "v_scale")}
    with pytest.raises(ConfigError, match="no k_scale and v_scale of layer 1, though other layers have them"):
        kv_scales.read(scales_file(tmp_path / "some", some), 2)
    with pytest.raises(ConfigError, match=r"self_attn\.k_scale must be one positive number; leave cache\.kv_dtype"):
        kv_scales.read(scales_file(tmp_path / "zero", {layer.format(0, "k_scale"): 0.0}), 2)


def test_keys_whose_bias_e4m3_cannot_hold_are_refused_with_the_figure():
    sizes = {
        "vocab_size": 8,
        "num_layers": 1,
        "d_model": 8,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 4,
        "d_ff": 8,
    }
    path = "layers", 0, "attention", "qkv_bias"
    bias = jnp.zeros(16).at[9].set(-300.0)
    narrow = ModelConfig(**sizes, kv_scales=((1.0, 1.0),))
    assert "keys of layer 0 have a bias of 300, and e4m3 with scale 1 ends at 448" in kv_scales.complaint(
        narrow, path, bias
    )
    assert kv_scales.complaint(ModelConfig(**sizes, kv_scales=((2.0, 1.0),)), path, bias) is None
    assert kv_scales.complaint(ModelConfig(**sizes), path, bias) is None
