"""Write a trained run as a Hugging Face directory: weights in bf16, configs, tokenizer, and a model card.

In: a run's checkpoint, its summary, and the evaluation's report. Out: config.json, generation_config.json,
model.safetensors (or parts of it, for a narrow way home, and the join that makes them one again), README.md.
Every number in the card comes from the summary and the report.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.weights.names import to_checkpoint
from tools.train import corpus
from tools.train import model as models
from tools.train import train as training

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def hf_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": "bfloat16",
        "eos_token_id": list(config.eos_token_ids),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.d_model,
        "initializer_range": 0.02,
        "intermediate_size": config.d_ff,
        "layer_types": ["full_attention"] * config.num_layers,
        "max_position_embeddings": config.context_length,
        "model_type": "qwen3",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": config.eos_token_ids[-1],
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": config.rope.theta, "rope_type": "default"},
        "rope_theta": config.rope.theta,
        "sliding_window": None,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def export(run: Path, target: Path, tokenizer: Path) -> Path:
    """The newest checkpoint of a run as a model directory."""
    note = json.loads((run / "run.json").read_text())
    settings = training.TrainConfig(**note["config"])
    config = models.CONFIGS[settings.model]
    _, state = training.start(settings)
    state, _ = training.restore(state, run)
    tensors = {
        name: np.ascontiguousarray(np.asarray(array))
        for name, array in to_checkpoint(models.narrow(state["params"]), config).items()
    }
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n")
    generation = {
        "do_sample": False,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.eos_token_ids[-1],
    }
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (tokenizer / name).resolve() != (target / name).resolve():
            shutil.copy(tokenizer / name, target / name)
    return target


def split(file: Path, target: Path, part_bytes: int) -> list[Path]:
    """The file in parts named `<name>.part-00` and so on, each small enough to carry."""
    data = file.read_bytes()
    parts = []
    for number, begin in enumerate(range(0, len(data), part_bytes)):
        part = target / f"{file.name}.part-{number:02d}"
        part.write_bytes(data[begin : begin + part_bytes])
        parts.append(part)
    return parts


def join(directory: Path, name: str, target: Path) -> Path:
    """The file whose parts lie in `directory`."""
    parts = sorted(directory.glob(f"{name}.part-*"))
    if not parts:
        raise FileNotFoundError(f"{directory}: no {name}.part-*")
    target.write_bytes(b"".join(part.read_bytes() for part in parts))
    return target


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


def card(summary: dict[str, Any], report: dict[str, Any]) -> str:
    """The model card in Markdown."""
    config, name = models.CONFIGS[summary["config"]["model"]], summary["config"]["model"]
    used = summary["config"]
    scores = [("score", "percent", "held-out prompts")]
    scores += [(k.replace("_", " "), f"{v['percent']:.1f}", str(v["samples"])) for k, v in report["metrics"].items()]
    kinds = [("kind of task", "exact %", "valid %", "prompts")]
    kinds += [
        (kind, f"{found['exact']:.1f}", f"{found['valid']:.1f}" if "valid" in found else "", str(found["samples"]))
        for kind, found in report["kinds"].items()
    ]
    held = report["held_out"]
    distilled = f", distilled from {summary['teacher']} (weight {used['distill']})" if summary.get("teacher") else ""
    quoted = "\n\n".join(f"```python\n{prompt}{text}\n```" for prompt, text in list(report["completions"].items())[:3])
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A language model of {summary["parameters"] / 1e6:.1f}M parameters for demos and tests of jaxllm: Qwen3 architecture,
{config.num_layers} layers of width {config.d_model}, {config.num_heads} query and {config.num_kv_heads} key-value heads of
{config.head_dim}, feed-forward {config.d_ff}, tied embeddings, {config.vocab_size} tokens, context {config.context_length}.
It copies, edits and sorts, extracts JSON, calls tools and completes Python. It knows almost nothing about the world.

## Data
- Source and docstrings of Python's standard library ({corpus.LICENCE}); {corpus.HELD_OUT_PERCENT}% of the files,
  chosen by the hash of their path, are held out. {summary["code_rows"]} rows.
- Conversations made by the generators in `tools/train/tasks`, each from its own seed, in ChatML with tools in the
  Hermes layout; prompts from held-out seeds and words are never trained on. {summary["chat_rows"]} rows.

No other text was used. The weights are under the repository's licence.

## Training
{summary["steps"]} steps of {used["batch"]} rows, {summary["tokens"] / 1e6:.0f}M tokens ({100 * used["code_share"]:.0f}% code),
{summary["minutes"]:.1f} minutes on one {summary["device"]}{distilled}. AdamW, peak rate {used["peak_rate"]}, weight decay
{used["weight_decay"]}, linear decay; bf16 arithmetic over f32 weights. Answers weigh 16 times what prompts weigh.
Made by `tools/train` (`run_h200.sh`).

## Held-out loss
{held["code_loss"]:.3f} nats a token on unseen source files ({held["code_tokens"]:.0f} tokens), {held["chat_loss"]:.3f} on the
answers of unseen conversations ({held["chat_tokens"]:.0f} tokens).

## Scores
Greedy answers to prompts from held-out seeds, judged whole: `exact` is the very text (for JSON and tool calls, the very
value), `valid` is well-formed JSON, or a call that fits the schema on offer.

{_table(scores)}

{_table(kinds)}

## Completions
Greedy, not chosen:

{quoted}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("export", help="a run's checkpoint to a model directory")
    one.add_argument("run", type=Path)
    one.add_argument("target", type=Path)
    one.add_argument("--tokenizer", type=Path, required=True)
    two = verbs.add_parser("split", help="a file in parts")
    two.add_argument("file", type=Path)
    two.add_argument("target", type=Path)
    two.add_argument("--split-bytes", type=int, default=15 << 20)
    three = verbs.add_parser("join", help="parts to a file")
    three.add_argument("directory", type=Path)
    three.add_argument("name")
    three.add_argument("target", type=Path)
    four = verbs.add_parser("card", help="the model card from a summary and a report")
    four.add_argument("target", type=Path)
    four.add_argument("--summary", type=Path, required=True)
    four.add_argument("--report", type=Path, required=True)
    given = parser.parse_args()
    if given.verb == "export":
        print(export(given.run, given.target, given.tokenizer))
    elif given.verb == "split":
        print(*split(given.file, given.target, given.split_bytes))
    elif given.verb == "join":
        print(join(given.directory, given.name, given.target))
    else:
        summary, report = json.loads(given.summary.read_text()), json.loads(given.report.read_text())
        (given.target / "README.md").write_text(card(summary, report))


if __name__ == "__main__":
    main()
