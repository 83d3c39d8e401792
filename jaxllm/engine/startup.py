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
from jaxllm.engine.decoding.grammar_trial import GrammarTrial
from jaxllm.engine.decoding.structured import GrammarCompiler, TokenizerBridge
from jaxllm.engine.engine import Engine
from jaxllm.engine.memory import DoesNotFitError, MemoryPlan, out_of_memory, plan_memory
from jaxllm.engine.policy import POLICIES
from jaxllm.engine.residency import Residency
from jaxllm.engine.runner import Runner
from jaxllm.engine.scheduler import Limits, Scheduler
from jaxllm.graph import cache_guard
from jaxllm.graph.compile import Executables, Ladder, compile_all, use_cache
from jaxllm.graph.kv_cache import Device, KVCache, KVCacheSpec, allocate
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import Params, abstract
from jaxllm.graph.models.generation import read_generation_defaults
from jaxllm.graph.steps import Graph
from jaxllm.graph.weights import loader, random
from jaxllm.tokenizer import Tokenizer

log = logging.getLogger(__name__)
Progress = Callable[[str, float], None]  # phase, share done in [0, 1]


@dataclass
class StartReport:
    """Where start-up went."""

    seconds: dict[str, float] = field(default_factory=dict)
    memory: MemoryPlan | None = None
    executables: int = 0

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return f"ready in {sum(self.seconds.values()):.1f} s ({phases}); {self.executables} executables\n{self.memory}"


@contextmanager
def _timed(report: StartReport, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        raise DoesNotFitError(out_of_memory(phase, report.memory, jax.devices()[0])) from error
    report.seconds[phase] = time.perf_counter() - start
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
        if tokenizer is not None and tokenizer.vocab_size > model_config.vocab_size:
            largest = tokenizer.vocab_size - 1
            raise ConfigError(
                f"{directory / 'tokenizer.json'}: token ids up to {largest}, but config.json has "
                f"vocab_size = {model_config.vocab_size}: they must be below it"
            )
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
    prefixes = PrefixCache(pool) if config.cache.prefix_cache else NoPrefixCache()
    scheduler = Scheduler(limits, pool, prefixes, POLICIES[config.scheduler.policy])
    log.info("%s", report)
    grammars = _grammars(directory, model_config)
    engine = Engine(config, model_config, scheduler, runner, tokenizer, generation.params, grammars)
    engine.residency = _residency(runner, model_config, config, directory, device)
    return engine, report


def _residency(
    runner: Runner, model_config: ModelConfig, config: EngineConfig, directory: Path, device: Device
) -> Residency:
    def read(source: Path) -> Params:
        dummy = source == directory and config.model.load_format == "dummy"
        again = (
            config
            if dummy
            else dataclasses.replace(config, model=dataclasses.replace(config.model, load_format="auto"))
        )
        return _params(again, model_config, source, device, lambda phase, share: None)

    return Residency(runner, lambda source: loader.check(source, model_config), read, directory)


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


def _runner(
    config: EngineConfig,
    model_config: ModelConfig,
    params: Params,
    device: Device,
    report: StartReport,
    tell: Progress,
) -> Runner:
    page_size, rows = config.cache.page_size, config.scheduler.max_num_seqs
    dtype = jnp.dtype(config.model.dtype)
    spec = KVCacheSpec(model_config.num_layers, model_config.num_kv_heads, model_config.head_dim, page_size, 0, dtype)
    weights_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    report.memory = plan_memory(config, model_config, spec, weights_bytes, device)
    with _timed(report, "cache"):
        kv = allocate(spec.with_pages(report.memory.num_pages), device)
        sharding = jax.sharding.SingleDeviceSharding(device)
        counts = jnp.zeros((rows + 1, model_config.vocab_size), jnp.uint16, device=sharding)
    with _timed(report, "compile"):
        cache = use_cache(config.compile.directory) if config.compile.directory is not None else None
        executables, ladder = _compile(config, model_config, params, kv, counts, tell)
        report.executables = len(executables.table)
        if cache is not None:
            cache_guard.seal(cache)
    runner = Runner(params, kv, counts, executables, ladder, model_config.vocab_size)
    with _timed(report, "warm-up"):
        runner.warm_up()
    return runner


def _compile(
    config: EngineConfig, model_config: ModelConfig, params: Params, kv: KVCache, counts: jax.Array, tell: Progress
) -> tuple[Executables, Ladder]:
    width = -(-config.model.max_model_len // config.cache.page_size)
    ladder = Ladder(config.compile.decode_buckets, config.compile.token_buckets, width)
    graphdef, _ = abstract(model_config, jnp.dtype(config.model.dtype))
    reference = config.compile.kernels == "reference"
    graph = Graph(graphdef, model_config, config.cache.page_size, kv[0][0].shape[0], reference)
    threads = config.compile.threads or os.cpu_count() or 1
    tell_compile = lambda done, total: tell("compile", done / total)  # noqa: E731
    return compile_all(graph, ladder, params, kv, counts, threads=threads, progress=tell_compile), ladder
