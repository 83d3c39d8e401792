"""The order of a start: what is wrong with the model's files is said before anything long is begun."""

import jax
import pytest
from helpers import checkpoints

from jaxllm.config import load
from jaxllm.engine import startup
from jaxllm.graph.compile_cache import seal
from jaxllm.graph.weights.loader import WeightsError


@pytest.fixture
def warm_cache(tmp_path):
    """A folder with an entry that holds, as a start before has left it."""
    before = jax.config.jax_compilation_cache_dir
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "entry").write_bytes(b"executable")
    seal(folder)
    yield folder
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("warm", [True, False])
def test_a_damaged_model_is_refused_before_compiling_begins(tmp_path, warm_cache, warm, monkeypatch):
    """With a warm cache executables load beside the weights: only the look at the files' headers comes before both."""
    model = checkpoints.copy_of_bundled(tmp_path / "model")
    checkpoints.drop(model, "model.norm.weight")
    if not warm:
        (warm_cache / "entry").unlink()
    begun = []
    monkeypatch.setattr(startup, "_compile", lambda *given, **named: begun.append(given))
    with pytest.raises(WeightsError, match=r"model\.norm\.weight is missing"):
        startup.start(load(environ={}, model=str(model), cache_dir=str(warm_cache), max_num_seqs=2))
    assert not begun
