"""A ModelConfig as the roofline sees it: dimensions, and what a served step of it costs. No JAX here."""

from __future__ import annotations

from collections import Counter

from jaxllm.graph.models.config import ModelConfig
from pallas_kernels.roofline import BF16_BYTES, WEIGHT_BYTES, Experts, ModelDims, StepCost


def dims_of(model: ModelConfig) -> ModelDims:
    """Of an odd mix of shared and routed experts the shared one is rounded."""
    experts = model.experts and Experts(
        E=model.experts.count,
        k=model.experts.per_token,
        F=model.experts.d_ff,
        shared=round(model.experts.shared_d_ff / model.experts.d_ff),
        dense_layers=sum(not sparse for sparse in model.sparse_layers),
    )
    return ModelDims(
        L=model.num_layers,
        D=model.d_model,
        N=model.num_heads,
        K=model.num_kv_heads,
        H=model.head_dim,
        F=model.d_ff,
        V=model.vocab_size,
        tied=model.tie_embeddings,
        experts=experts,
    )


def step_cost(model: ModelConfig, quantization: str, group: int, itemsize: int) -> StepCost:
    """`quantization` and `group` as the configuration names them; what is not quantised has `itemsize` bytes.

    Of a checkpoint that is quantised already the head is not; of plain weights quantised here it is, unless tied.
    """
    kind, head = quantization, float(itemsize)
    if model.stored is not None:
        kind, group = ("fp8", 0) if model.stored.method == "fp8" else ("int4", model.stored.group)
    elif kind != "none" and not model.tie_embeddings:
        head = 1.0  # with int4 too
    linear = float(itemsize) if kind == "none" else 0.5 + BF16_BYTES / group if kind == "int4" else WEIGHT_BYTES[kind]
    windows = tuple(Counter(model.windows).items())
    return StepCost(dims_of(model), windows, linear_bytes=linear, head_bytes=head, kv_bytes=itemsize)
