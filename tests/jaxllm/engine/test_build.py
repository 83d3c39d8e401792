"""A built folder holds everything a start compiles: another process finds each executable there."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PROGRAM = """
import json, sys
import jax
from jaxllm.config import load
from jaxllm.engine.startup import build, start
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
config = load(
    model=sys.argv[2], cache_dir=sys.argv[3], load_format="dummy", dtype="float32", page_size=8,
    max_num_seqs=4, max_num_batched_tokens=16, decode_buckets=[4], token_buckets=[16],
)
report = build(config) if sys.argv[1] == "build" else start(config)[1]
print(json.dumps([report.executables, report.traced, len(hits), report.compile_cache.entries]))
"""
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 1,
}


def test_a_start_finds_every_executable_in_a_folder_built_before_and_traces_nothing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))

    def run(verb, seed):
        command = [sys.executable, "-c", PROGRAM, verb, str(tmp_path), str(tmp_path / "built")]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return json.loads(done.stdout)

    executables, traced, hits, entries = run("build", "1")
    assert (traced, hits, entries) == (executables, 0, 0)
    again, traced, hits, entries = run("start", "2")
    assert (again, traced) == (executables, 0)
    assert entries >= executables
    assert hits >= executables
