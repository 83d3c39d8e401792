"""A training run that was cut off ends where the uninterrupted one does, and what it exports loads."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxllm.config import bundled_model_dir
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.weights.loader import load
from tools.train import export, train
from tools.train import model as models
from tools.train.dataset import Rows

LENGTH = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    for name, rows in (("code", 5), ("chat", 7)):
        tokens = rng.integers(0, 200, (rows, LENGTH + 1)).astype(np.uint16)
        Rows(tokens, np.full((rows, LENGTH), 16, np.uint8)).save(directory, name)
    return directory


CONFIG = train.TrainConfig(model="tiny", batch=4, warmup_steps=2)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return train.train(directory, data, CONFIG, steps=8, log_every=4, save_every=8), directory


def test_an_interrupted_run_resumes_to_the_same_parameters(data, whole, tmp_path):
    train.train(tmp_path, data, CONFIG, steps=8, stop_at=3, log_every=4, save_every=8)
    resumed = train.train(tmp_path, data, CONFIG, resume=True, log_every=4, save_every=8)
    assert int(resumed.state["step"]) == 8
    for a, b in zip(jax.tree.leaves(whole[0].state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_training_on_few_rows_learns_them(data, tmp_path):
    config = dataclasses.replace(CONFIG, peak_rate=1e-2)
    train.train(tmp_path, data, config, steps=60, log_every=10, save_every=60)
    losses = [line for line in (tmp_path / "log.jsonl").read_text().splitlines() if line]
    first, last = (float(line.split('"loss": ')[1].split(",")[0]) for line in (losses[0], losses[-1]))
    assert last < first - 1


def test_an_exported_run_loads_as_a_model_directory_with_the_same_weights(whole, tmp_path):
    directory = export.export(whole[1], tmp_path / "model", bundled_model_dir())
    config = ModelConfig.from_directory(directory)
    assert (config.d_model, config.num_layers, config.qk_norm) == (64, 2, True)
    params = load(directory, config)
    trained = models.narrow(whole[0].state["params"])
    for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_weights_cut_in_parts_join_to_the_same_file(whole, tmp_path):
    directory = export.export(whole[1], tmp_path / "model", bundled_model_dir())
    file = directory / "model.safetensors"
    parts = export.split(file, tmp_path, 100_000)
    assert len(parts) > 3
    joined = export.join(tmp_path, file.name, tmp_path / "joined.safetensors")
    assert joined.read_bytes() == file.read_bytes()
