"""jaxllm bench: decode step, prefill, throughput and start-up of an LLM, by the protocol its peers are measured with.

In: something that generates, and at which batches, contexts and lengths. Out: Figures with their floors.

Decode step at a context = (t(192 tokens out) - t(64 out)) / 128, so that prefill cancels. Greedy, no end token, random
token ids, prefix cache off unless it is the subject. The throughput workload is nano-vllm's and mini-sglang's: 256
requests, 100 to 1024 tokens in and out, temperature 0.6, seed 0. Start-up is a process of its own, from its first
instruction to its first token. Exposed host time is the engine's own upper bound on how long the device waited for the
host, a step. Knows nothing of scheduling, devices or the command line.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jaxllm.core import JaxLLMError, RequestOutput, SamplingParams
from jaxllm.engine.metrics import Metrics
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.dims import dims_of
from jaxllm.tools.figures import RATE, Figure, median_figure
from pallas_kernels.roofline import H200, Ceilings, ModelDims, decode_floor, prefill_floor, workload_floor

SHORT_OUT, LONG_OUT = 64, 192
OWN_TOKENS = 32  # of a prompt, behind a prefix that it shares
PROMPT_IDS = (10, 10_000)  # from, below
WORKLOAD_REQUESTS, WORKLOAD_TOKENS = 256, (100, 1024)
CEILINGS = (H200,)
READY = "first-token:"  # opens the line by which a start-up child reports


class BenchError(JaxLLMError):
    """A measurement that means nothing: what it measured failed."""


class Generates(Protocol):
    """What a benchmark needs of an LLM."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], *, use_tqdm: bool = True
    ) -> list[RequestOutput]: ...


class Counted(Protocol):
    """What a benchmark reads of an engine's counts."""

    @property
    def exposed_host_s(self) -> float: ...

    @property
    def compiles_after_ready(self) -> int: ...

    @property
    def steps(self) -> int: ...

    @property
    def dispatches(self) -> int: ...


@dataclass(frozen=True)
class Floors:
    """The least a figure can be for one model on one device; None where the device's ceilings are not known."""

    dims: ModelDims
    device: Ceilings | None
    weights: str = "bf16"  # how the linear layers are stored
    kv_bytes: float = 2.0  # of a number in a page

    def decode_ms(self, batch: int, context: int) -> float | None:
        """At the nominal context, as published floors are; the steps that are timed read 64 to 192 tokens more."""
        if self.device is None:
            return None
        stored = {"weights": self.weights, "kv_bytes": self.kv_bytes}
        return decode_floor(self.dims, batch, context, self.device, **stored).step_s * 1e3

    def prefill_ms(self, tokens: int) -> float | None:
        if self.device is None:
            return None
        return prefill_floor(self.dims, tokens, self.device, weights=self.weights).step_s * 1e3

    def workload_tokens_per_s(self, lengths: Sequence[tuple[int, int]]) -> float | None:
        if self.device is None:
            return None
        return workload_floor(self.dims, lengths, self.device, weights=self.weights).tokens_per_s


def floors(config: ModelConfig, device_name: str, quantization: str = "none", kv_dtype: str = "auto") -> Floors:
    """By the device's name as JAX gives it."""
    device = next((known for known in CEILINGS if known.name == device_name), None)
    weights = "bf16" if quantization == "none" else quantization
    return Floors(dims_of(config), device, weights, 1.0 if kv_dtype == "fp8" else 2.0)


@dataclass(frozen=True)
class Bench:
    """Measures one LLM; the same seed gives the same prompts."""

    llm: Generates
    floors: Floors
    metrics: Counted = field(default_factory=Metrics)  # the engine's own; left as they are, they add nothing
    repeats: int = 3
    seed: int = 0

    def latency(self, batches: Sequence[int], contexts: Sequence[int], prefills: Sequence[int]) -> Iterator[Figure]:
        """Decode steps at every batch and context, then single prompts; each yielded as soon as it is known."""
        draw = self._draws()
        self._generate([draw(16)] * 2, [8] * 2)
        for context in contexts:
            for batch in batches:
                yield self._decode(batch, context, draw)
        for tokens in prefills:
            times = [self._generate([draw(tokens)], [1]) * 1e3 for _ in range(self.repeats + 1)][1:]
            floor = self.floors.prefill_ms(tokens)
            yield median_figure("prefill, one prompt", f"{tokens} tokens", "ms", times, floor=floor)

    def _decode(self, batch: int, context: int, draw: Any) -> Figure:
        def run(out: int) -> tuple[float, float]:
            exposed = self.metrics.exposed_host_s
            seconds = self._generate([draw(context) for _ in range(batch)], [out] * batch)
            return seconds, self.metrics.exposed_host_s - exposed

        steps, dispatches = self.metrics.steps, self.metrics.dispatches
        pairs = [(run(LONG_OUT), run(SHORT_OUT)) for _ in range(self.repeats)]
        step, exposed = ([(a[i] - b[i]) / (LONG_OUT - SHORT_OUT) * 1e3 for a, b in pairs] for i in (0, 1))
        notes = {"exposed host, ms": max(statistics.median(exposed), 0.0)} if any(exposed) else {}
        if self.metrics.dispatches - dispatches < self.metrics.steps - steps:
            notes["steps a dispatch"] = (self.metrics.steps - steps) / (self.metrics.dispatches - dispatches)
        floor = self.floors.decode_ms(batch, context)
        return median_figure("decode step", f"batch {batch}, context {context}", "ms", step, floor=floor, notes=notes)

    def shared_prefix(self, lengths: Sequence[int]) -> Iterator[Figure]:
        """Time to first token of a prompt whose prefix is new, and of another behind the same prefix.

        BenchError where the second did not find it.
        """
        draw = self._draws()
        for tokens in lengths:
            pairs = []
            for _ in range(self.repeats + 1):
                prefix = draw(tokens)
                new, known = (self._first_token([*prefix, *draw(OWN_TOKENS)]) for _ in range(2))
                if known[1] < tokens - tokens // 16:  # the last page may be its own
                    raise BenchError(f"{known[1]} of {tokens} tokens were cached: is prefix_cache on?")
                pairs.append((new[0] * 1e3, known[0] * 1e3))
            missed, hit = zip(*pairs[1:])
            at = f"{tokens} tokens shared, {OWN_TOKENS} its own"
            yield median_figure("first token, new prefix", at, "ms", missed)
            notes = {"times shorter": statistics.median(missed) / statistics.median(hit)}
            yield median_figure("first token, known prefix", at, "ms", hit, notes=notes)

    def throughput(self, requests: int = WORKLOAD_REQUESTS, tokens: tuple[int, int] = WORKLOAD_TOKENS) -> Figure:
        """All requests at once; output tokens per second."""
        prompts, outs = workload(requests, tokens, self._vocabulary(), self.seed)
        self._generate([prompts[0][:16]] * 2, [8] * 2)
        params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=out, seed=0) for out in outs]
        exposed = self.metrics.exposed_host_s
        rates = [sum(outs) / self._timed(prompts, params) for _ in range(self.repeats)]
        exposed = (self.metrics.exposed_host_s - exposed) / self.repeats
        floor = self.floors.workload_tokens_per_s([(len(p), out) for p, out in zip(prompts, outs, strict=True)])
        at = f"{requests} requests, {tokens[0]}..{tokens[1]} in and out, {sum(outs)} out"
        notes = {"exposed host, s": exposed} if exposed else {}
        return median_figure("throughput", at, RATE, rates, floor=floor, notes=notes)

    def _draws(self) -> Callable[[int], list[int]]:
        """Of so many token ids."""
        source, highest = random.Random(self.seed), self._vocabulary()
        return lambda n: [source.randrange(min(PROMPT_IDS[0], highest - 1), highest) for _ in range(n)]

    def _vocabulary(self) -> int:
        return min(PROMPT_IDS[1], self.floors.dims.V)

    def _generate(self, prompts: Sequence[Sequence[int]], outs: Sequence[int]) -> float:
        return self._timed(prompts, [_greedy(n) for n in outs])

    def _first_token(self, prompt: Sequence[int]) -> tuple[float, int]:
        """Seconds, and how many of the prompt's tokens were cached."""
        seconds, outputs = self._run([prompt], [_greedy(1)])
        return seconds, outputs[0].num_cached_tokens

    def _timed(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> float:
        return self._run(prompts, params)[0]

    def _run(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> tuple[float, list[RequestOutput]]:
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        for output, wanted in zip(outputs, params, strict=True):
            if output.error is not None or len(output.outputs[0].token_ids) != wanted.max_tokens:
                raise BenchError(f"request {output.request_id} ended early: {output.error or output.outputs[0]}")
        return seconds, outputs


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=tokens, detokenize=False)


def workload(requests: int, tokens: tuple[int, int], highest: int, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Prompts and output lengths. The draws come in the peers' order, so that lengths and ids are theirs."""
    source = random.Random(seed)
    draw = lambda: [source.randint(0, PROMPT_IDS[1]) % (highest + 1) for _ in range(source.randint(*tokens))]  # noqa: E731
    prompts = [draw() for _ in range(requests)]
    return prompts, [source.randint(*tokens) for _ in range(requests)]


# ---- start-up ----


def startup(command: Sequence[str], repeats: int, timeout_s: float = 600.0) -> list[Figure]:
    """Seconds from process start to first token, with an empty compile cache and then with the one it left.

    `command` starts a child that ends in `report_first_token`; it gets the folder of the cache as its last argument.
    """
    figures = []
    with tempfile.TemporaryDirectory(prefix="jaxllm-bench-") as folder:
        for cache, times in (("cold", 1), ("warm", repeats)):
            children = [_child([*command, str(Path(folder) / "cache")], timeout_s) for _ in range(times)]
            phases = children[-1]
            totals = [child["total"] for child in children]
            notes = {f"{name}, s": seconds for name, seconds in phases.items() if name != "total"}
            figures.append(median_figure("start to first token", f"{cache} cache", "s", totals, notes=notes))
    return figures


def _child(command: Sequence[str], timeout_s: float) -> dict[str, float]:
    start = time.time()
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    lines = [line.removeprefix(READY) for line in ran.stdout.splitlines() if line.startswith(READY)]
    if ran.returncode or not lines:
        raise BenchError(f"the process to be timed failed ({ran.returncode}): {ran.stderr.strip()[-500:]}")
    report: dict[str, float] = json.loads(lines[-1])
    total = report.pop("at") - start
    return {"imports": total - report["ready"] - report["first token"], **report, "total": total}


def report_first_token(llm: Generates, ready_s: float, phases: dict[str, float], vocab_size: int) -> str:
    """The line a start-up child prints: seconds of the start, of each phase (they may overlap) and of the first token,
    and when (time.time) that was there."""
    before = time.perf_counter()
    prompt = [token % vocab_size for token in range(10, 26)]
    greedy = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1)
    llm.generate([prompt], [greedy], use_tqdm=False)
    first = time.perf_counter() - before
    return READY + json.dumps({"ready": ready_s, **phases, "first token": first, "at": time.time()})
