"""What tokenizing a prompt costs the server's other threads: its time, and the longest that another thread stood still.

In: nothing; the bundled model's tokenizer. Out: a JSON line for each call of the tokenizers package and each length.
`encode` keeps the interpreter's lock, `encode_batch_fast` of one text gives it back (what jaxllm.tokenizer calls).

    python -m benchmarks.tokenizing
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable

from jaxllm.config import BUNDLED_MODEL, model_directory
from jaxllm.tokenizer import Tokenizer

PROMPTS = {"1k tokens": 1024, "500k tokens": 512_000}
REPEATS = 5
EVERY_S = 0.0005  # how often the other thread wants to run


def measured(encode: Callable[[str], list[int]], text: str) -> tuple[float, float]:
    """Seconds of the call, and the longest gap of a thread beside it."""
    last, longest, stop = time.perf_counter(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal last, longest
        while not stop.is_set():
            time.sleep(EVERY_S)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    thread = threading.Thread(target=watch)
    thread.start()
    time.sleep(0.01)
    longest, began = 0.0, time.perf_counter()
    encode(text)
    took = time.perf_counter() - began
    stop.set()
    thread.join()
    return took, longest


def main() -> None:
    tokenizer = Tokenizer.from_directory(model_directory(BUNDLED_MODEL))
    rust, source = tokenizer.rust, random.Random(0)
    calls: dict[str, Callable[[str], list[int]]] = {
        "encode": lambda text: rust.encode(text, add_special_tokens=False).ids,
        "encode_batch_fast": lambda text: rust.encode_batch_fast([text], add_special_tokens=False)[0].ids,
    }
    for name, count in PROMPTS.items():
        text = tokenizer.decode([source.randrange(300, tokenizer.vocab_size - 300) for _ in range(count)])
        for call, encode in calls.items():
            times, gaps = zip(*(measured(encode, text) for _ in range(REPEATS)), strict=True)
            row = {"prompt": name, "megabytes": round(len(text.encode()) / 1e6, 4), "call": call}
            ms = {"ms": sorted(times)[REPEATS // 2] * 1e3, "longest_gap_ms": sorted(gaps)[REPEATS // 2] * 1e3}
            print(json.dumps(row | {key: round(value, 2) for key, value in ms.items()}), flush=True)


if __name__ == "__main__":
    main()
