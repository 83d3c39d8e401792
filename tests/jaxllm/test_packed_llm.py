"""LLM with twins of its weights in 12 bits for decode steps: the tokens and log-probabilities are those without."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm.config import ConfigError
from jaxllm.core import SamplingParams
from jaxllm.engine.residency import Residency
from jaxllm.graph.layers import whole
from jaxllm.graph.weights import packed
from jaxllm.llm import LLM
from pallas_kernels import bf12

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
SAMPLING = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=3)
SMALL = {"cache_dir": "", "max_num_seqs": 2, "max_num_batched_tokens": 32, "page_size": 8, "dtype": "bfloat16"}
SMALL |= {"enable_prefix_caching": False}  # new weights shall be read
BUCKETS = {"decode_buckets": [2], "token_buckets": [32], "max_model_len": 64}
PROMPTS = ["the first prompt", "another one, longer"]


@pytest.fixture(autouse=True)
def of_any_number_of_rows(monkeypatch):
    monkeypatch.setattr(whole, "PACKED_ROWS", range(1, 33))


@pytest.fixture(scope="module")
def directory(vocabulary_directories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "tiny"
    shutil.copytree(vocabulary_directories["byte_level"], folder)
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


def made(directory, load_format="dummy", kernels="layers", **settings):
    return LLM(directory, load_format=load_format, kernels=kernels, **SMALL, **BUCKETS, **settings)


def said(llm):
    """Token ids and log-probabilities, every bit of them."""
    outputs = [output.outputs[0] for output in llm.generate(PROMPTS, SAMPLING)]
    return [(output.token_ids, [(step.logprob, step.top) for step in output.logprobs]) for output in outputs]


def twins_of(llm):
    return llm.engine.runner.params.get(packed.KEY)


@pytest.mark.parametrize("tied", [True, False])
def test_twins_change_no_bit_of_what_is_said(directory, tmp_path, tied):
    shutil.copytree(directory, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY | {"tie_word_embeddings": tied}))
    llm = made(tmp_path / "model", packed_weights=True)
    params = llm.engine.runner.params
    gate_up = bf12.in_order(bf12.unpack(twins_of(llm)["layers"][1]["gate_up"]))
    np.testing.assert_array_equal(bits(gate_up), bits(params["layers"][1]["mlp"]["gate_up"]))
    assert said(llm) == said(made(tmp_path / "model", packed_weights=False))


def test_decode_steps_read_the_twins(directory):
    llm = made(directory, packed_weights=True)
    before = said(llm)
    params = llm.engine.runner.params
    llm.engine.runner.params = {**params, packed.KEY: jax.tree.map(lambda words: words ^ 1, params[packed.KEY])}
    assert said(llm) != before


def test_there_are_none_unless_they_are_asked_for(directory):
    assert twins_of(made(directory)) is None


@pytest.mark.parametrize(
    ("changed", "settings", "why"),
    [
        ({}, {"kernels": "auto"}, 'compile.kernels = "auto" runs no decode step as one op here'),
        ({}, {"dtype": "float32"}, "layer 0: qkv is float32, not bfloat16"),
        ({}, {"quantization": "int8"}, "layer 0: qkv is quantised"),
        ({}, {"kv_cache_dtype": "fp8"}, "pages of keys and values are fp8"),
        ({"intermediate_size": 96}, {}, r"layer 0: down is \[64, 96\] on a device, not of multiples of 64"),
        ({"sliding_window": 16, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}, {}, "a window"),
        ({}, {"deterministic": True, "decode_buckets": [], "token_buckets": []}, "has no decode steps"),
        ({}, {"mesh": {"tensor": 2}}, "where devices share layers, only with"),
        ({}, {"mesh": {"pipe": 2}}, "not on a mesh of pp2"),
        ({}, {"mesh": {"tensor": 4}, "kernels": "launched"}, r"qkv is \[48, 64\] on a device"),
    ],
)
def test_what_cannot_be_packed_is_an_error_where_it_was_asked_for(directory, tmp_path, changed, settings, why):
    shutil.copytree(directory, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY | changed))
    given = {"load_format": "dummy", "kernels": "layers", **SMALL, **BUCKETS, **settings}
    with pytest.raises(ConfigError, match=f"model.packed_weights = true: .*{why}"):
        LLM(tmp_path / "model", packed_weights=True, **given)


def bits(array):
    return np.asarray(array).view(np.uint16)


# ---- checkpoints: other weights, and some that are too odd ----


def checkpoint(folder, directory, seed, odd=False):
    """A directory with weights of that seed, where `odd` with numbers that no slab can hold."""
    shutil.copytree(directory, folder)
    rng = np.random.default_rng(seed)
    sizes = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
    names = {f"self_attn.{name}": shape for name, shape in sizes.items()}
    names |= {"mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)}
    shapes = {f"model.layers.{layer}.{name}.weight": shape for layer in range(2) for name, shape in names.items()}
    tensors = {name: rng.standard_normal(shape) * 0.1 for name, shape in shapes.items()}
    tensors["model.embed_tokens.weight"] = rng.standard_normal((512, 64))
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors |= {f"model.layers.{layer}.{name}.weight": np.ones(64) for layer in range(2)}
    tensors["model.norm.weight"] = np.ones(64)
    if odd:
        tensors["model.layers.1.mlp.down_proj.weight"][3, :8] = 2.0 ** -np.arange(40, 48)
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert load_file(folder / "model.safetensors")
    return folder


def test_new_weights_come_with_new_twins_also_after_a_sleep(directory, tmp_path):
    first, second = (checkpoint(tmp_path / f"model{seed}", directory, seed) for seed in (1, 2))
    llm = made(first, "auto", packed_weights=True)
    residency = llm.engine.residency
    assert isinstance(residency, Residency)
    before = said(llm)
    expected = said(made(second, "auto", packed_weights=False))
    assert before != expected
    residency.update(second, None)
    assert said(llm) == expected
    for level in (1, 2):
        residency.sleep(level)
        residency.wake_up()
        assert said(llm) == expected
    residency.sleep(1)
    residency.update(first, None)
    residency.wake_up()
    assert said(llm) == before


def test_weights_too_odd_for_12_bits_are_an_error(directory, tmp_path):
    folder = checkpoint(tmp_path / "odd", directory, 3, odd=True)
    why = "layers.1.down: 1 slab of 16 x 64 weights with exponents too far apart for 12 bits"
    with pytest.raises(ConfigError, match=f"model.packed_weights = true: {why}"):
        made(folder, "auto", packed_weights=True)


def test_devices_that_share_layers_have_twins_of_their_parts(directory, tmp_path):
    """Their steps are those of the launches, which a CPU does not have: here nobody reads them."""
    shutil.copytree(directory, tmp_path / "model")
    wider = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY | wider))
    how = {"kernels": "launched", "mesh": {"tensor": 2}}
    llm = made(tmp_path / "model", packed_weights=True, **how)
    qkv = twins_of(llm)["layers"][0]["qkv"]
    assert qkv.sharding.shard_shape(qkv.shape)[:2] == (2, 2)
    assert said(llm) == said(made(tmp_path / "model", **how))
