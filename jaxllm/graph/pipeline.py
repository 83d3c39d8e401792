"""A model in consecutive stages, each on devices of its own, called as if it were one.

In: the Homes of the stages, which know their layers; parameters by the whole model's paths. Out: Executables whose
`step` runs the stages one after the other, handing the residual stream from device to device. Calls return at once, so
that steps of other sequences keep the earlier stages busy meanwhile. Knows nothing of who sends such steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.graph.compile import Executables, Ladder, Progress, compile_jobs, jobs_of, residual, stage_jobs
from jaxllm.graph.inputs import StepShape
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import Ends, Params
from jaxllm.graph.spread import Home
from jaxllm.graph.steps import Graph, Stepped
from sharding.axes import MeshConfig, stage_layers

Path = tuple[str | int, ...]


def stage_models(model: ModelConfig, stages: int) -> Iterator[tuple[ModelConfig, Ends]]:
    """Each stage as a model of its own layers."""
    for number, layers in enumerate(stage_layers(model.num_layers, stages)):
        windows = tuple(model.windows[layer] for layer in layers)
        sparse = tuple(model.sparse_layers[layer] for layer in layers)
        scales = tuple(model.kv_scales[layer] for layer in layers) if model.kv_scales else ()
        part = dataclasses.replace(
            model, num_layers=len(layers), windows=windows, sparse_layers=sparse, kv_scales=scales
        )
        yield part, Ends(first=number == 0, last=number == stages - 1)


def stages_of(path: Path, model: ModelConfig, stages: int) -> Iterator[tuple[int, Path]]:
    """Which stages hold the leaf at a path of the whole model, and its path there. A tied embedding has two."""
    if path[0] == "layers":
        for number, layers in enumerate(stage_layers(model.num_layers, stages)):
            if path[1] in layers:
                yield number, ("layers", int(path[1]) - layers.start, *path[2:])
        return
    if path[0] == "embed":
        yield 0, path
    if path[0] != "embed" or (model.tie_embeddings and stages > 1):
        yield stages - 1, path


def homes_of(model: ModelConfig, meshes: Sequence[Mesh], config: MeshConfig) -> tuple[Home, ...]:
    """The stages of one replica on their meshes. Raises MeshError."""
    parts = stage_models(model, len(meshes))
    return tuple(Home.on(mesh, part, config, ends) for mesh, (part, ends) in zip(meshes, parts, strict=True))


@dataclass(frozen=True)
class Stages:
    """Parameters on their way to the stages of one replica; `trees` fill as leaves are placed."""

    model: ModelConfig
    homes: tuple[Home, ...]
    trees: tuple[Params, ...]

    @staticmethod
    def of(model: ModelConfig, homes: tuple[Home, ...]) -> Stages:
        return Stages(model, homes, tuple({} for _ in homes))

    def place(self, path: Path, leaf: Any) -> list[Any]:
        """The leaf at a path of the whole model, on each stage that holds it."""
        placed = []
        for number, (first, *rest) in stages_of(path, self.model, len(self.homes)):
            node, key = self.trees[number], first
            for following in rest:
                node, key = node.setdefault(key, {}), following
            node[key] = self.homes[number].place((first, *rest), leaf)
            placed.append(node[key])
        return placed


@dataclass(frozen=True)
class StagedStep:
    """`steps.step` of one shape over all stages: the same arguments, with parameters and pages a list each."""

    stages: tuple[Any, ...]  # compiled
    carries: tuple[Any, ...]  # where each stage wants what it is handed: shardings
    wholes: tuple[Any, ...]  # where each keeps what all its devices hold

    def __call__(
        self, params: Sequence[Params], kv: Sequence[Any], last_tokens: Any, logits: Any, packed: Any
    ) -> Stepped:
        carry, new_kv = last_tokens, []
        *before, last = self.stages
        for stage, wants, whole, own, pages in zip(before, self.carries, self.wholes, params, kv):
            carry, pages = stage(own, pages, jax.device_put(carry, wants), jax.device_put(packed, whole))
            new_kv.append(pages)
        x = jax.device_put(carry, self.carries[-1])
        stepped: Stepped = last(params[-1], kv[-1], last_tokens, logits, packed, x)
        return stepped._replace(kv=[*new_kv, stepped.kv])


@dataclass(frozen=True)
class OfLastStage:
    """A function of the last stage's parameters, given those of all."""

    compiled: Any

    def __call__(self, params: Sequence[Params], *arguments: Any) -> Any:
        return self.compiled(params[-1], *arguments)


def compile_stages(
    graphs: Sequence[Graph],
    ladder: Ladder,
    params: Sequence[Any],
    kv: Sequence[Any],
    counts: jax.ShapeDtypeStruct,
    wholes: Sequence[jax.sharding.Sharding],
    *,
    threads: int,
    progress: Progress | None = None,
) -> Executables:
    """`wholes`: where each stage keeps what all its devices hold. `counts` lie on the last."""
    final = len(graphs) - 1

    def tokens_on(stage: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((counts.shape[0],), jnp.int32, sharding=wholes[stage])

    jobs = [
        job
        for number in range(final)
        for job in stage_jobs(number, graphs[number], ladder, params[number], kv[number], tokens_on(number))
    ]
    jobs += jobs_of(graphs[final], ladder, params[final], kv[final], counts, final)
    executables = compile_jobs(jobs, threads, progress)
    for shape in ladder.shapes():
        executables.table["step", shape] = _staged(executables, graphs, params, wholes, shape)
    for tokens in ladder.mixed_tokens:
        key = "prompt_logprobs", tokens
        executables.table[key] = OfLastStage(executables.table[key])
    return executables


def _staged(
    executables: Executables,
    graphs: Sequence[Graph],
    params: Sequence[Any],
    wholes: Sequence[jax.sharding.Sharding],
    shape: StepShape,
) -> StagedStep:
    stages = tuple(executables.table["stage", number, shape] for number in range(len(graphs)))
    between = [residual(graph, shape, own)[0].sharding for graph, own in zip(graphs[1:], params[1:])]
    return StagedStep(stages, (wholes[0], *between), tuple(wholes))
