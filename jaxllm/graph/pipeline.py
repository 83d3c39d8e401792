"""A model in consecutive stages, each on devices of its own, called as if it were one.

In: the Homes of the stages, which know their layers; parameters by the whole model's paths. Out: Executables whose
`step` runs the stages one after the other, handing the residual stream from device to device. Calls return at once, so
that steps of other sequences keep the earlier stages busy meanwhile. Where stages live in several processes, each of
them makes the same calls and runs its own stages. Knows nothing of who sends such steps.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.graph.compile import Executables, Ladder, Progress, compile_jobs, jobs_of, residual, stage_jobs
from jaxllm.graph.inputs import StepShape
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import Ends, Params
from jaxllm.graph.quant.scheme import PLAIN, Scheme
from jaxllm.graph.spread import Home
from jaxllm.graph.steps import Graph, Stepped
from sharding.axes import MeshConfig, stage_layers
from sharding.hop import Copy, Hop, hop_between

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


def homes_of(
    model: ModelConfig, meshes: Sequence[Mesh], config: MeshConfig, scheme: Scheme = PLAIN
) -> tuple[Home, ...]:
    """The stages of one replica on their meshes. Raises MeshError."""
    parts = stage_models(model, len(meshes))
    return tuple(Home.on(mesh, part, config, ends, scheme) for mesh, (part, ends) in zip(meshes, parts, strict=True))


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
    """`steps.step` of one shape over all stages: the same arguments; of parameters, pages and tables a list each."""

    stages: tuple[Any, ...]  # compiled; None: another process's
    hops: tuple[Copy | Hop, ...]  # into each stage
    wholes: tuple[jax.sharding.Sharding, ...]  # where each keeps what all its devices hold
    hidden: Any  # stands for the hidden states where the last stage is not

    def __call__(
        self,
        params: Sequence[Params],
        kv: Sequence[Any],
        tables: Sequence[Any],
        last_tokens: Any,
        logits: Any,
        packed: Any,
    ) -> Stepped:
        new_kv, new_tables = [], []
        *before, last = self.stages
        carry = last_tokens if last is not None else None
        for stage, hop, whole, own, pages, table in zip(before, self.hops, self.wholes, params, kv, tables):
            carry = hop(carry)
            if stage is not None:
                carry, pages, table = stage(own, pages, table, carry, _onto(whole, packed))
            new_kv.append(pages)
            new_tables.append(table)
        x = self.hops[-1](carry)
        if last is None:
            nothing: Any = None
            every: Any = [*new_tables, tables[-1]]
            return Stepped(nothing, [*new_kv, kv[-1]], every, last_tokens, logits, self.hidden)
        stepped: Stepped = last(params[-1], kv[-1], tables[-1], last_tokens, logits, packed, x)
        every = [*new_tables, stepped.page_table]
        return stepped._replace(kv=[*new_kv, stepped.kv], page_table=every)


def _onto(whole: jax.sharding.Sharding, given: Any) -> Any:
    """What a stage is given, on its devices; where some are another process's, the call itself brings it there."""
    return jax.device_put(given, whole) if whole.is_fully_addressable else given


@dataclass(frozen=True)
class OfLastStage:
    """A function of the last stage's parameters, given those of all."""

    compiled: Any

    def __call__(self, params: Sequence[Params], *arguments: Any) -> Any:
        return self.compiled(params[-1], *arguments)


@dataclass(frozen=True)
class OfEveryStage:
    """A function of each stage's own array, and of what all of them are given; None: another process's stage."""

    compiled: tuple[Any, ...]
    wholes: tuple[jax.sharding.Sharding, ...]

    def __call__(self, arrays: Sequence[Any], *given: Any) -> list[Any]:
        return [
            array if compiled is None else compiled(array, *_onto(whole, given))
            for compiled, whole, array in zip(self.compiled, self.wholes, arrays)
        ]


@dataclass(frozen=True)
class Elsewhere:
    """An executable of a stage that another process has: gives back what its caller keeps."""

    what: str

    def __call__(self, *arguments: Any) -> Any:
        if self.what == "set_counts":
            return arguments[0]
        return (None, *arguments[:2]) if self.what == "sample" else None


def compile_stages(
    graphs: Sequence[Graph],
    ladder: Ladder,
    params: Sequence[Any],
    kv: Sequence[Any],
    counts: jax.ShapeDtypeStruct,
    homes: Sequence[Home],
    *,
    threads: int,
    progress: Progress | None = None,
    after: Future[None] | None = None,
) -> Executables:
    """`counts` lie on the last stage. What lives in other processes is not compiled here."""
    final, wholes = len(graphs) - 1, [home.whole for home in homes]

    def tokens_on(stage: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((counts.shape[0],), jnp.int32, sharding=wholes[stage])

    by_stage = [
        list(stage_jobs(number, graphs[number], ladder, params[number], kv[number], tokens_on(number)))
        for number in range(final)
    ]
    by_stage.append(list(jobs_of(graphs[final], ladder, params[final], kv[final], counts, final)))
    executables = compile_jobs(
        [job for jobs, home in zip(by_stage, homes) if home.here for job in jobs], threads, progress, after
    )
    for jobs, home in zip(by_stage, homes):
        if not home.here:
            executables.table |= {job.key: Elsewhere(str(job.key[0])) for job in jobs}
    for shape in ladder.shapes():
        executables.table["step", shape] = _staged(executables, graphs, params, homes, tokens_on(0), shape)
    setters = [executables.table["set_pages", number] if home.here else None for number, home in enumerate(homes)]
    executables.table["set_pages",] = OfEveryStage(tuple(setters), tuple(wholes))
    for tokens in ladder.mixed_tokens:
        key = "prompt_logprobs", tokens
        executables.table[key] = OfLastStage(executables.table[key])
    return executables


def _staged(
    executables: Executables,
    graphs: Sequence[Graph],
    params: Sequence[Any],
    homes: Sequence[Home],
    last_tokens: jax.ShapeDtypeStruct,
    shape: StepShape,
) -> StagedStep:
    """`last_tokens` as the first stage takes them."""
    stages = tuple(
        executables.table["stage", number, shape] if home.here else None for number, home in enumerate(homes)
    )
    between = [residual(graph, shape, own)[0] for graph, own in zip(graphs[1:], params[1:])]
    places = [homes[-1].mesh, *(home.mesh for home in homes)]
    hops = [hop_between(*pair, like) for pair, like in zip(itertools.pairwise(places), [last_tokens, *between])]
    hidden = None if shape.decode else between[-1]
    return StagedStep(stages, tuple(hops), tuple(home.whole for home in homes), hidden)
