"""What LLM over replicas in processes costs its own process: tokens of engines that compute nothing, over real sockets.

    python -m benchmarks.fleet --replicas 4 --rows 256 --tokens 200 --rate 40 --out build/fleet.json

Each replica is a process that gives every row one token each 1/rate seconds, as many as its share of the machine lets
it; here is LLM.generate as it is, with the bundled model's tokenizer. CPU seconds of this process by token are the
figure: 1 over it is the most tokens per second that one process can take in, whatever the GPUs do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from jaxllm.config import load
from jaxllm.core import SamplingParams
from jaxllm.engine.process.fleet import FleetLink
from jaxllm.engine.process.links import ProcessLink
from jaxllm.engine.process.remote import RemoteEngine
from jaxllm.llm import LLM
from jaxllm.tools.figures import machine

FAKE = Path(__file__).with_name("front.py")
TEXTS = {"text at the end": {}, "no text": {"detokenize": False}, "stop strings": {"stop": ["nothing says this"]}}


def measure(llm: LLM, given: argparse.Namespace, **params: object) -> dict[str, float]:
    """Submitting apart from listening: the first costs by request and prompt, the second by token."""
    count = given.replicas * given.rows
    prompts = [[100 + (i * 7 + k) % 5000 for k in range(given.prompt)] for i in range(count)]
    wanted = SamplingParams(max_tokens=given.tokens, ignore_eos=True, seed=0, **params)  # type: ignore[arg-type]
    began = time.process_time(), time.perf_counter()
    llm.generate(prompts, wanted.replace(max_tokens=1), use_tqdm=False)
    submitted = time.process_time() - began[0]
    began = time.process_time(), time.perf_counter()
    outputs = llm.generate(prompts, wanted, use_tqdm=False)
    cpu_s, wall_s = time.process_time() - began[0], time.perf_counter() - began[1]
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "us_a_token": round((cpu_s - submitted) / (tokens - count) * 1e6, 2),
        "us_a_request": round(submitted / count * 1e6, 1),
        "tokens_per_s": round(tokens / wall_s),
        "share_of_a_core": round(cpu_s / wall_s, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("replicas", 4), ("rows", 256), ("tokens", 200), ("prompt", 550), ("rate", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    told = json.dumps({"base_s": time.monotonic(), "vocab_size": 8000}).encode()
    command = [sys.executable, str(FAKE), "engine", str(given.rate)]
    engine = RemoteEngine(FleetLink([ProcessLink(command, told) for _ in range(given.replicas)]), load(model=None))
    llm = LLM(engine=engine)
    about = {**machine("none"), **{name: value for name, value in vars(given).items() if name != "out"}}
    found = {name: measure(llm, given, **params) for name, params in TEXTS.items()}
    engine.close()
    print(json.dumps(about | found, indent=1))
    if given.out is not None:
        given.out.write_text(json.dumps(about | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
