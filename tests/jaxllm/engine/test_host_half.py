"""The host half of the engine, and everything its tests rely on, runs in a process without JAX."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

PROGRAM = """
import sys
sys.path.insert(0, "tests")
import jaxllm.engine.cache.hashed, jaxllm.engine.cache.pages, jaxllm.engine.cache.prefix
import jaxllm.engine.decoding.mask, jaxllm.engine.metrics, jaxllm.engine.policy, jaxllm.engine.scheduler
from helpers.fake_runner import Host, expected_tokens
from helpers.requests import request
host = Host()
sequence, = host.add(request(prompt=(5, 6)))
host.run()
assert sequence.output_token_ids == expected_tokens((5, 6), 4)
print(sorted(name for name in sys.modules if name.split(".")[0] in ("jax", "jaxlib", "flax", "torch")))
"""


def test_scheduling_runs_in_a_process_that_never_imports_jax():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
