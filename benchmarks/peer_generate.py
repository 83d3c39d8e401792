"""transformers' own `generate`, as a user would call it: compare.py's engine "generate". Needs torch and transformers.

Prints a "PEER {json}" line a batch: milliseconds a token, as the difference of a long and a short answer, greedy,
without an end, random weights.

    python benchmarks/peer_generate.py MODEL_DIRECTORY --batch 1 --ctx 1024
"""

# pyright: reportMissingImports=false, reportUnknownParameterType=false

from __future__ import annotations

import argparse
import json
import time

import torch
import transformers

SHORT, LONG, REPEATS = 16, 80, 3  # tokens of an answer; readings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--ctx", type=int, default=1024)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = transformers.AutoConfig.from_pretrained(options.model)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.set_default_dtype(torch.float32)

    def seconds(ids: torch.Tensor, tokens: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    for batch in map(int, options.batch.split(",")):
        ids = torch.randint(10, 10000, (batch, options.ctx), device="cuda")
        seconds(ids, LONG)  # warm: each length of keys is a shape that it meets for the first time
        steps = [1e3 * (seconds(ids, LONG) - seconds(ids, SHORT)) / (LONG - SHORT) for _ in range(REPEATS)]
        engine = f"transformers {transformers.__version__}"
        figure = {"engine": engine, "what": "decode", "batch": batch, "ctx": options.ctx, "all_ms": steps}
        print("PEER " + json.dumps(figure), flush=True)


if __name__ == "__main__":
    main()
