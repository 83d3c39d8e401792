"""Reading config.json of the families with experts: sizes, which layers route, windows, and what is refused."""

import math

import jax
import pytest

from jaxllm.config import ConfigError
from jaxllm.graph.models.config import ExpertsConfig, ModelConfig
from jaxllm.graph.models.decoder import abstract

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN_1_5_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


@pytest.mark.parametrize(
    ("raw", "parameters"),
    [(MIXTRAL_8X7B, 46_702_792_704), (QWEN_1_5_MOE, 14_315_784_192), (QWEN_3_30B_A3B, 30_532_122_624)],
    ids=["mixtral-8x7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b"],
)
def test_published_configs_describe_models_of_the_published_size(raw, parameters):
    shapes = abstract(ModelConfig.from_hf(raw))[1]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == parameters


def test_each_family_says_how_its_experts_are_chosen():
    assert ModelConfig.from_hf(MIXTRAL_8X7B).experts == ExpertsConfig(
        count=8, per_token=2, d_ff=14336, norm_topk=True, shared_d_ff=0
    )
    assert ModelConfig.from_hf(QWEN_1_5_MOE).experts == ExpertsConfig(
        count=60, per_token=4, d_ff=1408, norm_topk=False, shared_d_ff=5632
    )
    assert ModelConfig.from_hf(QWEN_3_30B_A3B).experts == ExpertsConfig(
        count=128, per_token=8, d_ff=768, norm_topk=True, shared_d_ff=0
    )


def test_layers_route_by_step_unless_they_are_named_dense():
    def sparse(**changes):
        raw = QWEN_3_30B_A3B | {"num_hidden_layers": 6} | changes
        return [number for number, routes in enumerate(ModelConfig.from_hf(raw).sparse_layers) if routes]

    assert sparse() == [0, 1, 2, 3, 4, 5]
    assert sparse(mlp_only_layers=[0, 4]) == [1, 2, 3, 5]
    assert sparse(decoder_sparse_step=2) == [1, 3, 5]
    assert sparse(decoder_sparse_step=3, mlp_only_layers=[2]) == [5]
    assert sparse(num_experts=0) == []
    assert ModelConfig.from_hf(QWEN_3_30B_A3B | {"num_experts": 0}).experts is None


def test_windows_follow_each_familys_own_keys():
    on = {"use_sliding_window": True, "sliding_window": 9, "num_hidden_layers": 5, "max_window_layers": 3}
    assert ModelConfig.from_hf(QWEN_1_5_MOE | on).windows == (9, None, 9, None, None)
    named = {"layer_types": ["full_attention"] * 4 + ["sliding_attention"]}
    assert ModelConfig.from_hf(QWEN_1_5_MOE | on | named).windows == (None,) * 4 + (9,)
    assert ModelConfig.from_hf(QWEN_3_30B_A3B | on).windows == (9,) * 5
    assert set(ModelConfig.from_hf(QWEN_3_30B_A3B | {"sliding_window": 9}).windows) == {None}
    assert set(ModelConfig.from_hf(MIXTRAL_8X7B).windows) == {None}
    assert set(ModelConfig.from_hf(MIXTRAL_8X7B | {"sliding_window": 9}).windows) == {9}


def test_biases_follow_each_familys_own_keys():
    assert ModelConfig.from_hf(QWEN_1_5_MOE).qkv_bias
    assert not ModelConfig.from_hf(QWEN_1_5_MOE).o_bias
    assert not ModelConfig.from_hf(QWEN_1_5_MOE | {"qkv_bias": False}).qkv_bias
    assert not ModelConfig.from_hf(QWEN_3_30B_A3B).qkv_bias
    assert ModelConfig.from_hf(QWEN_3_30B_A3B | {"attention_bias": True}).o_bias
    assert not ModelConfig.from_hf(MIXTRAL_8X7B | {"attention_bias": True}).qkv_bias


@pytest.mark.parametrize(
    ("raw", "changes", "key", "said"),
    [
        (MIXTRAL_8X7B, {"num_local_experts": 0}, "num_local_experts", ">= 1"),
        (MIXTRAL_8X7B, {"num_experts_per_tok": 9}, "num_experts_per_tok", "at most the number of experts (8)"),
        (QWEN_3_30B_A3B, {"num_experts_per_tok": 0}, "num_experts_per_tok", ">= 1"),
        (QWEN_3_30B_A3B, {"decoder_sparse_step": 0}, "decoder_sparse_step", ">= 1"),
        (QWEN_3_30B_A3B, {"mlp_only_layers": 3}, "mlp_only_layers", "a list of integers"),
        (QWEN_3_30B_A3B, {"mlp_only_layers": [-1]}, "mlp_only_layers", "a list of integers"),
        (QWEN_3_30B_A3B, {"norm_topk_prob": "yes"}, "norm_topk_prob", "true or false"),
        (QWEN_1_5_MOE, {"moe_intermediate_size": 1.5}, "moe_intermediate_size", ">= 1"),
        (QWEN_1_5_MOE, {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size", ">= 1"),
    ],
)
def test_a_wrong_value_is_named_with_its_file_its_key_and_what_is_allowed(raw, changes, key, said):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf(raw | changes, "some/config.json")
    assert str(caught.value).startswith(f"some/config.json: {key} = ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sparse_layers": (True, False)}, "sparse_layers.*there are no experts"),
        ({"sparse_layers": (False,)}, "sparse_layers.*2"),
    ],
)
def test_a_config_made_by_hand_is_checked_too(changes, said):
    sizes = dict(vocab_size=8, num_layers=2, d_model=8, num_heads=4, num_kv_heads=2, head_dim=2, d_ff=8)
    with pytest.raises(ConfigError, match=said):
        ModelConfig(**sizes | changes)


@pytest.mark.parametrize(("per_token", "said"), [(5, "at most experts.count"), (0, ">= 1")])
def test_experts_made_by_hand_are_checked_too(per_token, said):
    with pytest.raises(ConfigError, match=f"experts.per_token.*{said}"):
        ExpertsConfig(count=4, per_token=per_token, d_ff=4)
