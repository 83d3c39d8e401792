"""What requests to 8B take at least on a card at its power limit: sums of what was measured alone.

In: bytes and products a second that programs without any engine reach for seconds (`copies power`: random numbers
copied; `launches` built with JAXLLM_BESIDE: a prompt's products, and that two streams at one time give nothing). Out:
tokens a second of the 256 requests of `jaxllm bench throughput`, and of a closed loop of equal requests, if a step's
products took the longer of reading their weights and multiplying, and its attention reading keys and values; of every
decode step beside. No schedule, padding, launch, sampler, head of a prompt or attention within prompts is counted.

    python -m benchmarks.floors [--bandwidth 4.29] [--products 650]
"""

from __future__ import annotations

import argparse

from jaxllm.tools.bench import WORKLOAD_REQUESTS, WORKLOAD_TOKENS, workload

LAYERS, HEAD = 32 * (4096 * (6144 + 4096 + 3 * 14336)), 4096 * 128256  # numbers of the weights that multiply
KV_BYTES = 32 * 2 * 8 * 128 * 2  # of a token


def decode_s(rows: int, tokens: int, bandwidth: float, products: float) -> float:
    """Of a step of so many rows that hold so many tokens."""
    weights = LAYERS + HEAD
    return max(2 * weights / bandwidth, 2 * weights * rows / products) + tokens * KV_BYTES / bandwidth


def main() -> None:
    """Prints both, and what each bar asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bandwidth", type=float, default=4.29, help="TB/s")
    parser.add_argument("--products", type=float, default=650.0, help="TFLOP/s")
    options = parser.parse_args()
    rates = options.bandwidth * 1e12, options.products * 1e12
    for rows in (32, 128, 256):
        print(f"decode step of {rows} rows at 1,152 tokens: {1e3 * decode_s(rows, rows * 1152, *rates):.2f} ms")
    prompts, answers = workload(WORKLOAD_REQUESTS, WORKLOAD_TOKENS, highest=1000)
    show("256 requests", [(len(prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)], rates)
    for streams in (64, 256):
        show(f"{streams} streams of 1,024 in and out", [(1024, 1024)] * streams, rates)


def show(name: str, lengths: list[tuple[int, int]], rates: tuple[float, float]) -> None:
    """All prompts, then all answers side by side: each prompt and answer is computed once in any order."""
    prompts = 2 * LAYERS * sum(prompt for prompt, _ in lengths) / rates[1]
    answers = 0.0
    for step in range(1, max(answer for _, answer in lengths)):
        alive = [prompt + step for prompt, answer in lengths if answer > step]
        answers += decode_s(len(alive), sum(alive), *rates)
    tokens = sum(answer for _, answer in lengths)
    print(
        f"{name}: prompts {prompts:.2f} s + answers {answers:.2f} s, at most {tokens / (prompts + answers):,.0f} tok/s"
    )


if __name__ == "__main__":
    main()
