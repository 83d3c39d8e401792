"""Physical floors: bytes and FLOPs of each op from its shapes, and of whole steps from a model's dimensions.

In: shapes, a model's dimensions, a device's ceilings. Out: work (bytes, FLOPs) and the least time it can take. Used by
benchmarks, planner and tests; nothing here is a measurement, and no JAX is imported.

A floor is the sum over operators of max(bytes / bandwidth, FLOPs / peak): operators run one after another, every weight
and every cached key and value is read once, activations and launches cost nothing. MoE: the expected number of distinct
experts under uniform routing, E (1 - (1 - k/E)^B). Quantised weights: linear layers only (head, router and norms stay
bf16); int4 has one bf16 scale per 128 weights. Tensor parallelism divides weights, KV and FLOPs; the time of its
all-reduces (two a layer) is reported apart.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

BF16_BYTES = 2
WEIGHT_BYTES = {"bf16": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5 + BF16_BYTES / 128}
USABLE_MEMORY = 0.92  # of the device's, for weights and KV


@dataclass(frozen=True)
class Ceilings:
    """What one device can do at most."""

    name: str
    bytes_per_s: float
    bf16_flops_per_s: float
    fp8_flops_per_s: float
    memory_bytes: int
    link_bytes_per_s: float  # to its peers, one direction
    link_latency_s: float  # of one small all-reduce
    source: str


H200 = Ceilings(
    name="NVIDIA H200",
    bytes_per_s=4.3e12,
    bf16_flops_per_s=790e12,
    fp8_flops_per_s=1450e12,
    memory_bytes=143771 * 2**20,
    link_bytes_per_s=450e9,
    link_latency_s=5e-6,
    source="bandwidth and bf16 measured on one H200 (large reads, large matmuls); fp8 assumed, about what DeepGEMM "
    "reports on an H800; link bandwidth from the datasheet, latency what a peer-to-peer kernel should need",
)
H200_DATASHEET = Ceilings(
    name="NVIDIA H200 (datasheet)",
    bytes_per_s=4.8e12,
    bf16_flops_per_s=989e12,
    fp8_flops_per_s=1979e12,
    memory_bytes=143771 * 2**20,
    link_bytes_per_s=450e9,
    link_latency_s=5e-6,
    source="NVIDIA H200 datasheet, dense figures",
)
H200_FOR_SECONDS = replace(
    H200,
    name="NVIDIA H200 at its power limit",
    bytes_per_s=4.29e12,
    bf16_flops_per_s=650e12,
    source="random numbers copied, a prompt's products multiplied, each for seconds within 700 W of an H200 "
    "(benchmarks/results/power_h200); the rest as above",
)


@dataclass(frozen=True)
class Peak:
    """A device's datasheet, dense figures: what MFU and MBU are shares of."""

    bf16_flops_per_s: float
    bytes_per_s: float


@functools.cache
def _peaks() -> dict[str, Peak]:
    raw = tomllib.loads((Path(__file__).parent / "peaks.toml").read_text("utf-8"))
    return {name: Peak(**figures) for name, figures in raw.items()}


def peak_of(device_kind: str) -> Peak | None:
    """By the device's name as JAX gives it; None for one whose datasheet is not in peaks.toml, such as a CPU."""
    return _peaks().get(device_kind)


@dataclass(frozen=True)
class Work:
    """What an operator must move and compute."""

    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def floor_s(self, device: Ceilings, *, fp8: bool = False, devices: int = 1) -> float:
        peak = device.fp8_flops_per_s if fp8 else device.bf16_flops_per_s
        return max(self.bytes / device.bytes_per_s, self.flops / peak) / devices


def visible(rows: Iterable[tuple[int, int]], window: int | None = None) -> tuple[int, int, int]:
    """(keys read, query and key pairs, queries) of rows of (queries, keys), queries being the last of the keys."""
    keys_read = pairs = queries_seen = 0
    for queries, keys in rows:
        if queries == 0:
            continue
        first = keys - queries  # position of the row's first query
        keys_read += keys if window is None else min(keys, queries + window - 1)
        if window is None:
            pairs += (first + 1 + keys) * queries // 2
        else:
            growing = min(max(window - first, 0), queries)  # queries that still see every key before them
            pairs += (first + 1 + first + growing) * growing // 2 + (queries - growing) * window
        queries_seen += queries
    return keys_read, pairs, queries_seen


def paged_attention(
    rows: Iterable[tuple[int, int]],
    *,
    N: int,
    K: int,
    H: int,
    window: int | None = None,
    q_bytes: float = BF16_BYTES,
    kv_bytes: float = BF16_BYTES,
) -> Work:
    """Rows of (queries, keys), queries being the last of the keys: visible keys and q read once, output written."""
    keys_read, pairs, queries_seen = visible(rows, window)
    return Work(2 * keys_read * K * H * kv_bytes + 2 * queries_seen * N * H * q_bytes, 4 * pairs * N * H)


def page_write(T: int, *, K: int, H: int, kv_bytes: float = BF16_BYTES) -> Work:
    """T tokens' keys and values, read and written."""
    return Work(2 * 2 * T * K * H * kv_bytes, 0)


def sampling(B: int, V: int) -> Work:
    """f32 logits read once, one comparison a token; a threshold search stays on chip and adds no bytes."""
    return Work(4 * B * V, B * V)


def linear(T: int, inputs: int, outputs: int, *, weight_bytes: float = BF16_BYTES) -> Work:
    """A matmul whose weight is read once and whose activations cost nothing."""
    return Work(inputs * outputs * weight_bytes, 2 * T * inputs * outputs)


@dataclass(frozen=True)
class Experts:
    """E routed experts of width F, k of them a token and `shared` more for every token, after the first layers."""

    E: int
    k: int
    F: int
    shared: int = 0
    dense_layers: int = 0


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: a cache of `rank` + `rope` numbers a token a layer, shared by all heads."""

    rank: int
    rope: int
    nope: int
    value: int


@dataclass(frozen=True)
class ModelDims:
    """A decoder's dimensions; D model, F dense ffn (0 = none), V vocab, L layers."""

    L: int
    D: int
    N: int
    K: int
    H: int
    F: int
    V: int
    tied: bool
    experts: Experts | None = None
    latent: Latent | None = None

    @property
    def expert_layers(self) -> int:
        return self.L - self.experts.dense_layers if self.experts else 0

    @property
    def expert_weights(self) -> int:
        """Of one routed expert."""
        return 3 * self.D * self.experts.F if self.experts else 0

    @property
    def dense_weights(self) -> int:
        """Of the linear layers every token passes: attention, dense ffn, shared experts."""
        D, N, H = self.D, self.N, self.H
        if self.latent:
            a = self.latent
            attention = D * N * (a.nope + a.rope) + D * (a.rank + a.rope) + a.rank * N * (a.nope + a.value)
            attention += N * a.value * D
        else:
            attention = D * H * (2 * N + 2 * self.K)
        shared = self.experts.shared * self.expert_weights if self.experts else 0
        return self.L * attention + (self.L - self.expert_layers) * 3 * D * self.F + self.expert_layers * shared

    @property
    def router_weights(self) -> int:
        return self.expert_layers * self.D * self.experts.E if self.experts else 0

    @property
    def head_weights(self) -> int:
        return self.D * self.V

    @property
    def token_weights(self) -> int:
        """Of the linear layers that one token passes."""
        return self.dense_weights + (self.expert_layers * self.experts.k * self.expert_weights if self.experts else 0)

    @property
    def sparsity(self) -> float:
        """Linear weights of all layers over those that a token passes: 1 without routed experts."""
        routed = self.expert_layers * self.experts.E * self.expert_weights if self.experts else 0
        return (self.dense_weights + routed) / self.token_weights

    def weight_bytes(self, weights: str = "bf16") -> float:
        """All of them, the embedding of an untied model included; norms and biases are left out."""
        routed = self.expert_layers * self.experts.E * self.expert_weights if self.experts else 0
        whole = self.router_weights + self.head_weights * (1 if self.tied else 2)
        return (self.dense_weights + routed) * WEIGHT_BYTES[weights] + whole * BF16_BYTES

    def kv_token_bytes(self, kv_bytes: float = BF16_BYTES) -> float:
        """Of one token in all layers."""
        numbers = self.latent.rank + self.latent.rope if self.latent else 2 * self.K * self.H
        return self.L * numbers * kv_bytes

    def attention_flops(self, pairs: float, *, decode: bool) -> float:
        """QK and PV over `pairs` (query, key) pairs in all layers; MLA decodes in its latent space."""
        if self.latent is None:
            return 4 * pairs * self.L * self.N * self.H
        a = self.latent
        width = 2 * a.rank + a.rope if decode else a.nope + a.rope + a.value
        return 2 * pairs * self.L * self.N * width


@dataclass(frozen=True)
class StepCost:
    """What one step of a served model moves and computes, as the floors count it, and the new keys and values written.

    Bytes: every linear weight once (of routed experts those that uniform routing is expected to touch), the head, the
    keys and values that the rows see, those of the step's tokens. FLOPs: two a weight a token, the head only where a
    token is sampled, attention over visible pairs. Activations, norms, the embedding's rows and sampling are left out.
    """

    model: ModelDims
    windows: tuple[tuple[int | None, int], ...]  # (window, how many layers have it)
    linear_bytes: float = BF16_BYTES  # of one weight
    head_bytes: float = BF16_BYTES
    kv_bytes: float = BF16_BYTES

    @functools.cached_property
    def _token_flops(self) -> int:
        m = self.model
        routed = m.expert_layers * m.experts.k * m.expert_weights if m.experts else 0
        return 2 * (m.dense_weights + m.router_weights + routed)

    @functools.cached_property
    def _weight_bytes(self) -> float:
        m = self.model
        return m.dense_weights * self.linear_bytes + m.router_weights * BF16_BYTES + m.head_weights * self.head_bytes

    @functools.cached_property
    def kv_token_bytes(self) -> float:
        return self.model.kv_token_bytes(self.kv_bytes)

    def __call__(self, tokens: int, sampled: int, seen: Sequence[tuple[int, int]], *, decode: bool) -> Work:
        """`seen`: (keys read, pairs) of all rows, for each of `windows`."""
        m = self.model
        moved = self._weight_bytes + tokens * self.kv_token_bytes
        flops = self._token_flops * tokens + 2.0 * m.head_weights * sampled
        if m.experts:
            distinct = m.experts.E * (1 - (1 - m.experts.k / m.experts.E) ** tokens)
            moved += m.expert_layers * distinct * m.expert_weights * self.linear_bytes
        for (_, layers), (keys, pairs) in zip(self.windows, seen):
            moved += keys * self.kv_token_bytes * layers / m.L
            flops += m.attention_flops(pairs, decode=decode) * layers / m.L
        return Work(moved, flops)


@dataclass(frozen=True)
class Floor:
    """The least a step can cost. `all_reduce_s` comes on top of `step_s` unless it is hidden."""

    step_s: float
    tokens_per_s: float
    weight_bytes: float  # read in the step
    kv_bytes: float  # read in the step
    fits: bool
    all_reduce_s: float


def decode_floor(
    model: ModelDims,
    batch: int,
    context: float,
    device: Ceilings = H200,
    *,
    weights: str = "bf16",
    kv_bytes: float = BF16_BYTES,
    tp: int = 1,
) -> Floor:
    """One decode step of `batch` rows with `context` cached tokens each."""
    fp8 = weights == "fp8"
    dense = Work(model.dense_weights * WEIGHT_BYTES[weights], 2 * model.dense_weights * batch)
    router = Work(model.router_weights * BF16_BYTES, 2 * model.router_weights * batch)
    head = linear(batch, model.D, model.V)
    routed = Work(0, 0)
    if model.experts:
        E, k = model.experts.E, model.experts.k
        distinct = E * (1 - (1 - k / E) ** batch)
        routed = Work(
            model.expert_layers * distinct * model.expert_weights * WEIGHT_BYTES[weights],
            2 * model.expert_layers * k * model.expert_weights * batch,
        )
    attention = Work(
        batch * context * model.kv_token_bytes(kv_bytes), model.attention_flops(batch * context, decode=True)
    )
    step_s = sum(work.floor_s(device, fp8=fp8, devices=tp) for work in (dense, router, routed))
    step_s += sum(work.floor_s(device, devices=tp) for work in (head, attention))
    return Floor(
        step_s=step_s,
        tokens_per_s=batch / step_s,
        weight_bytes=(dense + router + routed + head).bytes,
        kv_bytes=attention.bytes,
        fits=model.weight_bytes(weights) + attention.bytes <= USABLE_MEMORY * device.memory_bytes * tp,
        all_reduce_s=_all_reduce_s(model, batch, device, tp),
    )


def prefill_floor(
    model: ModelDims, tokens: int, device: Ceilings = H200, *, weights: str = "bf16", tp: int = 1
) -> Floor:
    """One prompt of `tokens` tokens in one step, logits of its last token only."""
    linears = model.dense_weights + model.router_weights
    if model.experts:
        linears += model.expert_layers * model.experts.k * model.expert_weights
    work = Work(model.weight_bytes(weights), 2 * linears * tokens + 2 * model.head_weights)
    pairs = tokens * (tokens + 1) / 2
    attention = Work(0, model.attention_flops(pairs, decode=tokens == 1))
    step_s = work.floor_s(device, fp8=weights == "fp8", devices=tp) + attention.floor_s(device, devices=tp)
    kv_bytes = tokens * model.kv_token_bytes()
    return Floor(
        step_s=step_s,
        tokens_per_s=tokens / step_s,
        weight_bytes=work.bytes,
        kv_bytes=kv_bytes,
        fits=work.bytes + kv_bytes <= USABLE_MEMORY * device.memory_bytes * tp,
        all_reduce_s=_all_reduce_s(model, tokens, device, tp),
    )


def workload_floor(
    model: ModelDims, lengths: Iterable[tuple[int, int]], device: Ceilings = H200, *, weights: str = "bf16"
) -> Floor:
    """Requests of (prompt, output) tokens, all there at once; `fits` is about all of them held to their end.

    Each prompt goes in one step, which gives its first token; then come decode steps of all that are unfinished.
    """
    requests = list(lengths)
    prefill = [prefill_floor(model, prompt, device, weights=weights) for prompt, _ in requests]
    step_s = sum(floor.step_s for floor in prefill)
    read = [(floor.weight_bytes, 0.0) for floor in prefill]
    for made in range(1, max((out for _, out in requests), default=0)):
        contexts = [prompt + made for prompt, out in requests if out > made]
        step = decode_floor(model, len(contexts), sum(contexts) / len(contexts), device, weights=weights)
        step_s += step.step_s
        read.append((step.weight_bytes, step.kv_bytes))
    held = sum(prompt + out for prompt, out in requests) * model.kv_token_bytes()
    return Floor(
        step_s=step_s,
        tokens_per_s=sum(out for _, out in requests) / step_s,
        weight_bytes=sum(weights for weights, _ in read),
        kv_bytes=sum(kv for _, kv in read),
        fits=model.weight_bytes(weights) + held <= USABLE_MEMORY * device.memory_bytes,
        all_reduce_s=0.0,
    )


def _all_reduce_s(model: ModelDims, tokens: int, device: Ceilings, tp: int) -> float:
    """Two a layer of bf16 activations, each crossing a link twice."""
    if tp == 1:
        return 0.0
    return 2 * model.L * (device.link_latency_s + 2 * tokens * model.D * BF16_BYTES / device.link_bytes_per_s)


MODELS = {
    "llama-3.1-8b": ModelDims(L=32, D=4096, N=32, K=8, H=128, F=14336, V=128256, tied=False),
    "qwen3-0.6b": ModelDims(L=28, D=1024, N=16, K=8, H=128, F=3072, V=151936, tied=True),
    "qwen3-30b-a3b": ModelDims(
        L=48, D=2048, N=32, K=4, H=128, F=0, V=151936, tied=False, experts=Experts(E=128, k=8, F=768)
    ),
    "llama-3.3-70b": ModelDims(L=80, D=8192, N=64, K=8, H=128, F=28672, V=128256, tied=False),
    "deepseek-v2-lite": ModelDims(
        L=27,
        D=2048,
        N=16,
        K=16,
        H=128,
        F=10944,
        V=102400,
        tied=False,
        experts=Experts(E=64, k=6, F=1408, shared=2, dense_layers=1),
        latent=Latent(rank=512, rope=64, nope=128, value=128),
    ),
}
