"""From a config to an engine that is ready: read, load, size, compile, warm up; each phase timed and logged.

In: an EngineConfig. Out: an Engine, and a StartReport of where the seconds and bytes went. What is wrong with the model
directory is said before device memory is taken.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.config import ConfigError, EngineConfig, model_directory, resolve
from jaxllm.engine.apart import keep_apart
from jaxllm.engine.balancer import Balancer
from jaxllm.engine.buckets import Padding, few_tokens
from jaxllm.engine.cache.hashed import NoPrefixCache, PrefixCache
from jaxllm.engine.cache.pages import PagePool
from jaxllm.engine.cache.radix import RadixCache
from jaxllm.engine.decoding.grammar_trial import open_grammars
from jaxllm.engine.engine import Engine
from jaxllm.engine.limits import Limits
from jaxllm.engine.memory import (
    DoesNotFitError,
    MemoryPlan,
    estimate_workspace_bytes,
    kept_bytes,
    out_of_memory,
    plan_memory,
)
from jaxllm.engine.metrics import Metrics
from jaxllm.engine.multi_step import with_decode_steps
from jaxllm.engine.packing import begin_packing, packed, packed_bytes, with_packed
from jaxllm.engine.policy import POLICIES
from jaxllm.engine.replicas import ReplicatedEngine
from jaxllm.engine.residency import Residency
from jaxllm.engine.runner import Runner
from jaxllm.engine.scheduler import Scheduler
from jaxllm.engine.sharded import ShardedScheduler
from jaxllm.engine.utilisation import StepMeter
from jaxllm.graph import libraries
from jaxllm.graph.compile import MULTI_STEP_ROWS, Executables, Ladder, compile_all
from jaxllm.graph.compile_cache import CacheReport, open_cache, seal
from jaxllm.graph.experts import add_tables
from jaxllm.graph.kv_cache import Device, KVCacheSpec, allocate, page_dtype
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import Params, abstract
from jaxllm.graph.models.dims import dims_of, step_cost
from jaxllm.graph.models.generation import read_generation_defaults
from jaxllm.graph.pipeline import Stages, compile_stages, homes_of
from jaxllm.graph.quant.scheme import Scheme, quantisation
from jaxllm.graph.spread import Home, held_bytes, zeros
from jaxllm.graph.steps import Graph
from jaxllm.graph.weights import loader, random
from jaxllm.graph.weights.kv_scales import with_scales
from jaxllm.tokenizer import Tokenizer
from sharding.axes import MeshConfig
from sharding.mesh import stage_meshes

log = logging.getLogger(__name__)
# Of decode steps, ends included: where one op for all layers is ahead of layers one by one, on one device and on
# several that share them; and where attention is not that op's, what lies between two of them
# (benchmarks/results/launched_layers_h200, wide_layers_h200, overlapping_launches_h200).
WHOLE_ROWS, SHARED_ROWS, CHAINED_ROWS = (1, 256), (1, 128), (33, 256)
PREFIX_INDEXES = {"hashed": PrefixCache, "radix": RadixCache}
Progress = Callable[[str, float], None]  # phase, share done in [0, 1]
Compiled = tuple[Executables, Ladder, list[KVCacheSpec]]  # and the pages of each stage they are compiled for


@dataclass
class StartReport:
    """Where start-up went."""

    seconds: dict[str, float] = field(default_factory=dict)  # by phase; phases may overlap
    total_s: float = 0.0
    memory: MemoryPlan | None = None
    executables: int = 0
    traced: int = 0  # of them; the others were found as StableHLO
    compile_cache: CacheReport = field(default_factory=CacheReport)
    device_kind: str = ""
    devices: int = 1  # that a step runs on

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        total = f"ready in {self.total_s:.1f} s ({phases})"
        return (
            f"{total}; {self.executables} executables, {self.traced} traced; cache: {self.compile_cache}\n{self.memory}"
        )


@contextmanager
def _timed(report: StartReport, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        raise DoesNotFitError(out_of_memory(phase, report.memory, jax.devices()[0])) from error
    report.seconds[phase] = report.seconds.get(phase, 0.0) + time.perf_counter() - start
    log.info("%s: %.2f s", phase, report.seconds[phase])


def start(
    config: EngineConfig, *, devices: SequenceOf[Device] | None = None, progress: Progress | None = None
) -> tuple[Engine | ReplicatedEngine, StartReport]:
    """Raises ConfigError, WeightsError or DoesNotFitError with what to change. `devices`: those it may use."""
    if config.disaggregation.role != "none":
        role = config.disaggregation.role
        raise ConfigError(f"disaggregation.role = {role!r}: not for an engine of several processes; set it to none")
    report, began = StartReport(), time.perf_counter()
    tell = progress or (lambda phase, share: None)
    with _timed(report, "devices"):
        meshes = stage_meshes(config.mesh, devices)
    directory = model_directory(config.model.path)
    with _timed(report, "config"):
        model_config = with_scales(ModelConfig.from_directory(directory), directory, config.cache.kv_dtype)
        config = resolve(config, model_config.context_length, meshes[0][0].devices.flat[0].platform)
        tokenizer = _tokenizer(directory)
        generation = read_generation_defaults(directory)
        named = tokenizer.eos_token_ids if tokenizer is not None else ()
        ends = dict.fromkeys((*model_config.eos_token_ids, *generation.eos_token_ids, *named))
        model_config = dataclasses.replace(model_config, eos_token_ids=tuple(ends))
        scheme = _scheme(config, model_config)
        device_kind = meshes[0][0].devices.flat[0].device_kind
        cost = step_cost(model_config, scheme.kind, scheme.group, jnp.dtype(config.model.dtype).itemsize)
        config = with_decode_steps(config, cost, device_kind)
        replicas = [homes_of(model_config, stages, config.mesh, scheme) for stages in meshes]
        replicas = _with_packed(config, replicas)
        if tokenizer is not None and tokenizer.vocab_size > model_config.vocab_size:
            largest = tokenizer.vocab_size - 1
            raise ConfigError(
                f"{directory / 'tokenizer.json'}: token ids up to {largest}, but config.json has "
                f"vocab_size = {model_config.vocab_size}: they must be below it"
            )
    _plan(config, replicas[0], _shapes(config, replicas[0]))  # DoesNotFitError before it is loaded
    grammars = open_grammars(directory, model_config.vocab_size, model_config.eos_token_ids)
    engines, lanes = [], []
    if config.compile.directory is not None:
        with _timed(report, "compile cache"):
            report.compile_cache = open_cache(config.compile.directory)
    _begin_libraries(config, replicas[0])
    for homes in replicas:
        params, compiled = _loaded_and_compiled(config, model_config, homes, directory, report, tell)
        runners = tuple(_runners(config, homes, params, compiled, report))
        lanes.append(tuple(runner for runner, _ in runners))
        for runner, num_pages in runners:
            scheduler = _scheduler(config, model_config, num_pages, runner)
            engine = Engine(config, model_config, scheduler, runner, tokenizer, generation.params, grammars)
            engine.meter = StepMeter(cost, runner.metrics)
            engine.balancer = _balancer(config, homes[0], runner)
            engines.append(engine)
    for runner in (runner for own in lanes for runner in own):
        runner.all_compiled()
    report.device_kind = device_kind
    report.devices = max(1, config.mesh.size // len(engines))
    report.total_s = time.perf_counter() - began
    log.info("%s", report)
    residency = _residency(tuple(lanes), model_config, config, replicas, directory, report)
    if len(engines) > 1:
        return ReplicatedEngine(tuple(engines), residency), report
    engines[0].residency = residency
    return engines[0], report


def _begin_libraries(config: EngineConfig, homes: tuple[Home, ...]) -> None:
    first, devices = homes[0], sum(home.mesh.size for home in homes)
    libraries.begin(first.device.platform, config.model.dtype, first.scheme.kind, devices)


def _with_packed(config: EngineConfig, replicas: list[tuple[Home, ...]]) -> list[tuple[Home, ...]]:
    ops = fused(config.compile.kernels, config.mesh, replicas[0][0].device.platform)
    return with_packed(config, replicas, ops.whole)


def _loaded_and_compiled(
    config: EngineConfig,
    model_config: ModelConfig,
    homes: tuple[Home, ...],
    directory: Path,
    report: StartReport,
    tell: Progress,
) -> tuple[list[Params], Compiled]:
    """Both at once; but what XLA times to choose kernels it times alone, so on a GPU only tracing runs beside weights
    where executables are made rather than found."""
    shapes = _shapes(config, homes)
    compile_ = functools.partial(_compile, config, homes, report=report, tell=tell)
    alone = homes[0].device.platform == "gpu" and report.compile_cache.entries == 0
    if config.model.load_format != "dummy":
        loader.check(directory, model_config)  # what is wrong with the files is said before anything is begun
    if homes[0].packed:
        begin_packing(shapes)
    loaded: Future[None] = Future()
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        compiling = pool.submit(compile_, shapes, after=loaded if alone else None)
        try:
            with _timed(report, "weights"):
                params = _params(config, model_config, homes, directory, tell)
            if homes[0].packed:
                with _timed(report, "packing"):
                    params = packed(config, homes, params)
            # A checkpoint's matrices may be quantised unalike: shapes are then not what was thought.
            alike = jax.tree.structure(params) == jax.tree.structure(shapes)
            if alike:
                loaded.set_result(None)
        finally:
            loaded.cancel()  # if it is not done: whoever waits to compile need not
    return params, compiling.result() if alike else compile_(params)


def _residency(
    lanes: tuple[tuple[Runner, ...], ...],
    model_config: ModelConfig,
    config: EngineConfig,
    replicas: list[tuple[Home, ...]],
    directory: Path,
    report: StartReport,
) -> Residency | None:
    """None in a group of processes: what is done to arrays here would have to be done in all of them."""
    if jax.process_count() > 1:
        return None

    def read(number: int, source: Path) -> Any:
        dummy = source == directory and config.model.load_format == "dummy"
        model = config.model if dummy else dataclasses.replace(config.model, load_format="auto")
        again = dataclasses.replace(config, model=model)
        found = _params(again, model_config, replicas[number], source, lambda phase, share: None)
        found = packed(config, replicas[number], found)
        return found[0] if len(replicas[number]) == 1 else found

    return Residency(lanes, lambda source: loader.check(source, model_config), read, directory)


def _balancer(config: EngineConfig, home: Home, runner: Runner) -> Balancer | None:
    if home.placement is None or not config.mesh.balances:
        return None
    balancer = Balancer(runner, config.mesh, home.whole)
    balancer.warm_up()
    return balancer


def _scheduler(
    config: EngineConfig, model: ModelConfig, num_pages: int, runner: Runner
) -> Scheduler | ShardedScheduler:
    if config.mesh.attention_shards == 1:
        return one_scheduler(config, model, num_pages, runner.metrics)
    shards = (one_scheduler(config, model, num_pages, Metrics()) for _ in range(config.mesh.attention_shards))
    return ShardedScheduler(tuple(shards), runner.metrics)


def one_scheduler(config: EngineConfig, model: ModelConfig, num_pages: int, metrics: Metrics) -> Scheduler:
    """Of a resolved config, without a device."""
    dims = dims_of(model)
    few = few_tokens(dims.L, dims.token_weights, dims.sparsity, config.mesh.tensor)
    pool = PagePool(num_pages, config.cache.page_size)
    limits = Limits(
        token_budget=config.scheduler.token_budget,
        max_num_seqs=config.scheduler.max_num_seqs,
        page_size=config.cache.page_size,
        max_model_len=config.model.max_model_len,
        max_prefill_chunk=config.scheduler.max_prefill_chunk,
        padding=Padding(config.compile.token_buckets, few),
        decode_steps=config.scheduler.decode_steps or 1,  # AUTO: for a device to decide
        decode_steps_rows=max((rows for rows in config.compile.decode_buckets if rows <= MULTI_STEP_ROWS), default=0),
    )
    prefixes = PREFIX_INDEXES[config.cache.prefix_index](pool) if config.cache.prefix_cache else NoPrefixCache()
    return Scheduler(limits, pool, prefixes, POLICIES[config.scheduler.policy], metrics)


def _tokenizer(directory: Path) -> Tokenizer | None:
    return Tokenizer.from_directory(directory) if (directory / "tokenizer.json").exists() else None


def _params(
    config: EngineConfig, model_config: ModelConfig, homes: tuple[Home, ...], directory: Path, tell: Progress
) -> list[Params]:
    """The parameters of each stage."""
    dtype, stages = jnp.dtype(config.model.dtype), Stages.of(model_config, homes)
    scheme = homes[0].scheme
    if config.model.load_format == "dummy":
        random.dummy(model_config, dtype, config.seed, homes[0].own_device, scheme, stages.place)
    else:
        alone = len(homes) == 1 and homes[0].placement is None
        through = homes[0].device if alone else jax.local_devices(backend="cpu")[0]  # no device need hold a whole leaf
        progress = lambda done, total: tell("weights", done / total)  # noqa: E731
        loader.load(directory, model_config, dtype, through, progress, scheme, stages.place)
    for home, tree in zip(homes, stages.trees):
        add_tables(home, tree)
    return jax.block_until_ready(list(stages.trees))


def _scheme(config: EngineConfig, model_config: ModelConfig) -> Scheme:
    scheme = quantisation(config.model)
    scheme.check(model_config)
    return scheme


def _shapes(config: EngineConfig, homes: tuple[Home, ...]) -> list[Params]:
    """The parameters' shapes where they will lie."""
    return [home.shapes(jnp.dtype(config.model.dtype)) for home in homes]


def _plan(
    config: EngineConfig, homes: tuple[Home, ...], params: list[Params], workspace: int | None = None
) -> tuple[MemoryPlan, list[KVCacheSpec]]:
    """Of one device of the fullest stage; the pages of each stage, which each lane of the pipeline gets."""
    page_size = config.cache.page_size
    plans, specs = [], []
    for home, own in zip(homes, params):
        held = home.held
        dtype = page_dtype(config.cache.kv_dtype, config.model.dtype)
        spec = KVCacheSpec(held.num_layers, held.num_kv_heads, held.head_dim, page_size, 0, dtype)
        needed = estimate_workspace_bytes(config, held) if workspace is None else workspace
        plans.append(plan_memory(config, held, spec, held_bytes(own), needed, home.own_device, packed_bytes(own)))
        specs.append(spec)
    plan, deep = min(plans, key=lambda plan: plan.num_pages), config.mesh.seq
    lane = max(1, plan.num_pages // len(homes))
    pages = lane * deep if config.cache.num_pages is None else max(1, lane // deep) * deep
    return plan, [spec.with_pages(pages) for spec in specs]


def _runners(
    config: EngineConfig, homes: tuple[Home, ...], params: list[Params], compiled: Compiled, report: StartReport
) -> Iterator[tuple[Runner, int]]:
    """One a pipeline stage, so that every stage has work, each with the pages it owns; they share the parameters."""
    executables, ladder, specs = compiled
    final = homes[-1]
    for _ in homes:
        with _timed(report, "cache"):
            shapes = [home.kv_shapes(spec) for home, spec in zip(homes, specs)]
            kv = [allocate(own) if home.here else own for home, own in zip(homes, shapes)]
            counts = zeros(_counts_shape(config, final), jnp.uint16, final.sharding("rows"))
            lines = counts.shape[0], ladder.width
            tables = [zeros(lines, jnp.int32, home.whole) for home in homes[:-1]]
            tables.append(zeros(lines, jnp.int32, final.sharding("rows")))
        logits = final.sharding("logits")
        own = (params[0], kv[0], tables[0]) if len(homes) == 1 else (params, kv, tables)
        shards = config.mesh.attention_shards
        runner = Runner(*own, counts, executables, ladder, final.model.vocab_size, logits, shards=shards)
        with _timed(report, "warm-up"):
            if final.own_device.platform == "gpu":
                _keep_apart(config, homes, runner)
                runner.warm_up()  # a CUDA graph is made at a step's second run
            runner.warm_up()
        yield runner, specs[0].num_pages
    if config.compile.directory is not None and report.compile_cache.usable:
        seal(config.compile.directory)


def _keep_apart(config: EngineConfig, homes: tuple[Home, ...], runner: Runner) -> None:
    """On several devices; on one it makes no difference (benchmarks/results/meshes_h200)."""
    devices = [device for home in homes if home.here for device in home.mesh.local_devices]
    hidden = config.scheduler.token_budget * homes[-1].model.d_model * jnp.dtype(config.model.dtype).itemsize
    if len(devices) > 1:
        runner.stay = keep_apart(devices, hidden)


def _counts_shape(config: EngineConfig, home: Home) -> tuple[int, int]:
    return config.mesh.attention_shards * (config.scheduler.max_num_seqs + 1), home.model.vocab_size


class Fused(NamedTuple):
    """Decode steps of which numbers of rows, ends included, are fewer and larger ops; None: none."""

    chained: tuple[int, int] | None  # what lies between two attentions, where they are not all one op
    whole: tuple[int, int] | None  # all layers
    whole_by: str | None = None  # that op's implementation, if not the first that accepts


def fused(kernels: str, mesh: MeshConfig, platform: str) -> Fused:
    """Devices that share layers ask for the implementation that has run on several (ahead on two and four)."""
    auto, shared = kernels == "auto" and platform != "cpu", mesh.tensor * mesh.expert
    by = "launched" if kernels == "launched" else "wide" if shared > 1 else None
    rows = WHOLE_ROWS if shared == 1 or kernels == "launched" else SHARED_ROWS
    asked = kernels in ("layers", "launched") or (auto and shared <= 4 and mesh.expert == 1)
    chained = WHOLE_ROWS if kernels == "chain" else CHAINED_ROWS if auto else None
    return Fused(chained, rows if asked else None, by if platform != "cpu" else None)


def _compile(
    config: EngineConfig,
    homes: tuple[Home, ...],
    params: list[Params],
    report: StartReport,
    tell: Progress,
    after: Future[None] | None = None,
) -> Compiled:
    """Every executable, and the cache they are compiled for. Allocates nothing: shapes are enough."""
    page_size, width = config.cache.page_size, -(-config.model.max_model_len // config.cache.page_size)
    deterministic = config.scheduler.deterministic
    buckets = config.compile.decode_buckets, config.compile.token_buckets
    ladder = Ladder(*buckets, width, deterministic, config.scheduler.decode_steps)
    final, dtype = homes[-1], jnp.dtype(config.model.dtype)
    counts = jax.ShapeDtypeStruct(_counts_shape(config, final), jnp.uint16, sharding=final.sharding("rows"))
    graphdefs = [abstract(home.held, dtype, home.ends)[0] for home in homes]
    kernels = config.compile.kernels
    ops = fused(kernels, config.mesh, homes[0].device.platform)
    threads = config.compile.threads or os.cpu_count() or 1
    folder = config.compile.directory if report.compile_cache.usable else None
    traces = None if folder is None else folder / "traces"
    workspace: int | None = None
    while True:
        report.memory, specs = _plan(config, homes, params, workspace)
        pages = specs[0].num_pages
        graphs = [
            Graph(
                graphdef,
                home.model,
                page_size,
                pages,
                kernels == "reference",
                *ops,
                uniform=deterministic,
                placement=home.placed(own),
            )
            for graphdef, home, own in zip(graphdefs, homes, params)
        ]
        kv = [home.kv_shapes(spec) for home, spec in zip(homes, specs)]
        with _timed(report, "compile"):
            told = lambda done, total: tell("compile", done / total)  # noqa: E731
            how: dict[str, Any] = {"threads": threads, "progress": told, "after": after}
            if len(homes) == 1:
                executables = compile_all(graphs[0], ladder, params[0], kv[0], counts, **how, traces=traces)
            else:
                executables = compile_stages(graphs, ladder, params, kv, counts, homes, **how)
        report.executables, report.traced = len(executables.table), executables.traced
        measured = executables.temporary_bytes + kept_bytes(config, final.held)
        report.memory = dataclasses.replace(report.memory, measured_bytes=measured)
        if report.memory.limit_bytes is None or measured <= report.memory.workspace_bytes:
            return executables, ladder, specs
        log.info("the executables need %d bytes of workspace: fewer pages, compiled again", measured)
        workspace = measured


def build(config: EngineConfig, *, device: Device = None, progress: Progress | None = None) -> StartReport:
    """Fill config.compile.directory with all that `start` would compile; reads no weights, allocates nothing."""
    report = StartReport()
    with _timed(report, "devices"):
        meshes = stage_meshes(config.mesh, None if device is None else [device])
    directory = model_directory(config.model.path)
    model_config = with_scales(ModelConfig.from_directory(directory), directory, config.cache.kv_dtype)
    config = resolve(config, model_config.context_length, meshes[0][0].devices.flat[0].platform)
    scheme = _scheme(config, model_config)
    cost = step_cost(model_config, scheme.kind, scheme.group, jnp.dtype(config.model.dtype).itemsize)
    config = with_decode_steps(config, cost, meshes[0][0].devices.flat[0].device_kind)
    if config.compile.directory is None:
        raise ConfigError("compile.cache_dir: must name the folder to build")
    report.compile_cache = open_cache(config.compile.directory)
    (homes,) = _with_packed(config, [homes_of(model_config, meshes[0], config.mesh, scheme)])
    _begin_libraries(config, homes)
    params = _shapes(config, homes)
    _compile(config, homes, params, report, progress or (lambda phase, share: None))
    if report.compile_cache.usable:
        seal(config.compile.directory)
    return report
