"""Checkpoints that are quantised already: packed here by the formats' definitions, value by value, and read back."""

import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.attends import causal

from jaxllm.config import ConfigError
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import abstract, merge
from jaxllm.graph.models.quantised import StoredQuantisation
from jaxllm.graph.quant import stored
from jaxllm.graph.quant.leaf import QuantisedWeight, StackedWeight
from jaxllm.graph.weights.loader import WeightsError, load
from jaxllm.graph.weights.names import parts

INPUTS, OUTPUTS, GROUP = 128, 48, 32
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


class Matrix:
    """Random 4-bit values of a matrix [outputs, inputs], and the weight they stand for."""

    def __init__(self, seed, outputs=OUTPUTS, inputs=INPUTS, order=None):
        rng = np.random.default_rng(seed)
        groups = inputs // GROUP
        self.q = rng.integers(0, 16, (outputs, inputs))
        self.zero = rng.integers(1, 16, (groups, outputs))
        self.scale = (0.005 + 0.01 * rng.random((groups, outputs))).astype(np.float16)
        self.group_of = np.repeat(np.arange(groups), GROUP)
        if order is not None:
            self.group_of = self.group_of[np.argsort(order)]
        by_input = self.group_of
        self.weight = (self.q - self.zero[by_input].T) * self.scale[by_input].T.astype(np.float64)


def awq(matrix):
    """AutoAWQ's gemm layout: nibble i of a word is output order[i] of its eight."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def packed(values):  # [rows, outputs]
        words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
        for column in range(words.shape[1]):
            for i in range(8):
                words[:, column] |= values[:, 8 * column + order[i]].astype(np.uint32) << np.uint32(4 * i)
        return words.view(np.int32)

    return {"qweight": packed(matrix.q.T), "qzeros": packed(matrix.zero), "scales": matrix.scale}


def gptq(matrix, less_one=True):
    """GPTQ's layout: nibble i of a word is input i of its eight; zeros by outputs, in the first format less one."""
    qweight = np.zeros((matrix.q.shape[1] // 8, matrix.q.shape[0]), np.uint32)
    for k in range(matrix.q.shape[1]):
        qweight[k // 8] |= matrix.q[:, k].astype(np.uint32) << np.uint32(4 * (k % 8))
    zeros = matrix.zero - (1 if less_one else 0)
    qzeros = np.zeros((zeros.shape[0], zeros.shape[1] // 8), np.uint32)
    for n in range(zeros.shape[1]):
        qzeros[:, n // 8] |= zeros[:, n].astype(np.uint32) << np.uint32(4 * (n % 8))
    return {
        "qweight": qweight.view(np.int32),
        "qzeros": qzeros.view(np.int32),
        "scales": matrix.scale,
        "g_idx": matrix.group_of.astype(np.int32),
    }


def fp8(weight, blocks):
    """e4m3 values with a scale an output, or DeepSeek's one a 128 x 128 block, multiplied back on reading."""
    outputs, inputs = weight.shape
    if not blocks:
        scale = np.abs(weight).max(axis=1, keepdims=True) / 448
        return {"weight": (weight / scale).astype(ml_dtypes.float8_e4m3fn), "weight_scale": scale.astype(np.float32)}
    scale = np.zeros((math.ceil(outputs / 128), math.ceil(inputs / 128)), np.float32)
    values = np.zeros(weight.shape, ml_dtypes.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            where = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale[i, j] = np.abs(weight[where]).max() / 448
            values[where] = (weight[where] / scale[i, j]).astype(ml_dtypes.float8_e4m3fn)
    return {"weight": values, "weight_scale_inv": scale}


def on_device(tensors):
    return {name: jnp.asarray(value) for name, value in tensors.items()}


@pytest.mark.parametrize("form", ["awq", "gptq", "gptq_v2"])
def test_four_bit_layouts_give_back_the_weight_they_hold(form):
    matrices = [Matrix(seed, outputs) for seed, outputs in ((0, 48), (1, 16), (2, 16))]
    if form == "awq":
        kind, packed = StoredQuantisation(method="awq", group=GROUP), [awq(each) for each in matrices]
    else:
        kind = StoredQuantisation(method="gptq", group=GROUP, zero_less_one=form == "gptq")
        packed = [gptq(each, form == "gptq") for each in matrices]
    leaf = stored.leaf(kind, [on_device(each) for each in packed])
    expected = np.concatenate([each.weight for each in matrices])
    np.testing.assert_allclose(leaf.widened(), expected, rtol=1e-6, atol=1e-9)
    x = np.random.default_rng(5).standard_normal((3, INPUTS)).astype(np.float32)
    np.testing.assert_allclose(leaf.project(jnp.asarray(x)), x @ expected.T, rtol=0, atol=1e-4)


def test_act_order_is_undone_once_for_matrices_that_share_it_and_apart_for_those_that_do_not():
    kind = StoredQuantisation(method="gptq", group=GROUP, reordered=True, zero_less_one=True)
    orders = [np.random.default_rng(seed).permutation(INPUTS) for seed in (0, 0, 1)]
    x = jnp.asarray(np.random.default_rng(5).standard_normal((3, INPUTS)), jnp.float32)
    for count, apart in ((2, False), (3, True)):
        matrices = [Matrix(seed, 16, order=order) for seed, order in enumerate(orders[:count])]
        leaf = stored.leaf(kind, [on_device(gptq(each)) for each in matrices])
        assert isinstance(leaf, StackedWeight) is apart
        expected = np.concatenate([each.weight for each in matrices])
        np.testing.assert_allclose(leaf.widened(), expected, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(leaf.project(x), np.asarray(x) @ expected.T, rtol=0, atol=1e-4)


def test_groups_of_unequal_size_are_refused():
    kind = StoredQuantisation(method="gptq", group=GROUP, reordered=True)
    packed = on_device(gptq(Matrix(0, 16)))
    with pytest.raises(ValueError, match="g_idx must give every group 32 inputs"):
        stored.leaf(kind, [packed | {"g_idx": jnp.zeros(INPUTS, jnp.int32)}])


@pytest.mark.parametrize("blocks", [False, True])
def test_e4m3_layouts_give_back_the_weight_they_hold(blocks):
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((outputs, 200)) * 0.02 for outputs in (130, 64)]
    kind = StoredQuantisation(method="fp8", blocks=blocks)
    packed = [fp8(each, blocks) for each in weights]
    leaf = stored.leaf(kind, [on_device(each) for each in packed])
    scales = [
        np.kron(each["weight_scale_inv"], np.ones((128, 128)))[: w.shape[0], :200] if blocks else each["weight_scale"]
        for each, w in zip(packed, weights, strict=True)
    ]
    expected = [each["weight"].astype(np.float64) * scale for each, scale in zip(packed, scales, strict=True)]
    np.testing.assert_allclose(leaf.widened(), np.concatenate(expected), rtol=1e-6, atol=1e-9)
    x = rng.standard_normal((3, 200)).astype(np.float32)
    product = x @ np.concatenate(expected).T
    assert np.linalg.norm(leaf.project(jnp.asarray(x)) - product) < 0.04 * np.linalg.norm(product)


def test_one_scale_a_matrix_and_a_fixed_scale_of_inputs():
    kind = StoredQuantisation(method="fp8", fixed_inputs=True)
    values = np.ones((16, 128), ml_dtypes.float8_e4m3fn)
    packed = [
        {"weight": values, "weight_scale": np.float32(scale), "input_scale": np.float32([limit])}
        for scale, limit in ((2.0, 0.01), (3.0, 0.02))
    ]
    leaf = stored.leaf(kind, [on_device(each) for each in packed])
    np.testing.assert_allclose(leaf.widened()[:, 0], [2.0] * 16 + [3.0] * 16)
    assert float(leaf.x_scale) == pytest.approx(0.02)


CONFIGS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    "compressed": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                "input_activations": {"dynamic": True, "strategy": "token"},
            }
        },
    },
}


def write(directory, form):
    """A checkpoint of the form, and the plain weights it stands for."""
    from safetensors.numpy import save_file

    directory.mkdir()
    raw = LLAMA | {"quantization_config": CONFIGS[form]}
    (directory / "config.json").write_text(json.dumps(raw))
    rng, tensors, plain = np.random.default_rng(0), {}, {}
    for number, part in enumerate(parts(ModelConfig.from_hf(LLAMA))):
        module = part.name.removesuffix("weight")
        if len(part.shape) == 1 or part.path[0] != "layers":
            values = np.ones(part.shape) if len(part.shape) == 1 else rng.standard_normal(part.shape) * 0.02
            tensors[part.name] = plain[part.name] = values.astype(np.float32)
            continue
        if form in ("awq", "gptq"):
            matrix = Matrix(number, *part.shape)
            made, weight = (awq if form == "awq" else gptq)(matrix), matrix.weight
        else:
            made = fp8(rng.standard_normal(part.shape) * 0.05, form == "fp8")
            scale = made.get("weight_scale")
            if scale is None:
                grown = np.kron(made["weight_scale_inv"], np.ones((128, 128)))
                scale = grown[: part.shape[0], : part.shape[1]]
            weight = made["weight"].astype(np.float64) * scale
        plain[part.name] = weight.astype(np.float32)
        tensors |= {module + suffix: value for suffix, value in made.items()}
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, directory / "model.safetensors")
    return plain


@pytest.mark.parametrize("form", CONFIGS)
def test_a_quantised_checkpoint_gives_the_logits_of_the_weights_it_stands_for(form, tmp_path):
    from safetensors.numpy import save_file

    plain = write(tmp_path / form, form)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text(json.dumps(LLAMA))
    save_file(plain, tmp_path / "plain" / "model.safetensors")
    logits = {}
    ids = jnp.arange(20, dtype=jnp.int32)
    for name in (form, "plain"):
        config = ModelConfig.from_directory(tmp_path / name)
        params = load(tmp_path / name, config, jnp.float32)
        assert isinstance(params["layers"][0]["attention"]["qkv"], QuantisedWeight) is (name == form)
        if config.stored is not None:  # what memory is planned by
            told = stored.shapes(config.stored, abstract(config, jnp.float32)[1])
            assert jax.tree.structure(told) == jax.tree.structure(params)
            assert [leaf.shape for leaf in jax.tree.leaves(told)] == [leaf.shape for leaf in jax.tree.leaves(params)]
        model = merge(abstract(config, jnp.float32)[0], params)
        logits[name] = np.asarray(model.logits(model(ids, ids, causal(config))))
    error = np.linalg.norm(logits[form] - logits["plain"]) / np.linalg.norm(logits["plain"])
    assert error < (0.1 if form in ("fp8", "compressed") else 1e-4)


def test_what_a_quantised_checkpoint_lacks_is_listed_by_name(tmp_path):
    from safetensors.numpy import load_file, save_file

    write(tmp_path / "awq", "awq")
    file = tmp_path / "awq" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.k_proj.qzeros"]
    tensors["model.layers.1.mlp.up_proj.scales"] = tensors["model.layers.1.mlp.up_proj.scales"][:1]
    save_file(tensors, file)
    with pytest.raises(WeightsError) as caught:
        load(tmp_path / "awq", ModelConfig.from_directory(tmp_path / "awq"))
    assert caught.value.problems == (
        "model.safetensors: model.layers.0.self_attn.k_proj.qzeros is missing; wanted [2, 4]",
        "model.safetensors: model.layers.1.mlp.up_proj.scales is [1, 128], wanted [2, 128]",
    )


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method"),
        ({"quant_method": "awq", "bits": 3, "group_size": 32}, "bits"),
        ({"quant_method": "awq", "bits": 4, "group_size": 48}, "group_size"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "marlin"}, "version"),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, "group_size"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "weight_block_size"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "format"),
    ],
)
def test_what_is_not_read_here_is_named_with_what_is(changes, key):
    with pytest.raises(ConfigError, match=rf"config.json: quantization_config.{key} = .*must be"):
        ModelConfig.from_hf(LLAMA | {"quantization_config": changes}, "config.json")
