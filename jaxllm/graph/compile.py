"""Ahead-of-time compilation of every step executable, and a count of compilations.

In: a Graph, the parameters' and state's shapes, and the bucket ladder. Out: Executables, a table from static shapes to
compiled functions. Knows nothing of sequences. A compiled function refuses other shapes, so a missing bucket is an
error, never a silent compile.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxllm.core import MAX_LOGIT_BIAS
from jaxllm.graph import experts, multi_step, steps
from jaxllm.graph.inputs import SAMPLE_COLUMNS, StepShape, set_pages
from jaxllm.graph.multi_step import MultiStepped
from jaxllm.graph.steps import Graph, SampleMode, Stepped
from jaxllm.graph.traces import Job, Key, Traces
from pallas_kernels.sampling.api import draws_alike

log = logging.getLogger(__name__)
COUNTS_CHUNK = 512  # tokens a set_counts call takes
# The roles on a mesh of what executables take and give: names of PartitionSpecs in the places of arrays.
ROWS, LOGITS, KV, WHOLE = cast("tuple[Any, Any, Any, Any]", ("rows", "logits", "kv", "whole"))
STEP_TAKES, STEP_GIVES = ("params", KV, ROWS, ROWS, LOGITS, ROWS), Stepped(ROWS, KV, ROWS, ROWS, LOGITS, ROWS, WHOLE)
SAMPLE_TAKES, SAMPLE_GIVES = (ROWS, ROWS, LOGITS, *[ROWS] * 4), (ROWS, ROWS, ROWS)
FEW_ROWS, MULTI_STEP_ROWS = (
    8,
    32,
)  # of several decode steps in one dispatch; the latter the most: more hide the host's turn
Progress = Callable[[int, int], None]  # executables done, executables in all


class CompileCounter:
    """Counts backend compilations and cache loads in this process through jax.monitoring."""

    EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self.compiles = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.compiles += event == self.EVENT


@functools.cache
def compile_counter() -> CompileCounter:
    """One per process: jax.monitoring listeners cannot be taken back."""
    return CompileCounter()


@dataclass(frozen=True)
class Ladder:
    """The padded static shapes of a serving process."""

    decode_rows: tuple[int, ...]  # ascending; the last is max_num_seqs
    mixed_tokens: tuple[int, ...]  # ascending; the last is the token budget
    width: int  # W, most pages of a row
    one_shape: bool = False  # every step takes the one mixed shape, decodes too: bits then depend on no bucket
    decode_steps: int = 1  # in one dispatch, while nothing changes between them

    def of(self, rows: int, tokens: int, *, decode: bool) -> StepShape:
        """The shape of a step with so many rows and tokens; `decode`: one token a row."""
        return self.decode(rows) if decode and not self.one_shape else self.mixed(tokens)

    def decode(self, rows: int) -> StepShape:
        bucket = next(b for b in self.decode_rows if b >= rows)
        return StepShape(bucket, bucket, decode=True)

    def mixed(self, tokens: int) -> StepShape:
        bucket = next(t for t in self.mixed_tokens if t >= tokens)
        return StepShape(bucket, self.decode_rows[-1], decode=False)

    def multi_step(self, rows: int) -> StepShape:
        return next(shape for shape in self.multi_steps() if shape.rows >= rows)

    def multi_steps(self) -> list[StepShape]:
        """Three at most, as each is compiled for every sampler: for a single row, for a few, and for the most."""
        able = [bucket for bucket in self.decode_rows if bucket <= MULTI_STEP_ROWS]
        few = [bucket for bucket in able if bucket <= FEW_ROWS]
        several = self.decode_steps > 1 and not self.one_shape
        return [self.decode(bucket) for bucket in sorted({*few[:1], *few[-1:], *able[-1:]})] if several else []

    def shapes(self) -> list[StepShape]:
        decode = [] if self.one_shape else [self.decode(b) for b in self.decode_rows]
        return decode + [self.mixed(t) for t in self.mixed_tokens]


@dataclass
class Executables:
    """Compiled step functions by what they are and their bucket, and how long each took."""

    table: dict[Key, Any] = field(default_factory=dict)
    seconds: dict[Key, float] = field(default_factory=dict)
    traced: int = 0  # the others' StableHLO was found on disk

    @property
    def temporary_bytes(self) -> int:
        """What the hungriest executable allocates while it runs, beside its arguments and results; of a move, both."""
        sizes = [analysis.temp_size_in_bytes for analysis in self._memory(self._compiled())]
        move = [self.table["move_experts",]] if ("move_experts",) in self.table else []
        sizes += [found.temp_size_in_bytes + found.output_size_in_bytes for found in self._memory(move)]
        return max(sizes, default=0)

    def _memory(self, executables: Iterable[jax.stages.Compiled]) -> Iterable[Any]:
        for executable in executables:
            analysis = executable.memory_analysis()
            if analysis is not None:
                yield analysis

    def step(self, shape: StepShape) -> Any:
        return self.table["step", shape]

    def multi_step(self, steps: int, shape: StepShape, mode: SampleMode) -> Any:
        return self._drawing("multi_step", steps, shape, mode)

    def sample(self, rows: int, mode: SampleMode) -> jax.stages.Compiled:
        return self._drawing("sample", rows, mode)

    def _drawing(self, *key: Any) -> Any:
        """Where top_k and its like cost nothing, one executable does with and without them."""
        return self.table[key if key in self.table else (*key[:-1], SampleMode.SAMPLE)]

    def prompt_logprobs(self, tokens: int) -> Any:
        return self.table["prompt_logprobs", tokens]

    def texts(self) -> list[str]:
        """Each compiled module as XLA prints it, with the scope of every instruction."""
        return [text for program in self._compiled() if (text := program.as_text())]

    def _compiled(self) -> list[jax.stages.Compiled]:
        """Without those that are composed of others here."""
        return [executable for executable in self.table.values() if isinstance(executable, jax.stages.Compiled)]

    @property
    def move_experts(self) -> jax.stages.Compiled:
        return self.table["move_experts",]

    @property
    def set_pages(self) -> Any:
        return self.table["set_pages",]

    @property
    def set_counts(self) -> jax.stages.Compiled:
        return self.table["set_counts",]


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def stage_jobs(number: int, graph: Graph, ladder: Ladder, params: Any, kv: Any, last_tokens: Any) -> Iterable[Job]:
    """A pipeline stage before the last."""
    params, kv = _abstract(params), _abstract(kv)
    spread = (lambda function, takes, gives: function) if graph.placement is None else graph.placement.wrap

    def integers(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=last_tokens.sharding)

    table = integers(last_tokens.shape[0], ladder.width)
    for shape in ladder.shapes():
        carry, role = (last_tokens, "whole") if number == 0 else residual(graph, shape, params)
        takes, gives = ("params", "kv", "whole", role, "whole"), (residual(graph, shape, params)[1], "kv", "whole")
        function = spread(functools.partial(steps.pass_on, graph, shape), takes, gives)
        carry = jax.ShapeDtypeStruct(carry.shape, carry.dtype, sharding=carry.sharding)
        arguments = params, kv, table, carry, integers(shape.packed_size)
        yield Job(("stage", number, shape), function, arguments, donated=(1, 2))
    function = spread(set_pages, ("whole",) * 3, "whole")
    yield Job(("set_pages", number), function, (table, integers(1), integers(ladder.width)), donated=(0,))


def residual(graph: Graph, shape: StepShape, params: Any) -> tuple[jax.ShapeDtypeStruct, str]:
    """The residual stream between two stages of a step of this shape, where it lies in the later one, and its role."""
    leaf = params["layers"][0]["norms"]  # plain in every scheme
    parts = ["context"] * graph.dealt(shape)[2] + ["tokens"] * graph.exchange(shape).scatter
    role = " ".join(parts) or "whole"
    sharding = leaf.sharding if graph.placement is None else graph.placement.sharding(role)
    return jax.ShapeDtypeStruct((shape.tokens, graph.config.d_model), leaf.dtype, sharding=sharding), role


def jobs_of(graph: Graph, ladder: Ladder, params: Any, kv: Any, counts: Any, stage: int = 0) -> Iterable[Job]:
    """Everything the request path runs. State is donated: it is updated in place, at addresses that do not change.

    With `stage`, of a pipeline's last stage, which is that one.
    """
    params, kv, counts = _abstract(params), _abstract(kv), _abstract(counts)
    sharding = counts.sharding
    spread = (lambda function, takes, gives: function) if graph.placement is None else graph.placement.wrap
    vocab = graph.config.vocab_size

    def spec(dtype: Any, first: int, *shape: int) -> Any:
        """`first` a shard."""
        return jax.ShapeDtypeStruct((first * graph.shards, *shape), dtype, sharding=sharding)

    def logits(rows: int) -> Any:
        return jax.ShapeDtypeStruct((rows * graph.shards, vocab), jnp.float32, sharding=graph.logits_sharding(sharding))

    last_tokens = jax.ShapeDtypeStruct((counts.shape[0],), jnp.int32, sharding=sharding)
    table = jax.ShapeDtypeStruct((counts.shape[0], ladder.width), jnp.int32, sharding=sharding)
    # The longest to compile first; steps of few rows wait for the library that takes longest to build.
    for shape in sorted(ladder.shapes(), key=lambda shape: shape.tokens, reverse=True):
        more, roles = ((), ()) if not stage else tuple((part,) for part in residual(graph, shape, params))
        function = spread(functools.partial(steps.step, graph, shape), (*STEP_TAKES, *roles), STEP_GIVES)
        packed = spec(jnp.int32, shape.packed_size)
        key = ("stage", stage, shape) if stage else ("step", shape)
        arguments = params, kv, table, last_tokens, logits(shape.rows), packed, *more
        yield Job(key, function, arguments, donated=(1, 2, 3, 4))

    def asked(rows: int) -> tuple[Any, ...]:
        bias = spec(jnp.int32, rows, MAX_LOGIT_BIAS), spec(jnp.float32, rows, MAX_LOGIT_BIAS)
        return spec(jnp.int32, rows, SAMPLE_COLUMNS), *bias, spec(jnp.uint32, rows, -(-vocab // 32))

    def drawing(modes: Iterable[SampleMode]) -> list[SampleMode]:
        return [mode for mode in modes if mode is not SampleMode.RANDOM or not alike]

    alike = draws_alike(vocab)
    for shape, mode in itertools.product(ladder.multi_steps(), drawing(multi_step.MODES)):
        sampler = () if mode is SampleMode.GREEDY else (counts, *asked(shape.rows))
        function = functools.partial(multi_step.multi_step, graph, shape, ladder.decode_steps, mode)
        takes = ("params", KV, ROWS, ROWS, ROWS, *[ROWS] * len(sampler))
        gives = MultiStepped(ROWS, KV, ROWS, ROWS, ROWS if sampler else None)
        args = params, kv, table, last_tokens, spec(jnp.int32, shape.packed_size), *sampler
        key = "multi_step", ladder.decode_steps, shape, mode
        yield Job(key, spread(function, takes, gives), args, donated=(1, 2, 3, 5) if sampler else (1, 2, 3))
    for rows in ladder.decode_rows:
        args = counts, last_tokens, logits(rows), *asked(rows)
        for mode in drawing(steps.SAMPLER_MODES):
            function = spread(functools.partial(steps.sample, graph.exchange(), mode), SAMPLE_TAKES, SAMPLE_GIVES)
            yield Job(("sample", rows, mode), function, args, donated=(0, 1))
    for tokens in ladder.mixed_tokens:
        function = spread(functools.partial(steps.prompt_logprobs, graph), ("params", "rows", "rows"), ("rows",) * 4)
        hidden = spec(jax.tree.leaves(params)[0].dtype, tokens, graph.config.d_model)
        yield Job(("prompt_logprobs", tokens), function, (params, hidden, spec(jnp.int32, tokens)))
    one, flag = spec(jnp.int32, 1), spec(jnp.bool_, 1)
    args = counts, one, spec(jnp.int32, COUNTS_CHUNK), one, flag, flag
    yield Job(("set_counts",), spread(steps.set_counts, (ROWS,) * 6, ROWS), args, donated=(0,))
    key = ("set_pages", stage) if stage else ("set_pages",)
    yield Job(key, spread(set_pages, (ROWS,) * 3, ROWS), (table, one, spec(jnp.int32, ladder.width)), donated=(0,))
    if graph.placement is not None and graph.placement.config.balances:
        yield Job(("move_experts",), *experts.move(graph.placement, params))


def compile_all(
    graph: Graph,
    ladder: Ladder,
    params: Any,
    kv: Any,
    counts: Any,
    *,
    threads: int,
    progress: Progress | None = None,
    after: Future[None] | None = None,
    traces: Path | None = None,
) -> Executables:
    """All that a model on one device or mesh runs. `traces`: a folder for what tracing gives, of one device only.

    `after`: see compile_jobs. On a mesh, tracing a kernel also makes what the kernel needs (pallas_kernels.all_reduce:
    buffers, a library).
    """
    kept = Traces(traces, graph) if traces is not None and graph.placement is None else None
    return compile_jobs(jobs_of(graph, ladder, params, kv, counts), threads, progress, after, kept)


def compile_jobs(
    wanted: Iterable[Job],
    threads: int,
    progress: Progress | None,
    after: Future[None] | None = None,
    traces: Traces | None = None,
) -> Executables:
    """Trace and lower one by one (Python holds the lock), compile in parallel (XLA releases it).

    Nothing is compiled before `after` is done; if that is cancelled, CancelledError.
    """
    executables = Executables()
    jobs = list(wanted)

    def compile_one(key: Key, lowered: jax.stages.Lowered) -> None:
        if after is not None:
            after.result()
        start = time.perf_counter()
        executables.table[key] = lowered.compile()
        executables.seconds[key] = time.perf_counter() - start
        if progress:
            progress(len(executables.table), len(jobs))

    with concurrent.futures.ThreadPoolExecutor(max_workers=threads) as pool:
        futures = []
        for job in jobs:
            if after is not None and after.done():
                after.result()
            lowered = job.lower() if traces is None else traces.lower(job)
            futures.append(pool.submit(compile_one, job.key, lowered))
        executables.traced = len(jobs) if traces is None else traces.traced
        for future in futures:
            future.result()
    return executables
