"""The engine on a real GPU: `make test-gpu`. What a CPU said in f32, the GPU says too."""

import json
from pathlib import Path

import jax
import pytest

from benchmarks.shapes import make_model_directory
from jaxllm.core import SamplingParams
from jaxllm.llm import LLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here")]
GOLDEN = Path(__file__).parent.parent / "goldens" / "bundled_greedy.json"


def test_the_bundled_model_gives_the_same_greedy_tokens_as_on_a_cpu():
    golden = json.loads(GOLDEN.read_text())
    llm = LLM(dtype="float32", max_num_seqs=8, max_num_batched_tokens=512)
    params = SamplingParams(temperature=0.0, max_tokens=golden["max_tokens"])
    outputs = llm.generate([row["prompt"] for row in golden["rows"]], params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [row["token_ids"] for row in golden["rows"]]


def test_a_model_of_real_shape_with_random_weights_generates(tmp_path):
    directory = make_model_directory("qwen3-0.6b", tmp_path)
    shape = dict(
        max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=512, decode_buckets=[8], token_buckets=[512]
    )
    llm = LLM(str(directory), load_format="dummy", **shape)
    prompts = [list(range(10 + i, 200 + 30 * i)) for i in range(8)]
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    together = llm.generate(prompts, params, use_tqdm=False)
    assert all(len(o.outputs[0].token_ids) == 32 for o in together)
    alone = llm.generate(prompts[3:4], params, use_tqdm=False)
    assert alone[0].outputs[0].token_ids == together[3].outputs[0].token_ids
