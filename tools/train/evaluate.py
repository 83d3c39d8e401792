"""Measure an exported model: held-out losses, and scores of greedy answers to held-out generated prompts.

In: an exported model directory, held-out rows, the standard library for the generators' words. Out: a JSON report
with figures by metric and by kind of task, example failures and sample completions. The model card is filled from
this report alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import Decoder, Params, abstract
from jaxllm.graph.weights.loader import load
from tools.train import corpus, decode
from tools.train import model as models
from tools.train import tokenizer as tokenizers
from tools.train.dataset import WEIGHT_UNIT, Rows
from tools.train.tasks import mixture
from tools.train.tasks.sample import Sample, render
from tools.train.tasks.words import Words

COMPLETIONS = (
    "def fibonacci(n):\n",
    "import os\n\ndef list_files(path):\n",
    "class Stack:\n    def __init__(self):\n",
    'def is_prime(n):\n    """Return True if n is prime."""\n',
    "import json\n\nwith open(path) as f:\n",
    "for i in range(",
)
CHATS = (
    "Hello!", "What can you do?", "What does enumerate() do?", "Sort these numbers: 42, 7, 19, 3",
    "Extract name, age and city as JSON: Maria is 34 years old and lives in Lisbon.",
    "Write a Python function named add with the arguments a and b that adds two numbers.",
    "Repeat after me: the quick brown fox jumps over the lazy dog",
    "What is 17 + 25?", "What is the capital of France?", "Reverse the word garden.",
)  # fmt: skip
_FIELDS = {
    "valid_json": ("extract", "extract_array", "extract_nested", "to_json"),
    "extraction_exact": ("extract", "extract_array", "extract_nested", "extract_value", "to_json"),
    "copy_exact": ("copy", "copy_code", "copy_line", "copy_part", "look_up", "needle"),
    "sort_exact": ("sort_words", "sort_numbers"),
    "arithmetic_exact": ("arithmetic", "word_problem", "sum"),
    "recall_exact": ("recall", "recall_turn", "passage"),
    "lists_exact": ("take", "dedupe", "filter", "filter_numbers", "rewrite_list", "edit", "nth"),
    "text_exact": ("case", "count", "reverse_words", "reverse_letters", "spell", "replace", "remove", "rewrite"),
    "tool_valid": ("tool_call", "tool_parallel"),
    "tool_exact": ("tool_call", "tool_parallel"),
    "tool_answer_exact": ("tool_answer", "tool_unneeded"),
    "chat_exact": ("chat", "explain", "how_to", "fact", "unknown"),
}


def parse_calls(text: str) -> list[dict[str, Any]] | None:
    """The calls of an answer, or None if anything in it is not a well-formed call."""
    calls: list[dict[str, Any]] = []
    rest = text.strip()
    while rest:
        if not rest.startswith("<tool_call>") or "</tool_call>" not in rest:
            return None
        body, rest = rest.removeprefix("<tool_call>").split("</tool_call>", 1)
        rest = rest.strip()
        try:
            call = json.loads(body)
        except ValueError:
            return None
        if not isinstance(call, dict) or set(call) != {"name", "arguments"} or not isinstance(call["arguments"], dict):
            return None
        calls.append(call)
    return calls or None


def fits_schema(call: dict[str, Any], tools: tuple[dict[str, Any], ...]) -> bool:
    """A function on offer, all required arguments, no others, each of its type."""
    types: dict[str, Any] = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}
    for tool in tools:
        function = tool["function"]
        if function["name"] == call["name"]:
            properties, given = function["parameters"]["properties"], call["arguments"]
            required = set(function["parameters"]["required"])
            return required <= set(given) <= set(properties) and all(
                isinstance(value, types[properties[name]["type"]]) and value in properties[name].get("enum", [value])
                for name, value in given.items()
            )
    return False


def judge(sample: Sample, answer: str) -> dict[str, bool]:
    """`exact`, and for JSON and tool calls also `valid`."""
    if sample.check == "json":
        try:
            parsed = json.loads(answer)
        except ValueError:
            return {"valid": False, "exact": False}
        return {"valid": True, "exact": parsed == json.loads(sample.answer)}
    if sample.check == "tool_calls":
        calls = parse_calls(answer)
        if calls is None:
            return {"valid": False, "exact": False}
        valid = all(fits_schema(call, sample.tools) for call in calls)
        return {"valid": valid, "exact": calls == parse_calls(sample.answer)}
    return {"exact": answer == sample.answer}


def held_out_losses(graphdef: nnx.GraphDef[Decoder], params: Params, data: Path, batch: int = 16) -> dict[str, float]:
    """Mean cross-entropy in nats per token: all tokens of unseen files, the answers of unseen conversations."""

    @jax.jit
    def total(params: Params, tokens: jax.Array, full: jax.Array) -> tuple[jax.Array, jax.Array]:
        ids = tokens.astype(jnp.int32)
        logits = models.forward(graphdef, params, ids[:, :-1])
        loss, _ = models.token_losses(logits, ids[:, 1:])
        return jnp.sum(loss * full.astype(jnp.float32)), jnp.sum(full)

    found: dict[str, float] = {}
    for name in ("code", "chat"):
        rows = Rows.load(data, f"{name}-held-out")
        loss = tokens = 0.0
        for begin in range(0, rows.tokens.shape[0] - batch + 1, batch):
            part = slice(begin, begin + batch)
            summed, count = total(params, rows.tokens[part], rows.weights[part] == WEIGHT_UNIT)
            loss, tokens = loss + float(summed), tokens + float(count)
        found[f"{name}_loss"] = round(loss / max(tokens, 1.0), 4)
        found[f"{name}_tokens"] = tokens
    return found


def agreement(directory: Path, target: Path, data: Path, batch: int = 16) -> dict[str, float]:
    """How often two models choose the same next token, in percent: what greedy speculation can accept at best."""
    sides = []
    for one in (directory, target):
        config = ModelConfig.from_directory(one)
        sides.append((abstract(config)[0], load(one, config)))

    @jax.jit
    def same(ours: Params, theirs: Params, tokens: jax.Array, full: jax.Array) -> tuple[jax.Array, jax.Array]:
        ids = tokens.astype(jnp.int32)[:, :-1]
        chosen = [jnp.argmax(models.forward(g, p, ids), axis=-1) for (g, _), p in zip(sides, (ours, theirs))]
        return jnp.sum((chosen[0] == chosen[1]) & full), jnp.sum(full)

    found: dict[str, float] = {}
    for name in ("code", "chat"):
        rows = Rows.load(data, f"{name}-held-out")
        equal = tokens = 0
        for begin in range(0, rows.tokens.shape[0] - batch + 1, batch):
            part = slice(begin, begin + batch)
            agreed, count = same(sides[0][1], sides[1][1], rows.tokens[part], rows.weights[part] == WEIGHT_UNIT)
            equal, tokens = equal + int(agreed), tokens + int(count)
        found[f"{name}_percent"] = round(100 * equal / max(tokens, 1), 1)
    return found


def score(
    answer: Callable[[list[str], int], list[str]], words: Words, *, count: int, max_new: int, max_prompt: int = 1400
) -> dict[str, Any]:
    """Greedy answers to `count` held-out samples, judged; figures by kind and by metric, and some failures."""
    drawn = [s for s in mixture.samples(words, stream="evaluation", shard=0, count=count) if s.check != "open"]
    prompts = [render(s.messages[:-1], s.tools, prompt=True) for s in drawn]
    kept = [(s, p) for s, p in zip(drawn, prompts) if len(p) < 2.5 * max_prompt and len(s.answer) < 2 * max_new]
    answers = answer([p for _, p in kept], max_new)
    by_kind: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    failures: dict[str, list[dict[str, str]]] = defaultdict(list)
    for (sample, prompt), text in zip(kept, answers):
        verdict = judge(sample, text)
        for name, good in verdict.items():
            by_kind[sample.kind][name].append(good)
        if not verdict["exact"] and len(failures[sample.kind]) < 3:
            failures[sample.kind].append({"prompt": prompt[-700:], "wanted": sample.answer, "got": text})
    metrics: dict[str, dict[str, float]] = {}
    for metric, kinds in _FIELDS.items():
        name = "valid" if "valid" in metric else "exact"
        judged = [good for kind in kinds for good in by_kind[kind][name]]
        metrics[metric] = {"percent": round(100 * sum(judged) / max(len(judged), 1), 1), "samples": len(judged)}
    every = [good for found in by_kind.values() for good in found["exact"]]
    metrics["all_exact"] = {"percent": round(100 * sum(every) / max(len(every), 1), 1), "samples": len(every)}
    kinds = {
        kind: {name: round(100 * sum(v) / len(v), 1) for name, v in found.items()} | {"samples": len(found["exact"])}
        for kind, found in sorted(by_kind.items())
        if found["exact"]
    }
    return {"metrics": metrics, "kinds": kinds, "failures": failures}


def evaluate(
    directory: Path, data: Path, source: Path | None, *, count: int = 3000, max_new: int = 320, batch: int = 128
) -> dict[str, Any]:
    """The whole report of one exported model."""
    began = time.monotonic()
    config = ModelConfig.from_directory(directory)
    graphdef, _ = abstract(config)
    params = load(directory, config)
    tokenizer = tokenizers.load(directory)

    def answer(prompts: list[str], max_new: int) -> list[str]:
        ids = [tokenizer.encode(prompt).ids for prompt in prompts]
        out = decode.generate(graphdef, params, ids, max_new=max_new, stops=config.eos_token_ids, batch=batch)
        return tokenizer.decode_batch(out, skip_special_tokens=False)

    words = Words.build(corpus.load(source, held_out=True), held_out=True)
    report: dict[str, Any] = {"held_out": held_out_losses(graphdef, params, data, min(batch, 16))}
    report |= score(answer, words, count=count, max_new=max_new)
    chats = [render([{"role": "user", "content": text}], prompt=True) for text in CHATS]
    report["chats"] = dict(zip(CHATS, answer(chats, max_new)))
    report["completions"] = dict(zip(COMPLETIONS, answer(list(COMPLETIONS), max_new)))
    report["seconds"] = round(time.monotonic() - began, 1)
    report["device"] = jax.devices()[0].device_kind
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stdlib", type=Path)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--max-new", type=int, default=320)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--target", type=Path, help="a larger model; report how often both choose the same token")
    parser.add_argument("--report", type=Path, required=True)
    given = parser.parse_args()
    report = evaluate(
        given.directory, given.data, given.stdlib, count=given.count, max_new=given.max_new, batch=given.batch
    )  # fmt: skip
    if given.target:
        report["agreement"] = agreement(given.directory, given.target, given.data, min(given.batch, 16))
        print("same next token as", given.target.name, report["agreement"])
    given.report.write_text(json.dumps(report, indent=1))
    shown = {name: value["percent"] for name, value in report["metrics"].items()}
    print(json.dumps(report["held_out"] | shown | {"seconds": report["seconds"]}))
    weak = {kind: found["exact"] for kind, found in report["kinds"].items() if found["exact"] < 90}
    print("below 90% exact:", json.dumps(weak))


if __name__ == "__main__":
    main()
