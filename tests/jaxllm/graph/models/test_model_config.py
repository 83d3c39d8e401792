"""Reading config.json of every family, as transformers 4 and 5 write it, and refusing what does not fit."""

import json
import logging
import math

import jax
import pytest
from helpers.goldens import DIRECTORY, NAMES

from jaxllm.config import ConfigError
from jaxllm.core import JaxLLMError, SamplingParams
from jaxllm.graph.models.config import ModelConfig, RopeConfig
from jaxllm.graph.models.decoder import abstract, axes
from jaxllm.graph.models.generation import GenerationDefaults, read_generation_defaults

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA_3_2_1B = LLAMA_3_1_8B | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "tie_word_embeddings": True,
    "rope_scaling": LLAMA_3_1_8B["rope_scaling"] | {"factor": 32.0},
}
LLAMA_2_7B = {  # as first published: no rope keys, no head_dim
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "pretraining_tp": 1,
}
QWEN_2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN_3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MISTRAL_NEMO = MISTRAL_7B | {
    "head_dim": 128,
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "sliding_window": None,
    "vocab_size": 131072,
}


@pytest.mark.parametrize(
    ("raw", "parameters"),
    [
        (LLAMA_3_1_8B, 8_030_261_248),
        (LLAMA_3_2_1B, 1_235_814_400),
        (LLAMA_2_7B, 6_738_415_616),
        (QWEN_2_5_7B, 7_615_616_512),
        (QWEN_3_0_6B, 596_049_920),
        (MISTRAL_7B, 7_241_732_096),
        (MISTRAL_NEMO, 12_247_782_400),
    ],
    ids=["llama-3.1-8b", "llama-3.2-1b", "llama-2-7b", "qwen2.5-7b", "qwen3-0.6b", "mistral-7b", "mistral-nemo"],
)
def test_published_configs_describe_models_of_the_published_size(raw, parameters):
    config = ModelConfig.from_hf(raw)
    shapes = abstract(config)[1]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == parameters


def test_llama_3_1_keeps_its_rope_its_end_tokens_and_its_dtype():
    config = ModelConfig.from_hf(LLAMA_3_1_8B)
    assert config.rope == RopeConfig(theta=500000.0, kind="llama3", factor=8.0, original_context_length=8192)
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert (config.bos_token_id, config.head_dim, config.dtype) == (128000, 128, "bfloat16")
    assert config.windows == (None,) * 32


def test_the_two_spellings_of_transformers_4_and_5_mean_the_same():
    older = {key: value for key, value in LLAMA_3_1_8B.items() if key not in ("rope_scaling", "torch_dtype")}
    theta = older.pop("rope_theta")
    newer = older | {"rope_parameters": LLAMA_3_1_8B["rope_scaling"] | {"rope_theta": theta}, "dtype": "bfloat16"}
    assert ModelConfig.from_hf(newer) == ModelConfig.from_hf(LLAMA_3_1_8B)


def test_a_config_without_architectures_is_known_by_its_model_type():
    raw = {key: value for key, value in LLAMA_3_1_8B.items() if key != "architectures"}
    assert ModelConfig.from_hf(raw) == ModelConfig.from_hf(LLAMA_3_1_8B)


def test_yarn_takes_its_factor_from_the_context_lengths_when_none_is_given():
    scaling = {"type": "yarn", "original_max_position_embeddings": 8192}
    rope = ModelConfig.from_hf(QWEN_2_5_7B | {"rope_scaling": scaling}).rope
    assert (rope.kind, rope.factor, rope.original_context_length) == ("yarn", 4.0, 8192)


def test_windows_follow_each_familys_own_keys():
    assert set(ModelConfig.from_hf(MISTRAL_7B).windows) == {4096}
    assert set(ModelConfig.from_hf(MISTRAL_NEMO).windows) == {None}
    without = {key: value for key, value in MISTRAL_7B.items() if key != "sliding_window"}
    assert set(ModelConfig.from_hf(without).windows) == {4096}
    assert set(ModelConfig.from_hf(QWEN_2_5_7B).windows) == {None}
    upper = ModelConfig.from_hf(QWEN_2_5_7B | {"use_sliding_window": True, "max_window_layers": 26})
    assert upper.windows == (None,) * 26 + (131072,) * 2
    named = {"use_sliding_window": True, "layer_types": ["sliding_attention"] + ["full_attention"] * 27}
    assert ModelConfig.from_hf(QWEN_2_5_7B | named).windows == (131072,) + (None,) * 27
    assert set(ModelConfig.from_hf(LLAMA_2_7B | {"sliding_window": 7}).windows) == {None}


@pytest.mark.parametrize(
    ("raw", "changes", "key", "said"),
    [
        (LLAMA_3_1_8B, {"hidden_size": None}, "hidden_size", "(missing)"),
        (LLAMA_3_1_8B, {"hidden_size": "4096"}, "hidden_size", "an integer >= 1"),
        (LLAMA_3_1_8B, {"num_hidden_layers": 0}, "num_hidden_layers", "an integer >= 1"),
        (LLAMA_3_1_8B, {"vocab_size": True}, "vocab_size", "an integer >= 1"),
        (LLAMA_3_1_8B, {"hidden_act": "gelu"}, "hidden_act", "silu"),
        (LLAMA_3_1_8B, {"num_key_value_heads": 5}, "num_attention_heads", "a multiple of num_key_value_heads (5)"),
        (LLAMA_3_1_8B, {"num_attention_heads": 24}, "hidden_size", "a multiple of num_attention_heads (24)"),
        (LLAMA_3_1_8B, {"head_dim": 33}, "head_dim", "even"),
        (LLAMA_3_1_8B, {"rms_norm_eps": 0}, "rms_norm_eps", "> 0"),
        (LLAMA_3_1_8B, {"rms_norm_eps": 10**400}, "rms_norm_eps", "> 0"),
        (LLAMA_3_1_8B, {"rope_theta": math.nan}, "rope_theta", "> 0"),
        (LLAMA_3_1_8B, {"eos_token_id": "</s>"}, "eos_token_id", "a token id"),
        (LLAMA_3_1_8B, {"tie_word_embeddings": 1}, "tie_word_embeddings", "true or false"),
        (LLAMA_3_1_8B, {"torch_dtype": "float8_e4m3fn"}, "torch_dtype", "bfloat16, float16, float32"),
        (LLAMA_3_1_8B, {"quantization_config": {"bits": 4}}, "quantization_config.quant_method", "one of awq"),
        (LLAMA_3_1_8B, {"architectures": ["GPT2LMHeadModel"]}, "architectures", "Qwen3ForCausalLM"),
        (LLAMA_3_1_8B, {"architectures": None, "model_type": "gpt2"}, "model_type", "llama, qwen2, qwen3, mistral"),
        (LLAMA_3_1_8B, {"architectures": None, "model_type": None}, "architectures", "LlamaForCausalLM"),
        (LLAMA_3_1_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "must be 1"),
        (LLAMA_3_1_8B, {"rope_scaling": [8]}, "rope_scaling", "an object"),
        (
            LLAMA_3_1_8B,
            {"rope_scaling": {"rope_type": "longrope"}},
            "rope_scaling.rope_type",
            "default, linear, llama3",
        ),
        (LLAMA_3_1_8B, {"rope_scaling": {"type": "dynamic"}}, "rope_scaling.type", "default, linear, llama3"),
        (LLAMA_3_1_8B, {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor", "(missing)"),
        (LLAMA_3_1_8B, {"rope_scaling": {"full_attention": {}}}, "rope_scaling.rope_type", "once for the model"),
        (
            LLAMA_3_1_8B,
            {"rope_scaling": LLAMA_3_1_8B["rope_scaling"] | {"low_freq_factor": 4}},
            "rope_scaling.low_freq_factor",
            "below high_freq_factor (4)",
        ),
        (QWEN_2_5_7B, {"rope_theta": 1.0, "rope_scaling": {"type": "yarn"}}, "rope_theta", "> 1 for yarn"),
        (QWEN_2_5_7B, {"layer_types": ["full_attention"]}, "layer_types", "28"),
        (QWEN_2_5_7B, {"layer_types": ["linear_attention"] * 28}, "layer_types", "full_attention, sliding_attention"),
        (QWEN_2_5_7B, {"layer_types": ["sliding_attention"] * 28}, "layer_types", "use_sliding_window"),
        (MISTRAL_7B, {"sliding_window": 0}, "sliding_window", ">= 1"),
    ],
)
def test_a_wrong_value_is_named_with_its_file_its_key_and_what_is_allowed(raw, changes, key, said):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf(raw | changes, "some/config.json")
    assert str(caught.value).startswith(f"some/config.json: {key} = ")
    assert said in str(caught.value)
    assert isinstance(caught.value, JaxLLMError)


def test_unknown_keys_are_ignored_with_one_debug_note(caplog):
    with caplog.at_level(logging.DEBUG, "jaxllm"):
        config = ModelConfig.from_hf(LLAMA_3_1_8B | {"zebra": 1, "attention_dropout": 0.0})
    assert config == ModelConfig.from_hf(LLAMA_3_1_8B)
    assert [record.getMessage() for record in caplog.records if "zebra" in record.getMessage()] == [
        "config.json: keys without a meaning here, ignored: attention_dropout, zebra"
    ]


@pytest.mark.parametrize(
    ("text", "said"), [(None, "cannot be read"), ("{", "is not JSON"), ("[1]", "JSON object"), ("[" * 9999, "JSON")]
)
def test_a_config_file_that_is_not_one_is_an_error_naming_the_file(tmp_path, text, said):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        ModelConfig.from_directory(tmp_path)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"num_kv_heads": 3}, {"head_dim": 7}, {"windows": (4,)}, {"d_ff": 0}], ids=lambda c: next(iter(c))
)
def test_a_config_made_by_hand_is_checked_too(changes):
    sizes = {
        "vocab_size": 8,
        "num_layers": 2,
        "d_model": 8,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 2,
        "d_ff": 8,
    }
    ModelConfig(**sizes)
    with pytest.raises(ConfigError, match=next(iter(changes))):
        ModelConfig(**sizes | changes)


@pytest.mark.parametrize("name", NAMES)
def test_every_leaf_has_one_logical_axis_name_a_dimension(name):
    config = ModelConfig.from_directory(DIRECTORY / name)
    shapes, names = abstract(config)[1], axes(config)
    assert jax.tree.structure(shapes) == jax.tree.structure(names, is_leaf=lambda leaf: isinstance(leaf, tuple))
    jax.tree.map(lambda shape, axis: [None for _ in zip(shape.shape, axis, strict=True)], shapes, names)
    assert len(shapes["layers"][0]["attention"]) + len(shapes["layers"][0]["mlp"]) + 1 <= 9
    assert abstract(config)[0] == abstract(ModelConfig.from_directory(DIRECTORY / name))[0]


def test_generation_defaults_are_read_where_the_file_names_them(tmp_path):
    assert read_generation_defaults(tmp_path) == GenerationDefaults()
    suggested = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": [7, 9]}
    (tmp_path / "generation_config.json").write_text(json.dumps(suggested))
    params = SamplingParams(temperature=0.6, top_p=0.9, top_k=20)
    assert read_generation_defaults(tmp_path) == GenerationDefaults(params=params, eos_token_ids=(7, 9))
    (tmp_path / "generation_config.json").write_text('{"temperature": 0, "eos_token_id": 3}')
    assert read_generation_defaults(tmp_path) == GenerationDefaults(
        params=SamplingParams(temperature=0), eos_token_ids=(3,)
    )
    for wrong in ('"high"', "1.5"):
        (tmp_path / "generation_config.json").write_text(f'{{"top_p": {wrong}}}')
        with pytest.raises(ConfigError, match=r"generation_config\.json: top_p = "):
            read_generation_defaults(tmp_path)
