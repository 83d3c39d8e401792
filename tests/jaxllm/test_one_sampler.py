"""Where a kernel draws alike with top_k and without, one executable a bucket does both; the tokens are the same."""

import json
import shutil

import pytest
from test_llm_on_device import TINY

from jaxllm.core import SamplingParams
from jaxllm.graph import compile as compiling
from jaxllm.graph.steps import SampleMode
from jaxllm.llm import LLM

PARAMS = [
    SamplingParams(temperature=0.9, seed=7, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=8, top_k=3, max_tokens=9, ignore_eos=True),
]


@pytest.fixture
def tokens_and_modes(vocabulary_directories, tmp_path, monkeypatch):
    folder = tmp_path / "tiny"
    shutil.copytree(vocabulary_directories["byte_level"], folder)
    (folder / "config.json").write_text(json.dumps(TINY))

    def run(alike):
        monkeypatch.setattr(compiling, "draws_alike", lambda vocab_size: alike)
        sizes = dict(max_num_seqs=2, max_num_batched_tokens=32, max_model_len=64, page_size=8, num_pages=32)
        llm = LLM(folder, load_format="dummy", cache_dir="", decode_steps=2, decode_buckets=[2], **sizes)
        told = [llm.generate(["def f(x):"], params, use_tqdm=False)[0].outputs[0].token_ids for params in PARAMS]
        assert llm.engine.scheduler.metrics.compiles_after_ready == 0
        table = llm.engine.runner.executables.table
        return told, {key[-1] for key in table if key[0] in ("sample", "multi_step")}

    return run


def test_one_executable_draws_with_top_k_and_without(tokens_and_modes):
    told, modes = tokens_and_modes(False)
    again, fewer = tokens_and_modes(True)
    assert modes - fewer == {SampleMode.RANDOM}
    assert again == told
