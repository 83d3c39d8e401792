"""Greedy token ids of the bundled model on this machine's CPU in f32: what every other device must give too.

python tools/make_greedy_golden.py    writes tests/goldens/bundled_greedy.json
"""

from __future__ import annotations

import json
from pathlib import Path

GOLDEN = Path(__file__).parent.parent / "tests" / "goldens" / "bundled_greedy.json"
PROMPTS = (
    "def factorial(n):\n",
    "import os\n\n\ndef walk(path):\n    ",
    "class Stack:\n    def __init__(self):\n",
    "<|im_start|>user\nSort these numbers: 42, 7, 19, 3, 88<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhat does the len function do?<|im_end|>\n<|im_start|>assistant\n",
    "import json\n\n\ndef load(path):\n",
)
MAX_TOKENS = 64


def main() -> None:
    from jaxllm.core import SamplingParams
    from jaxllm.llm import LLM

    llm = LLM(dtype="float32")
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    outputs = llm.generate(list(PROMPTS), params, use_tqdm=False)
    rows = [{"prompt": p, "token_ids": o.outputs[0].token_ids} for p, o in zip(PROMPTS, outputs, strict=True)]
    GOLDEN.write_text(json.dumps({"dtype": "float32", "max_tokens": MAX_TOKENS, "rows": rows}, indent=1) + "\n")
    for output in outputs:
        print(repr(output.outputs[0].text))


if __name__ == "__main__":
    main()
