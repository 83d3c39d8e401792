"""What quantised weights and fp8 pages cost in quality: perplexity on held-out text and KL against the plain model.

In: a model directory (the bundled model unless named) and the standard library's held-out files, which its training
never read (by the hash of their paths: tools/train/corpus.py). Out: a line a scheme on the terminal, quality.json and
quality.md in --out. Every scheme sees the same tokens; KL is of next-token distributions, plain to quantised, in nats a
token; "top 1" is how often both choose the same token; "fp8 KV" has plain weights, and keys and values rounded as pages
with kv_dtype = "fp8" hold them. Runs on a CPU in f32, so that only the weights (and fp8's
activations) are rounded.

    python -m benchmarks.quality --out benchmarks/results/quality [--model DIR] [--windows 24]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import model_directory
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import Params, abstract, merge
from jaxllm.graph.quant.leaf import QuantisedWeight
from jaxllm.graph.quant.scheme import PLAIN, Scheme
from jaxllm.graph.weights.loader import load
from jaxllm.tokenizer import Tokenizer
from pallas_kernels.page_write.reference import as_stored
from pallas_kernels.rope_page_write.heads import Heads
from pallas_kernels.rope_page_write.reference import separated
from tools.train import corpus
from tools.train.model import causal_attention

WINDOW = 512
SCHEMES = {
    "plain": PLAIN,
    "int8": Scheme("int8"),
    "fp8": Scheme("fp8"),
    "int4 g32": Scheme("int4", 32),
    "int4 g64": Scheme("int4", 64),
    "int4 g128": Scheme("int4", 128),
}
NARROW = "fp8 KV"


@dataclass(frozen=True)
class Row:
    scheme: str
    perplexity: float
    kl: float  # nats a token
    top_1: float  # share of tokens
    matrix_bytes: int  # of the quantised leaves


def held_out(tokenizer: Tokenizer, windows: int) -> np.ndarray:
    """i32[windows, WINDOW + 1]: the first whole windows of each held-out file, in the files' order."""
    rows: list[list[int]] = []
    for text in corpus.load(held_out=True).files.values():
        ids = tokenizer.encode(text[: 8 * WINDOW], add_special_tokens=False)
        if len(ids) > WINDOW:
            rows.append(list(ids[: WINDOW + 1]))
        if len(rows) == windows:
            break
    return np.array(rows, np.int32)


def log_probabilities(config: ModelConfig, params: Params, ids: jax.Array, narrow: bool = False) -> jax.Array:
    """f32[T, V] of one window; `narrow`: with keys and values as fp8 pages hold them."""
    ones = jnp.ones((config.num_kv_heads,), jnp.float32)
    graphdef, _ = abstract(config, jnp.float32)
    model = merge(graphdef, params)
    positions = jnp.arange(ids.shape[0], dtype=jnp.int32)[None]

    def attend(layer: int, heads: Heads) -> jax.Array:
        del layer
        q, k, v = separated(heads)
        if narrow:
            k, v = (as_stored(each, ones, jnp.float8_e4m3fn).astype(each.dtype) for each in (k, v))
        return causal_attention(config, q, k, v)

    return jax.nn.log_softmax(model.logits(model(ids[None], positions, attend))[0])


def measure(config: ModelConfig, directory: Path, windows: np.ndarray) -> list[Row]:
    run = jax.jit(lambda params, ids: log_probabilities(config, params, ids))
    run_narrow = jax.jit(lambda params, ids: log_probabilities(config, params, ids, narrow=True))
    plain = load(directory, config, jnp.float32)
    expected = [np.asarray(run(plain, window[:-1])) for window in windows]
    rows = []
    for name, scheme in (SCHEMES | {NARROW: PLAIN}).items():
        start = time.perf_counter()
        scheme.check(config)
        params = load(directory, config, jnp.float32, scheme=scheme)
        loss = kl = same = 0.0
        for window, sure in zip(windows, expected, strict=True):
            got = np.asarray((run_narrow if name == NARROW else run)(params, window[:-1]))
            loss -= float(np.take_along_axis(got, window[1:, None], axis=1).sum())
            kl += float((np.exp(sure) * (sure - got)).sum())
            same += float((got.argmax(axis=1) == sure.argmax(axis=1)).sum())
        tokens = windows.shape[0] * WINDOW
        leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantisedWeight))
        size = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, QuantisedWeight))
        rows.append(Row(name, math.exp(loss / tokens), kl / tokens, same / tokens, size))
        print(f"{rows[-1]} ({time.perf_counter() - start:.0f} s)", flush=True)
    return rows


def write(out: Path, model: str, tokens: int, rows: list[Row]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {"model": model, "tokens": tokens, "rows": [asdict(row) for row in rows]}
    (out / "quality.json").write_text(json.dumps(data, indent=1) + "\n")
    lines = [
        f"`python -m benchmarks.quality`: {model}, {tokens:,} held-out tokens, f32 on a CPU.",
        "",
        "| weights, or pages | perplexity | KL, nats a token | same top token | bytes of the matrices |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {r.scheme} | {r.perplexity:.3f} | {r.kl:.4f} | {r.top_1:.1%} | {r.matrix_bytes or '':,} |"
            if r.matrix_bytes
            else f"| {r.scheme} | {r.perplexity:.3f} | {r.kl:.4f} | {r.top_1:.1%} | |"
            for r in rows
        ),
    ]
    (out / "quality.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="first-light")
    parser.add_argument("--windows", type=int, default=24)
    options = parser.parse_args()
    directory = model_directory(options.model)
    config = ModelConfig.from_directory(directory)
    windows = held_out(Tokenizer.from_directory(directory), options.windows)
    rows = measure(config, directory, windows)
    write(options.out, directory.name, windows.shape[0] * WINDOW, rows)


if __name__ == "__main__":
    main()
