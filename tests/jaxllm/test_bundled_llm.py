"""The bundled model through `LLM` on this CPU gives what a GPU is held to, in other buckets than it was made in."""

import json
from pathlib import Path

from jaxllm.core import SamplingParams
from jaxllm.llm import LLM

GOLDEN = Path(__file__).parent.parent / "goldens" / "bundled_greedy.json"


def test_the_bundled_model_still_gives_its_greedy_golden(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    shape = {"max_num_seqs": 8, "decode_buckets": [8], "token_buckets": [64], "max_num_batched_tokens": 64}
    llm = LLM(dtype="float32", max_model_len=256, cache_dir=str(tmp_path), **shape)
    params = SamplingParams(temperature=0.0, max_tokens=golden["max_tokens"])
    outputs = llm.generate([row["prompt"] for row in golden["rows"]], params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [row["token_ids"] for row in golden["rows"]]
    assert outputs[3].outputs[0].text.strip()
