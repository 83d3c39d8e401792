"""Make tests/goldens: tiny checkpoints of every family with the logits Hugging Face transformers gives for them.

    python tools/make_goldens.py [name ...]     # needs torch (CPU) and transformers, which nothing else here does

Out, for each golden: a Hugging Face directory (config.json, model.safetensors) and golden.npz with the prompt, the f32
logits at all its positions, 20 greedily decoded tokens and the logits that follow each. Weights come from numpy's
PCG64, so another torch writes the same checkpoints; they are stored as f16 to stay small, and the logits are those of
f32 arithmetic on exactly the stored values. They are larger than a fresh model's: attention must be peaked and logits
spread for a wrong rope, window or bias to show far above the tolerance.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

GOLDENS = Path(__file__).parent.parent / "tests" / "goldens"
PROMPT_TOKENS, DECODE_STEPS = 48, 20
MIN_GAP = 0.01  # between the best two logits of every decode step, so that greedy has one answer

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
NEW = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "dtype": "float16"}  # transformers 5
OLD = {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float16"}  # transformers 4


def llama(**changes: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **BASE, **changes}


def qwen2(**changes: Any) -> dict[str, Any]:
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **BASE, **changes}


def qwen3(**changes: Any) -> dict[str, Any]:
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **BASE, "head_dim": 16, **changes}


def mistral(**changes: Any) -> dict[str, Any]:
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **BASE, **changes}


def mixtral(**changes: Any) -> dict[str, Any]:
    return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **BASE, "num_local_experts": 4, **changes}


def qwen2_moe(**changes: Any) -> dict[str, Any]:
    own = {"shared_expert_intermediate_size": 40, **QWEN_MOE}
    return {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", **BASE, **own, **changes}


def qwen3_moe(**changes: Any) -> dict[str, Any]:
    own = {"head_dim": 16, **QWEN_MOE}
    return {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **BASE, **own, **changes}


def scaled(kind: str, theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": kind, **parameters}, "dtype": "float16"}


WIDE = {"head_dim": 16}  # four heads of 16 over a model of 32
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": llama(**OLD),
    "llama-mqa-tied": llama(num_key_value_heads=1, tie_word_embeddings=True, **NEW),
    "llama-wide-heads-biases": llama(attention_bias=True, mlp_bias=True, **WIDE, **NEW),
    "llama-linear": llama(**{**OLD, "rope_scaling": {"type": "linear", "factor": 2.5}}),
    "llama-llama3": llama(**WIDE, **scaled("llama3", **LLAMA3)),
    "llama-yarn": llama(**WIDE, **scaled("yarn", **YARN)),
    "llama-yarn-mscale": llama(
        **WIDE,
        **scaled("yarn", **YARN, beta_fast=4.0, beta_slow=0.5, mscale=0.9, mscale_all_dim=0.5, truncate=False),
    ),
    "qwen2-tied": qwen2(tie_word_embeddings=True, **NEW),
    "qwen2-windows": qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=1, **OLD),
    "qwen2-yarn": qwen2(**{**OLD, "rope_scaling": {"type": "yarn", "attention_factor": 1.3, **YARN}}),
    "qwen3": qwen3(tie_word_embeddings=True, **scaled("default", 1000000.0)),
    "qwen3-layer-types": qwen3(
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        attention_bias=True,
        **NEW,
    ),
    "mistral-window": mistral(sliding_window=12, **OLD),
    "mixtral": mixtral(num_experts_per_tok=2, **OLD),
    "mixtral-window": mixtral(sliding_window=12, num_experts_per_tok=1, **NEW),
    "qwen2-moe": qwen2_moe(**OLD),
    "qwen2-moe-windows": qwen2_moe(
        use_sliding_window=True, sliding_window=8, max_window_layers=2, norm_topk_prob=True, qkv_bias=False, **NEW
    ),
    "qwen2-moe-every-second": qwen2_moe(decoder_sparse_step=2, **NEW),
    "qwen3-moe": qwen3_moe(norm_topk_prob=True, **NEW),
    "qwen3-moe-dense-first-window": qwen3_moe(
        mlp_only_layers=[0], use_sliding_window=True, sliding_window=10, attention_bias=True, **OLD
    ),
    "mistral-wide-heads": mistral(sliding_window=None, hidden_size=48, num_attention_heads=2, **WIDE, **NEW),
}


def random_weights(model: Any, seed: int) -> dict[str, np.ndarray]:
    """Matrices of gain 2 (attention and logits spread), norms around one, biases of half a unit."""
    random = np.random.Generator(np.random.PCG64(seed))
    weights = {}
    for name, parameter in sorted(model.named_parameters()):
        shape = tuple(parameter.shape)
        normal = random.standard_normal(shape, dtype=np.float32)
        if name.endswith("norm.weight"):
            value = 1 + 0.2 * normal
        elif name.endswith("bias"):
            value = 0.5 * normal
        elif name.endswith("embed_tokens.weight"):
            value = normal
        else:
            value = 2 / np.sqrt(shape[-1], dtype=np.float32) * normal
        weights[name] = value.astype(np.float16)
    return weights


def as_published(weights: dict[str, np.ndarray], model_type: str) -> dict[str, np.ndarray]:
    """Each expert's matrices apart, under the names published checkpoints have; transformers 5 holds them merged."""
    names = ("w1", "w3", "w2") if model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    out = {}
    for name, value in weights.items():
        if model_type == "mixtral":
            name = name.replace(".mlp.", ".block_sparse_moe.")
        prefix, experts, kind = name.partition(".experts.")
        if not experts:
            out[name] = value
            continue
        for expert, matrix in enumerate(value):
            parts = np.split(matrix, 2) if kind == "gate_up_proj" else [matrix]
            for own, part in zip(names[:2] if kind == "gate_up_proj" else names[2:], parts, strict=True):
                out[f"{prefix}.experts.{expert}.{own}.weight"] = part.copy()
    return out


@torch.no_grad()
def greedy(model: Any, prompt: np.ndarray) -> dict[str, np.ndarray]:
    """Prefill at once, then decode through transformers' own cache."""
    cache = transformers.DynamicCache(config=model.config)
    out = model(input_ids=torch.from_numpy(prompt)[None], past_key_values=cache, use_cache=True)
    prefill = out.logits[0].numpy()
    tokens, steps = [int(prefill[-1].argmax())], []
    for _ in range(DECODE_STEPS):
        out = model(input_ids=torch.tensor([[tokens[-1]]]), past_key_values=cache, use_cache=True)
        steps.append(out.logits[0, 0].numpy())
        tokens.append(int(steps[-1].argmax()))
    return {
        "prompt": prompt.astype(np.int32),
        "prefill_logits": prefill,
        "tokens": np.array(tokens, np.int32),  # tokens[i] is decoded, then followed by decode_logits[i]
        "decode_logits": np.stack(steps),
    }


def top_gap(golden: dict[str, np.ndarray]) -> float:
    best = np.sort(np.concatenate([golden["prefill_logits"][-1:], golden["decode_logits"]]), axis=-1)
    return float((best[:, -1] - best[:, -2]).min())


def make(name: str) -> None:
    directory = GOLDENS / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIGS[name], indent=1) + "\n")
    config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for attempt in range(100):
        seed = zlib.crc32(name.encode()) + attempt
        weights = random_weights(model, seed)
        model.load_state_dict({key: torch.from_numpy(value).float() for key, value in weights.items()}, strict=False)
        model.tie_weights()
        prompt = np.random.Generator(np.random.PCG64(seed + 1)).integers(3, config.vocab_size, PROMPT_TOKENS)
        golden = greedy(model, prompt)
        if top_gap(golden) > MIN_GAP:
            break
    else:
        raise SystemExit(f"{name}: no seed keeps the best two logits apart")
    weights = as_published(weights, CONFIGS[name]["model_type"])
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    check(directory, golden)
    np.savez_compressed(directory / "golden.npz", allow_pickle=False, **golden)
    size = sum(file.stat().st_size for file in directory.iterdir())
    spread = golden["prefill_logits"].std()
    print(f"{name}: seed {seed}, logits of std {spread:.2f}, gap {top_gap(golden):.3f}, {size / 1000:.0f} kB")


@torch.no_grad()
def check(directory: Path, golden: dict[str, np.ndarray]) -> None:
    """What transformers loads back from the directory, run without a cache, gives the same logits."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    ids = torch.from_numpy(np.concatenate([golden["prompt"], golden["tokens"][:-1]]).astype(np.int64))[None]
    whole = model.eval()(input_ids=ids, use_cache=False).logits[0].numpy()
    stepped = np.concatenate([golden["prefill_logits"], golden["decode_logits"]])
    assert np.abs(whole - stepped).max() < 1e-4, np.abs(whole - stepped).max()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for golden_name in sys.argv[1:] or CONFIGS:
        make(golden_name)
