"""Loading checkpoints: one file or many, any float type, and every way a directory can be wrong."""

import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.attends import causal
from helpers.goldens import DIRECTORY, NAMES, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxllm.core import JaxLLMError
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import abstract, merge
from jaxllm.graph.weights.loader import WeightsError, load
from jaxllm.graph.weights.names import to_checkpoint
from jaxllm.graph.weights.tensor_file import TensorFileError, open_file

SOURCE = DIRECTORY / "llama"
CONFIG = ModelConfig.from_directory(SOURCE)
TENSORS = load_file(SOURCE / "model.safetensors")
Q0 = "model.layers.0.self_attn.q_proj.weight"


def write_shards(directory, tensors, count, **moved):
    """`count` shards dealt out tensor by tensor, and their index; `moved` renames files in the index."""
    weight_map = {}
    for shard in range(count):
        name = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        mine = dict(list(tensors.items())[shard::count])
        save_file(mine, directory / name)
        weight_map |= dict.fromkeys(mine, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map | moved}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_one(directory, tensors):
    save_file(tensors, directory / "model.safetensors")


def problems(directory, config=CONFIG):
    """What the loader says, having taken no device memory to say it."""
    before = len(jax.live_arrays())
    with pytest.raises(WeightsError) as caught:
        load(directory, config, jnp.float32)
    assert len(jax.live_arrays()) == before
    assert isinstance(caught.value, JaxLLMError)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    assert str(directory) in str(caught.value)
    return list(caught.value.problems)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), left, right)


@pytest.mark.parametrize("count", [2, 7])
def test_one_file_and_many_shards_give_bitwise_the_same_logits(tmp_path, count):
    write_shards(tmp_path, TENSORS, count)
    whole, sharded = (load(place, CONFIG, jnp.float32) for place in (SOURCE, tmp_path))
    assert_same(whole, sharded)
    expected = golden("llama")
    model, positions = abstract(CONFIG)[0], jnp.arange(len(expected.prompt))

    def logits(params):
        decoder = merge(model, params)
        return np.asarray(decoder.logits(decoder(jnp.asarray(expected.prompt), positions, causal(CONFIG))))

    np.testing.assert_array_equal(logits(whole), logits(sharded))


@pytest.mark.parametrize("name", NAMES)
def test_leaves_are_the_files_tensors_joined_and_cut_apart_again(name):
    config = ModelConfig.from_directory(DIRECTORY / name)
    stored = load_file(DIRECTORY / name / "model.safetensors")
    params = load(DIRECTORY / name, config, jnp.float16)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract(config, jnp.float16)[1])
    again = to_checkpoint(params, config)
    assert again.keys() == stored.keys()
    for tensor in stored:
        np.testing.assert_array_equal(again[tensor], stored[tensor], strict=True)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_tensors_are_cast_to_the_type_asked_for(tmp_path, stored, wanted):
    tensors = {name: tensor.astype(stored) for name, tensor in TENSORS.items()}
    write_one(tmp_path, tensors)
    loaded = to_checkpoint(load(tmp_path, CONFIG, wanted), CONFIG)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(loaded[name], tensor.astype(wanted), strict=True)


def test_weights_outlive_the_file_they_came_from(tmp_path):
    tensors = {name: tensor.astype(np.float32) for name, tensor in TENSORS.items()}
    write_one(tmp_path, tensors)
    params = load(tmp_path, CONFIG, jnp.float32)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(4096)
        file.write(bytes(50_000))
    assert_same(to_checkpoint(params, CONFIG), {name: jnp.asarray(tensor) for name, tensor in tensors.items()})


def test_progress_counts_bytes_up_to_all_of_them():
    seen = []
    load(SOURCE, CONFIG, jnp.bfloat16, progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in TENSORS.values())
    assert seen == sorted(set(seen))
    assert seen[-1] == (total, total)
    assert {entry[1] for entry in seen} == {total}


def test_weights_go_to_the_device_asked_for():
    device = jax.devices()[-1]
    assert load(SOURCE, CONFIG, device=device)["layers"][1]["mlp"]["down"].devices() == {device}


def test_a_tied_model_takes_a_checkpoint_that_also_carries_a_head(tmp_path):
    source = DIRECTORY / "llama-mqa-tied"
    config, tensors = ModelConfig.from_directory(source), load_file(source / "model.safetensors")
    write_one(tmp_path, tensors | {"lm_head.weight": np.zeros_like(tensors["model.embed_tokens.weight"])})
    assert_same(load(tmp_path, config), load(source, config))


def test_buffers_of_old_checkpoints_are_ignored(tmp_path):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    write_one(tmp_path, TENSORS | buffer)
    assert_same(load(tmp_path, CONFIG), load(SOURCE, CONFIG))


def test_data_at_an_odd_offset_loads(tmp_path):
    raw = (SOURCE / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = raw[8 : 8 + length].rstrip() + b" " * 3
    header += b" " * (1 - len(header) % 2)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    assert len(header) % 2 == 1
    assert_same(load(tmp_path, CONFIG), load(SOURCE, CONFIG))


def test_everything_that_does_not_fit_is_listed_at_once_by_file_and_name(tmp_path):
    wrong = dict(TENSORS)
    del wrong["model.norm.weight"], wrong["lm_head.weight"]
    wrong[Q0] = wrong[Q0][:-1]
    wrong["model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 32), np.int32)
    wrong["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
    write_one(tmp_path, wrong)
    assert sorted(problems(tmp_path)) == [
        "model.safetensors: lm_head.weight is missing; wanted [96, 32] (config.json has tie_word_embeddings = false)",
        f"model.safetensors: {Q0} is [31, 32], wanted [32, 32]",
        "model.safetensors: model.layers.1.mlp.up_proj.weight is I32, must be one of BF16, F16, F32",
        "model.safetensors: model.layers.2.mlp.up_proj.weight has no place in the model",
        "model.safetensors: model.norm.weight is missing; wanted [32]",
    ]


def test_faulty_shards_are_listed_together_with_tensors_that_do_not_fit(tmp_path):
    elsewhere = {name: tensor for name, tensor in TENSORS.items() if "layers.1" not in name}
    write_shards(tmp_path, elsewhere, 4, **{"lm_head.weight": "../secrets.safetensors", Q0: "gone.safetensors"})
    (tmp_path / "model-00002-of-00004.safetensors").write_bytes(b"\x10")
    found = problems(tmp_path)
    assert "model.safetensors.index.json: '../secrets.safetensors' is not the name of a file in the directory" in found
    assert "gone.safetensors: no such file, though model.safetensors.index.json names it" in found
    assert "model-00002-of-00004.safetensors: no header: 1 bytes, header of -1 bytes promised" in found
    missing = "model.safetensors.index.json: model.layers.1.mlp.down_proj.weight is missing; wanted [32, 48]"
    assert missing in found
    assert sum("layers.1" in problem for problem in found) == 9
    assert len(found) == 12


@pytest.mark.parametrize("name", ["/etc/passwd", "sub/model.safetensors", "..", "", "a\0b"])
def test_an_index_cannot_name_a_file_outside_its_directory(tmp_path, name):
    write_shards(tmp_path, TENSORS, 2, **{Q0: name})
    assert problems(tmp_path)[0].endswith("is not the name of a file in the directory")


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    write_shards(tmp_path, TENSORS, 2)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    second = load_file(tmp_path / names[1])
    again = next(iter(load_file(tmp_path / names[0])))
    save_file(second | {again: TENSORS[again]}, tmp_path / names[1])
    assert problems(tmp_path) == [f"{names[1]}: {again} is also in {names[0]}"]


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (None, "must hold model.safetensors or model.safetensors.index.json"),
        ("{", "is not JSON"),
        ("{}", "weight_map must map tensor names to file names"),
        ('{"weight_map": {"a": 3}}', "a is in 3, not a file name"),
    ],
)
def test_a_directory_without_weights_or_with_a_broken_index_is_named(tmp_path, index, said):
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(index)
    assert said in problems(tmp_path)[0]


def test_a_wrong_path_is_named(tmp_path):
    assert problems(tmp_path / "nowhere") == ["no such directory"]


def test_a_long_list_of_problems_is_cut_in_the_message_and_whole_on_the_error(tmp_path):
    write_one(tmp_path, TENSORS | {f"extra.{number}": np.ones(1, np.float32) for number in range(150)})
    with pytest.raises(WeightsError, match="and 50 more") as caught:
        load(tmp_path, CONFIG)
    assert len(caught.value.problems) == 150


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin, end, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no header"),
        (file_of({"a": entry(0, 4)}, bytes(4), length=2**62), "no header"),
        (file_of(b"{]"), "not JSON"),
        (file_of(b"\xff\xfe"), "not JSON"),
        (file_of(b"[" * 5000), "not JSON"),
        (file_of([]), "not a JSON object"),
        (file_of({"a": 1}), "a: header entry is not an object"),
        (file_of({"a": entry(0, 4, "F33")}, bytes(4)), "a: unknown dtype 'F33'"),
        (file_of({"a": entry(0, 4, shape=[-1])}, bytes(4)), "a: shape [-1]"),
        (file_of({"a": entry(0, 4, shape="1")}, bytes(4)), "a: shape '1'"),
        (file_of({"a": entry(0, 8)}, bytes(8)), "a: bytes [0, 8] do not hold F32[1]"),
        (file_of({"a": {"dtype": "F32", "shape": [1]}}), "a: bytes None"),
        (file_of({"a": entry(0, 4)}, bytes(3)), "truncated"),
        (file_of({"a": entry(0, 4)}, bytes(5)), "1 bytes follow the last tensor"),
        (file_of({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)), "b: starts at byte"),
        (file_of({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "b: starts at byte"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong_in_it(tmp_path, content, said):
    (tmp_path / "model.safetensors").write_bytes(content)
    (found,) = problems(tmp_path)
    assert found.startswith("model.safetensors: ")
    assert said in found


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), min_size=1, max_size=4), st.data())
def test_any_damage_to_a_header_is_refused_or_harmless(tmp_path_factory, changes, data):
    raw = bytearray((SOURCE / "model.safetensors").read_bytes())
    for place, value in changes:
        raw[place % len(raw)] = value
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) // 2, 100, 8]))])
    try:
        file = open_file(path)
    except TensorFileError:
        return
    assert all(tensor.end <= len(raw) for tensor in file.tensors.values())
