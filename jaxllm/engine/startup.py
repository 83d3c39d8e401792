"""From a config to an engine that is ready: read, load, size, compile, warm up; each phase timed and logged.

In: an EngineConfig. Out: an Engine, and a StartReport of where the seconds and bytes went. What is wrong with the model
directory is said before device memory is taken.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxllm.config import ConfigError, EngineConfig, model_directory, resolve
from jaxllm.engine.cache.hashed import NoPrefixCache, PrefixCache
from jaxllm.engine.cache.pages import PagePool
from jaxllm.engine.cache.radix import RadixCache
from jaxllm.engine.decoding.grammar_trial import GrammarTrial
from jaxllm.engine.decoding.structured import GrammarCompiler, TokenizerBridge
from jaxllm.engine.engine import Engine
from jaxllm.engine.memory import MemoryPlan, estimate_workspace_bytes, logits_bytes, plan_memory
from jaxllm.engine.policy import POLICIES
from jaxllm.engine.runner import Runner
from jaxllm.engine.scheduler import Limits, Scheduler
from jaxllm.graph.compile import Executables, Ladder, compile_all
from jaxllm.graph.compile_cache import CacheReport, open_cache, seal
from jaxllm.graph.kv_cache import Device, KVCacheSpec, allocate
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import Params, abstract
from jaxllm.graph.models.generation import read_generation_defaults
from jaxllm.graph.steps import Graph
from jaxllm.graph.weights import loader, random
from jaxllm.tokenizer import Tokenizer

log = logging.getLogger(__name__)
PREFIX_INDEXES = {"hashed": PrefixCache, "radix": RadixCache}
Progress = Callable[[str, float], None]  # phase, share done in [0, 1]


@dataclass
class StartReport:
    """Where start-up went."""

    seconds: dict[str, float] = field(default_factory=dict)
    memory: MemoryPlan | None = None
    executables: int = 0
    compile_cache: CacheReport = field(default_factory=CacheReport)

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        total = f"ready in {sum(self.seconds.values()):.1f} s ({phases})"
        return f"{total}; {self.executables} executables; cache: {self.compile_cache}\n{self.memory}"


@contextmanager
def _timed(report: StartReport, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    report.seconds[phase] = report.seconds.get(phase, 0.0) + time.perf_counter() - start
    log.info("%s: %.2f s", phase, report.seconds[phase])


def start(
    config: EngineConfig, *, device: Device = None, progress: Progress | None = None
) -> tuple[Engine, StartReport]:
    """Raises ConfigError, WeightsError or DoesNotFitError with what to change."""
    report = StartReport()
    tell = progress or (lambda phase, share: None)
    with _timed(report, "devices"):
        device = device or jax.devices()[0]
    directory = model_directory(config.model.path)
    with _timed(report, "config"):
        model_config = ModelConfig.from_directory(directory)
        config = resolve(config, model_config.context_length, device.platform)
        tokenizer = _tokenizer(directory)
        generation = read_generation_defaults(directory)
        named = tokenizer.eos_token_ids if tokenizer is not None else ()
        ends = dict.fromkeys((*model_config.eos_token_ids, *generation.eos_token_ids, *named))
        model_config = dataclasses.replace(model_config, eos_token_ids=tuple(ends))
    _plan(config, model_config, _shapes(config, model_config, device), device)  # DoesNotFitError before it is loaded
    with _timed(report, "weights"):
        params = _params(config, model_config, directory, device, tell)
    runner = _runner(config, model_config, params, device, report, tell)
    pool = PagePool(runner.kv[0][0].shape[0], config.cache.page_size)
    limits = Limits(
        token_budget=config.scheduler.token_budget,
        max_num_seqs=config.scheduler.max_num_seqs,
        page_size=config.cache.page_size,
        max_model_len=config.model.max_model_len,
        max_prefill_chunk=config.scheduler.max_prefill_chunk,
    )
    prefixes = PREFIX_INDEXES[config.cache.prefix_index](pool) if config.cache.prefix_cache else NoPrefixCache()
    scheduler = Scheduler(limits, pool, prefixes, POLICIES[config.scheduler.policy], runner.metrics)
    log.info("%s", report)
    grammars = _grammars(directory, model_config)
    return Engine(config, model_config, scheduler, runner, tokenizer, generation.params, grammars), report


def _tokenizer(directory: Path) -> Tokenizer | None:
    return Tokenizer.from_directory(directory) if (directory / "tokenizer.json").exists() else None


def _grammars(directory: Path, model_config: ModelConfig) -> GrammarCompiler | None:
    """Costs nothing until the first grammar comes; what that needs of the tokenizer is then read in a worker."""
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    vocab_size, eos = model_config.vocab_size, model_config.eos_token_ids
    bridge = lambda: TokenizerBridge(path.read_text("utf-8"), vocab_size, eos)  # noqa: E731
    return GrammarCompiler(bridge, GrammarTrial(path, vocab_size, eos))


def _params(config: EngineConfig, model_config: ModelConfig, directory: Path, device: Device, tell: Progress) -> Params:
    dtype = jnp.dtype(config.model.dtype)
    if config.model.load_format == "dummy":
        params = random.dummy(model_config, dtype, config.seed, device)
    else:
        params = loader.load(
            directory, model_config, dtype, device, progress=lambda done, total: tell("weights", done / total)
        )
    return jax.block_until_ready(params)


def _shapes(config: EngineConfig, model_config: ModelConfig, device: Device) -> Params:
    """The parameters' shapes where they will lie."""
    _, shapes = abstract(model_config, jnp.dtype(config.model.dtype))
    sharding = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def _plan(
    config: EngineConfig, model_config: ModelConfig, params: Params, device: Device, workspace: int | None = None
) -> tuple[MemoryPlan, KVCacheSpec]:
    dtype, page_size = jnp.dtype(config.model.dtype), config.cache.page_size
    spec = KVCacheSpec(model_config.num_layers, model_config.num_kv_heads, model_config.head_dim, page_size, 0, dtype)
    weights_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    if workspace is None:
        workspace = estimate_workspace_bytes(config, model_config)
    plan = plan_memory(config, model_config, spec, weights_bytes, workspace, device)
    return plan, spec.with_pages(plan.num_pages)


def _runner(
    config: EngineConfig,
    model_config: ModelConfig,
    params: Params,
    device: Device,
    report: StartReport,
    tell: Progress,
) -> Runner:
    executables, ladder, spec = _compile(config, model_config, params, device, report, tell)
    with _timed(report, "cache"):
        kv = allocate(spec, device)
        rows = config.scheduler.max_num_seqs
        sharding = jax.sharding.SingleDeviceSharding(device)
        counts = jnp.zeros((rows + 1, model_config.vocab_size), jnp.uint16, device=sharding)
    runner = Runner(params, kv, counts, executables, ladder, model_config.vocab_size)
    with _timed(report, "warm-up"):
        runner.warm_up()
    if config.compile.directory is not None and report.compile_cache.usable:
        seal(config.compile.directory)
    return runner


def _compile(
    config: EngineConfig,
    model_config: ModelConfig,
    params: Params,
    device: Device,
    report: StartReport,
    tell: Progress,
) -> tuple[Executables, Ladder, KVCacheSpec]:
    """Every executable, and the cache they are compiled for. Allocates nothing: shapes are enough."""
    if config.compile.directory is not None:
        with _timed(report, "compile cache"):
            report.compile_cache = open_cache(config.compile.directory)
    page_size = config.cache.page_size
    ladder = Ladder(
        config.compile.decode_buckets,
        config.compile.token_buckets,
        -(-config.model.max_model_len // page_size),
        config.scheduler.deterministic,
    )
    sharding = jax.sharding.SingleDeviceSharding(device)
    counts = jax.ShapeDtypeStruct(
        (config.scheduler.max_num_seqs + 1, model_config.vocab_size), jnp.uint16, sharding=sharding
    )
    graphdef, _ = abstract(model_config, jnp.dtype(config.model.dtype))
    threads = config.compile.threads or os.cpu_count() or 1
    workspace: int | None = None
    while True:
        report.memory, spec = _plan(config, model_config, params, device, workspace)
        reference = config.compile.kernels == "reference"
        graph = Graph(graphdef, model_config, page_size, spec.num_pages, reference)
        with _timed(report, "compile"):
            executables = compile_all(
                graph,
                ladder,
                params,
                spec.shapes(sharding),
                counts,
                threads=threads,
                progress=lambda done, total: tell("compile", done / total),
            )
        report.executables = len(executables.table)
        measured = executables.temporary_bytes + logits_bytes(config, model_config)
        report.memory = dataclasses.replace(report.memory, measured_bytes=measured)
        if report.memory.limit_bytes is None or measured <= report.memory.workspace_bytes:
            return executables, ladder, spec
        log.info("the executables need %d bytes of workspace: fewer pages, compiled again", measured)
        workspace = measured


def build(config: EngineConfig, *, device: Device = None, progress: Progress | None = None) -> StartReport:
    """Fill config.compile.directory with all that `start` would compile; reads no weights, allocates nothing."""
    report = StartReport()
    with _timed(report, "devices"):
        device = device or jax.devices()[0]
    model_config = ModelConfig.from_directory(model_directory(config.model.path))
    config = resolve(config, model_config.context_length, device.platform)
    if config.compile.directory is None:
        raise ConfigError("compile.cache_dir: must name the folder to build")
    params = _shapes(config, model_config, device)
    _compile(config, model_config, params, device, report, progress or (lambda phase, share: None))
    if report.compile_cache.usable:
        seal(config.compile.directory)
    return report
