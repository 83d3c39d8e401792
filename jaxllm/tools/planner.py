"""jaxllm plan: a model, so many devices and what a user expects; meshes that fit, the fastest first, and a recipe.

In: a model's sizes, a device's data file (ceilings, link rates, costs fitted to recorded runs, those runs), goals.
Out: predictions with the error they had on the recorded runs, refusals with their arithmetic, TOML. Imports no JAX and
measures nothing: a step is its roofline (pallas_kernels.roofline) over the share of it that recorded runs reached, plus
what the host, each layer and each all-reduce cost in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jaxllm.config import ConfigError, EngineConfig, model_directory
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.dims import dims_of
from pallas_kernels.roofline import BF16_BYTES, MODELS, WEIGHT_BYTES, Ceilings, ModelDims, Work
from sharding.axes import Block, MeshConfig, MeshError

DEVICES = Path(__file__).parent / "devices"
SHARED = " shared"  # of costs: of layers that devices share
GIB = 2**30
BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)


# ---- a device and what was learned on it ----


@dataclass(frozen=True)
class Costs:
    """What recorded runs of one engine cost beyond their floors."""

    least_s: float  # the host's own part of a decode step: it runs beside the device, and no step is shorter
    host_s: float  # of a decode step, whatever it holds
    layer_s: float  # of each layer
    row_s: float  # of each sequence
    weight_share: float  # of the device's bandwidth that weights are read at
    kv_share: float  # the same of keys and values
    prefill_host_s: float
    prefill_share: float  # of the device's floating-point peak
    reduce_s: float  # one small all-reduce between devices of one host


@dataclass(frozen=True)
class Run:
    """One recorded decode step."""

    costs: str
    model: str
    batch: int
    context: int
    tpot_ms: float
    tp: int = 1
    source: str = ""


@dataclass(frozen=True)
class Device:
    ceilings: Ceilings
    link_bytes_per_s: float
    costs: dict[str, Costs]
    runs: tuple[Run, ...]
    command: str  # that made the file
    sources: dict[str, str]
    prefills: tuple[Run, ...] = ()

    def costs_of(self, name: str, tensor: int) -> Costs:
        """Of layers that so many devices share: their kernels are others, where they were fitted by themselves."""
        return self.costs.get(f"{name}{SHARED}", self.costs[name]) if tensor > 1 else self.costs[name]


def read_device(name: str) -> Device:
    """By a name such as H200; ConfigError names those there are."""
    files = {path.stem: path for path in sorted(DEVICES.glob("*.json"))}
    found = next((path for stem, path in files.items() if stem.endswith(name.lower())), None)
    if found is None:
        known = ", ".join(stem.removeprefix("nvidia-").upper() for stem in files)
        raise ConfigError(f"--gpus: no data for device {name!r}; there is data for {known}")
    raw = json.loads(found.read_text())
    ceilings = {name: value for name, value in raw["ceilings"].items() if name != "source"}
    links = raw["links"]
    return Device(
        Ceilings(
            **ceilings,
            link_bytes_per_s=links["bytes_per_s"],
            link_latency_s=links["all_reduce_s"],
            source=raw["ceilings"]["source"],
        ),
        links["bytes_per_s"],
        {name: Costs(**value) for name, value in raw["costs"].items()},
        tuple(Run(**run) for run in raw["runs"]),
        raw["command"],
        {"links": links["source"], "ceilings": raw["ceilings"]["source"]},
        tuple(Run(**run) for run in raw["prefills"]),
    )


# ---- models ----


def find_model(name: str) -> tuple[ModelDims, int]:
    """(sizes, longest context) of a directory, a bundled model or a shape the roofline knows."""
    if name in MODELS:
        return MODELS[name], 131072
    try:
        model = ModelConfig.from_directory(model_directory(name))
    except ConfigError as error:
        raise ConfigError(f"{error} Known shapes: {', '.join(MODELS)}.") from None
    return dims_of(model), model.context_length


# ---- memory ----


@dataclass(frozen=True)
class MemoryUse:
    """What one device of a mesh holds."""

    weights_bytes: int
    kv_token_bytes: int  # of one token of context
    workspace_bytes: int

    def tokens(self, usable_bytes: float) -> int:
        return int((usable_bytes - self.weights_bytes - self.workspace_bytes) // self.kv_token_bytes)

    def __str__(self) -> str:
        return (
            f"weights {self.weights_bytes / GIB:.2f} GiB, workspace {self.workspace_bytes / GIB:.2f} GiB, "
            f"KV {self.kv_token_bytes / 1000:.1f} kB a token of context"
        )


def memory_use(model: ModelDims, mesh: MeshConfig, config: EngineConfig, *, itemsize: int = BF16_BYTES) -> MemoryUse:
    """Of one device of one replica; the workspace is the engine's own upper estimate."""
    width = mesh.width
    layers = model.weight_bytes() / BF16_BYTES - model.head_weights * (1 if model.tied else 2)
    ends = model.head_weights * (1 if model.tied or mesh.pipe > 1 else 2)  # the first stage embeds, the last one scores
    one = model.expert_layers * model.expert_weights  # of one routed expert in every layer that has them
    routed = one * model.experts.E if model.experts else 0
    lying = routed + one * mesh.redundant_experts
    whole = (layers - routed) / mesh.pipe + ends
    weights = (whole / width + lying / mesh.pipe / mesh.expert / mesh.tensor) * itemsize
    held = 1 if model.latent else max(model.K // width, 1) / model.K
    kv = model.kv_token_bytes(itemsize) * held / mesh.pipe / mesh.seq
    seqs = config.scheduler.max_num_seqs or 256
    budget = config.scheduler.token_budget or 8192
    widest = 4 * model.D + 2 * max(model.F, 1) // width + 2 * (model.N + 2 * model.K) * model.H // width
    workspace = 4 * (budget * widest + 8 * seqs * model.V // width)
    return MemoryUse(round(weights), max(1, round(kv)), round(workspace))


# ---- time ----


@dataclass(frozen=True)
class Terms:
    """A decode step's parts, each in the unit that its cost multiplies."""

    weights_s: float  # at the whole bandwidth (or peak)
    kv_s: float
    layers: int
    rows: int
    reduces: float  # all-reduces one after another, in those of two devices
    moved_s: float  # their bytes on the links

    def seconds(self, costs: Costs) -> float:
        own = costs.host_s + self.layers * costs.layer_s + self.rows * costs.row_s
        device = (
            own
            + self.weights_s / costs.weight_share
            + self.kv_s / costs.kv_share
            + self.reduces * costs.reduce_s
            + self.moved_s
        )
        return max(costs.least_s, device)


def decode_terms(
    model: ModelDims,
    batch: int,
    context: float,
    ceilings: Ceilings,
    mesh: MeshConfig | None = None,
    *,
    weights: str = "bf16",
    layers: int | None = None,
) -> Terms:
    """One step of `batch` sequences with `context` tokens each, through all layers (or so many of them)."""
    mesh = mesh or MeshConfig()
    width, share = mesh.width, (model.L if layers is None else layers) / model.L
    fp8 = weights == "fp8"
    dense = Work(model.dense_weights * WEIGHT_BYTES[weights], 2 * model.dense_weights * batch)
    router = Work(model.router_weights * BF16_BYTES, 2 * model.router_weights * batch)
    head = Work(model.head_weights * BF16_BYTES, 2 * model.head_weights * batch)
    seconds = sum(work.floor_s(ceilings, fp8=fp8, devices=width) for work in (dense, router)) * share
    seconds += head.floor_s(ceilings, devices=width)
    if model.experts:
        E, k = model.experts.E, model.experts.k
        routed = Work(
            model.expert_layers * E * (1 - (1 - k / E) ** batch) * model.expert_weights * WEIGHT_BYTES[weights],
            2 * model.expert_layers * k * model.expert_weights * batch,
        )
        seconds += routed.floor_s(ceilings, fp8=fp8, devices=width) * share
    held = 1.0 if model.latent else max(model.K / width, 1) / model.K
    kv = Work(
        batch * context * model.kv_token_bytes() * held, model.attention_flops(batch * context, decode=True) / width
    )
    ran = model.L * share
    reduces = round(2 * ran) + 1 if width > 1 else 0
    slower = (width + 2) / 4  # than of two: 3.7 us of two, 5.4 of four; eight: by the line through both
    moved = reduces * 2 * batch * model.D * BF16_BYTES / ceilings.link_bytes_per_s
    return Terms(seconds, kv.floor_s(ceilings, devices=mesh.seq) * share, round(ran), batch, reduces * slower, moved)


def tpot_s(model: ModelDims, device: Device, mesh: MeshConfig, batch: int, context: float, costs: Costs) -> float:
    """Of one replica with `batch` sequences. Pipeline stages share the batch between as many micro-batches."""
    micro = -(-batch // mesh.pipe)
    terms = decode_terms(model, micro, context, device.ceilings, mesh)
    hop = costs.reduce_s + micro * model.D * BF16_BYTES / device.link_bytes_per_s
    step = terms.seconds(costs)
    return step + (mesh.pipe - 1) * (hop + costs.host_s) + (mesh.seq > 1) * model.L * costs.reduce_s


def ttft_s(model: ModelDims, device: Device, mesh: MeshConfig, prompt: int, costs: Costs) -> float:
    """Of a prompt that finds the engine idle."""
    linear = model.dense_weights + model.router_weights
    if model.experts:
        linear += model.expert_layers * model.experts.k * model.expert_weights
    ways = mesh.width * mesh.seq
    flops = 2 * linear * prompt + model.attention_flops(prompt * (prompt + 1) / 2, decode=False)
    bytes_s = model.weight_bytes() / device.ceilings.bytes_per_s / mesh.width / costs.weight_share
    compute_s = flops / ways / device.ceilings.bf16_flops_per_s / costs.prefill_share
    reduces = 2 * model.L if mesh.width > 1 else 0
    moved = 2 * prompt / mesh.seq * model.D * BF16_BYTES / device.link_bytes_per_s
    return costs.prefill_host_s + max(bytes_s, compute_s) + reduces * (costs.reduce_s + moved)


# ---- plans ----


@dataclass(frozen=True)
class Goal:
    gpus: int
    device: str
    ttft_s: float | None = None
    tpot_s: float | None = None
    prompt: int = 1024
    output: int = 256
    costs: str = "auto"

    @property
    def context(self) -> float:
        return self.prompt + self.output / 2


@dataclass(frozen=True)
class Plan:
    """One mesh and the largest batch of a replica that keeps the goals."""

    mesh: MeshConfig
    batch: int
    tpot_s: float
    ttft_s: float
    tokens_per_s: float  # of all replicas
    memory: MemoryUse
    tokens: int  # of context a replica can hold
    refusal: str = ""  # why it is no plan

    @property
    def row(self) -> tuple[str, ...]:
        cells = (f"{self.ttft_s * 1e3:.1f}", f"{self.tpot_s * 1e3:.2f}", f"{self.tokens_per_s:,.0f}")
        return (str(self.mesh), str(self.batch), *cells, f"{self.memory.weights_bytes / GIB:.1f}", f"{self.tokens:,}")


@dataclass(frozen=True)
class Ranking:
    plans: list[Plan] = field(default_factory=list)  # the best first
    refused: list[tuple[MeshConfig, str]] = field(default_factory=list)


def meshes(gpus: int, model: ModelDims, *, long_prompts: bool) -> Iterator[MeshConfig]:
    """Every way to use exactly so many devices; context parallelism only where prompts are long."""
    ways = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for data in ways:
        for pipe in (n for n in ways if gpus // data % n == 0):
            left = gpus // data // pipe
            for seq in (n for n in range(1, left + 1) if left % n == 0 and (n == 1 or long_prompts)):
                for expert in (n for n in range(1, left // seq + 1) if left // seq % n == 0):
                    if expert == 1 or model.experts:
                        tensor = left // seq // expert
                        yield MeshConfig(data=data, pipe=pipe, seq=seq, expert=expert, tensor=tensor)


def fits(model: ModelDims, mesh: MeshConfig) -> str:
    """The arithmetic that forbids this mesh; "" when none does."""
    blocks = [Block("num_heads", model.N), Block("vocab_size", model.V)]
    blocks += [] if model.latent else [Block("num_kv_heads", model.K, may_repeat=True)]
    blocks += [Block("d_ff", model.F)] if model.F else []
    if model.experts:
        blocks.append(Block("experts", model.experts.E) if mesh.expert > 1 else Block("expert d_ff", model.experts.F))
    try:
        for block in blocks:
            block.units(mesh.expert if block.name == "experts" else mesh.width)
    except MeshError as error:
        return str(error)
    return f"mesh.pipe = {mesh.pipe}: the model has only {model.L} layers" if mesh.pipe > model.L else ""


def plan(model: ModelDims, device: Device, goal: Goal, config: EngineConfig, mesh: MeshConfig) -> Plan:
    """The best batch on this mesh; ConfigError or the refusal in the plan says why there is none."""
    costs = device.costs_of(goal.costs, mesh.tensor)
    memory = memory_use(model, mesh, config)
    usable = device.ceilings.memory_bytes * config.cache.memory_fraction
    tokens = memory.tokens(usable)
    ttft = ttft_s(model, device, mesh, goal.prompt, costs)
    need = goal.prompt + goal.output
    if tokens < need:
        short = (memory.weights_bytes + memory.workspace_bytes + need * memory.kv_token_bytes) / GIB
        why = f"one sequence of {need} tokens needs {short:.1f} GiB a device ({memory}) of {usable / GIB:.1f} usable"
        return Plan(mesh, 0, 0.0, ttft, 0.0, memory, max(tokens, 0), why)
    if goal.ttft_s is not None and ttft > goal.ttft_s:
        why = f"TTFT {ttft * 1e3:.1f} ms of a {goal.prompt}-token prompt is over {goal.ttft_s * 1e3:g} ms"
        return Plan(mesh, 0, 0.0, ttft, 0.0, memory, tokens, why)
    best = None
    for batch in BATCHES:
        if batch * need > tokens or batch > (config.scheduler.max_num_seqs or 512) or batch < mesh.pipe:
            continue
        step = tpot_s(model, device, mesh, batch, goal.context, costs)
        seconds = goal.output * step + batch * ttft  # a batch's prompts take turns with its steps
        mean = seconds / goal.output
        if goal.tpot_s is not None and mean > goal.tpot_s:
            continue
        found = Plan(mesh, batch, step, ttft, mesh.data * batch * goal.output / seconds, memory, tokens)
        best = found if best is None or found.tokens_per_s > best.tokens_per_s else best
    if best is not None:
        return best
    step = tpot_s(model, device, mesh, mesh.pipe, goal.context, costs)
    asked = 0.0 if goal.tpot_s is None else goal.tpot_s
    why = f"TPOT {step * 1e3:.2f} ms of the smallest batch is over {asked * 1e3:g} ms"
    return Plan(mesh, 0, step, ttft, 0.0, memory, tokens, why)


def rank(model: ModelDims, device: Device, goal: Goal, config: EngineConfig) -> Ranking:
    """Every mesh of the goal's devices, the most tokens a second first."""
    found = Ranking()
    for mesh in meshes(goal.gpus, model, long_prompts=goal.prompt >= 1 << 16):
        why = fits(model, mesh)
        candidate = None if why else plan(model, device, goal, config, mesh)
        if candidate is not None and not candidate.refusal:
            found.plans.append(candidate)
        else:
            found.refused.append((mesh, why or (candidate.refusal if candidate else "")))
    found.plans.sort(key=lambda each: (-each.tokens_per_s, each.mesh.size, str(each.mesh)))
    return found


# ---- the recorded runs again ----


def errors(device: Device) -> list[tuple[Run, float, float]]:
    """(run, predicted ms, relative error) of every recorded decode step."""
    found = []
    for run in device.runs:
        mesh = MeshConfig(tensor=run.tp)
        costs = device.costs_of(run.costs, run.tp)
        predicted = tpot_s(MODELS[run.model], device, mesh, run.batch, run.context, costs) * 1e3
        found.append((run, predicted, predicted / run.tpot_ms - 1))
    return found


# ---- words ----


def parse_gpus(text: str) -> tuple[int, str]:
    """8xH200 -> (8, H200)."""
    found = re.fullmatch(r"(\d{1,4})x(\w+)", text.strip())
    if found is None or int(found[1]) < 1:
        raise ConfigError(f"--gpus {text!r}: must be like 8xH200")
    return int(found[1]), found[2]


def parse_time(name: str, text: str | None) -> float | None:
    """500ms or 0.5s -> seconds."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"{name} {text!r}: must be like 500ms or 0.5s")
    return float(found[1]) * (1e-3 if found[2] == "ms" else 1.0)


def render(ranking: Ranking, device: Device, goal: Goal, *, most: int = 8) -> str:
    """Tables for people."""
    head = ("mesh", "batch", "TTFT ms", "TPOT ms", "tokens/s", "weights GiB", "KV tokens")
    rows = [head, *(each.row for each in ranking.plans[:most])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    if not ranking.plans:
        lines = ["no mesh keeps these goals"]
    lines += [f"refused {mesh}: {why}" for mesh, why in ranking.refused]
    known = [abs(error) for run, _, error in errors(device) if run.costs == goal.costs]
    worst = (
        f"; on the {len(known)} recorded runs of {goal.costs!r} it is off by at most {max(known):.0%}" if known else ""
    )
    lines.append(f"batch and KV tokens are a replica's, tokens/s all replicas'. Fitted to recorded runs{worst}.")
    lines.append(f"links: {device.sources['links']}")
    return "\n".join(lines)


def render_errors(device: Device) -> str:
    lines = [f"{'run':44s} {'measured':>9s} {'predicted':>9s} {'error':>6s}"]
    for run, predicted, error in errors(device):
        name = f"{run.costs} {run.model} tp{run.tp} batch {run.batch} context {run.context}"
        lines.append(f"{name:44s} {run.tpot_ms:9.2f} {predicted:9.2f} {error:+6.1%}")
    return "\n".join(lines)


def recipe(model: str, chosen: Plan, goal: Goal) -> str:
    """A TOML file for jaxllm launch (and serve, where one process holds it)."""
    mesh = chosen.mesh
    axes = "\n".join(
        f"{name} = {value}"
        for name in ("data", "pipe", "seq", "expert", "tensor")
        if (value := getattr(mesh, name)) > 1
    )
    context = f"{goal.prompt} + {goal.output} tokens"
    lines = [
        f"# Made by: jaxllm plan {model} --gpus {goal.gpus}x{goal.device}, for {context} a request.",
        f"# Predicted: TTFT {chosen.ttft_s * 1e3:.1f} ms, TPOT {chosen.tpot_s * 1e3:.2f} ms at {chosen.batch} "
        f"sequences a replica, {chosen.tokens_per_s:,.0f} tokens/s in all.",
        "[model]",
        f"path = {json.dumps(model)}",
        "",
        "[scheduler]",
        f"max_num_seqs = {chosen.batch}",
        "",
    ]
    lines += ["[mesh]", axes, ""] if axes else []
    lines += ["[gateway]", "port = 8000", ""] if mesh.data > 1 else ["[server]", "port = 8000", ""]
    return "\n".join(lines)
