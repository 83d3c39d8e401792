"""What a scheduling policy costs, without a GPU: the real engine, scheduler and buckets on a clock of measured steps.

    python -m benchmarks.simulate_schedule [--set NAME=VALUE] [--serve 64,256 | --rate 4] [--ratio 0.8] [--whole]

In: settings of jaxllm.config, a workload, what a step costs. Out: tokens a second, where the time went, TTFT and gaps
between tokens. Steps follow each other on a device that is never faster than its cost says; the host is one step ahead
as the engine is. Tokens mean nothing, prompts never share a prefix.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import heapq
import json
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.shapes import make_model_directory
from jaxllm.config import EngineConfig, load, resolve
from jaxllm.core import Request, RowResult, SampledToken, SamplingParams, StepPlan
from jaxllm.core import Sequence as TokenSequence
from jaxllm.engine.buckets import FEW_TOKENS, Padding
from jaxllm.engine.engine import Engine
from jaxllm.engine.metrics import Metrics
from jaxllm.engine.startup import one_scheduler
from jaxllm.graph.compile import Ladder
from jaxllm.graph.inputs import StepShape
from jaxllm.graph.models.config import ModelConfig
from jaxllm.tools.bench import WORKLOAD_REQUESTS, WORKLOAD_TOKENS, workload

PAGES = 12_000  # of 64 tokens: 768k tokens, what an H200 holds beside 8B weights in bf16
Lengths = tuple[int, int]  # of a prompt and of its answer


@dataclass(frozen=True)
class Costs:
    """Milliseconds of a step on the device, of the 8B shape in bf16 on one H200.

    products: everything but attention and sampling, by padded tokens; between two points on a line, beyond the last
    with its slope. Each point is a measured step less the attention below.
    """

    name: str
    products: tuple[tuple[int, float], ...]
    sampler_row_ms: float  # of a padded row that draws at a temperature; greedy tokens come with the step
    # Decode attention. profile_8b_256.txt: 3.16 ms at 256 rows x 265 tokens; the rest of that step, 6.92 ms, is then
    # also the rest of the 17.9 ms at 256 x 1152, whose attention is 10.98 ms: 3.8 TB/s and 0.82 ms before the bytes,
    # 0.40 at one row (lead-1.txt: 13 us a layer).
    attention_bytes_per_s: float = 3.8e12
    attention_start_ms: float = 0.40
    attention_row_ms: float = 0.0016
    kv_token_bytes: int = 131_072  # 32 layers x 8 heads x 128 x 2 x 2 bytes
    # Prompts. lead-5.txt: attention takes 32.8 ms for one of 8192 tokens and 0.72 for one of 1024; 1.2 ms of the step
    # with 1024 lie between its kernels (span less busy), which no CUDA graph launches.
    ragged_start_ms: float = 0.32
    mixed_start_ms: float = 1.2
    ragged_flops_per_s: float = 540e12
    pair_flops: int = 4 * 32 * 32 * 128  # a query and a key in 32 layers of 32 heads
    host_ms: float = 1.5  # from a result to the next launch: hidden while the device works (lead-4.txt: 2 ms a turn)

    def products_ms(self, tokens: int) -> float:
        points = self.products
        place = min(max(bisect.bisect_left(points, (tokens, 0.0)), 1), len(points) - 1)
        (t0, ms0), (t1, ms1) = points[place - 1], points[place]
        return ms0 + (ms1 - ms0) * (tokens - t0) / (t1 - t0) if tokens > t0 else ms0

    def attention_ms(self, plan: StepPlan) -> tuple[float, float]:
        """Of rows with one token and of rows with more, the latter with what their step costs before any work."""
        single = [row for row in plan.rows if row.count == 1]
        keys = sum(row.start + 1 for row in single)
        decode = self.attention_start_ms + self.attention_row_ms * len(single)
        decode += 1e3 * keys * self.kv_token_bytes / self.attention_bytes_per_s
        if plan.decode_only:
            return decode, 0.0
        pairs = sum(row.count * row.start + row.count * (row.count + 1) / 2 for row in plan.rows if row.count > 1)
        start = self.ragged_start_ms + self.mixed_start_ms
        return decode, start + 1e3 * pairs * self.pair_flops / self.ragged_flops_per_s


# Of compare_8b_h200, the run with 9,106 tokens a second: 4.68 4.86 6.08 11.0 18.6 and, less 0.65 ms of host and
# readback, 26.8 215.4. The sampler was XLA's: sampling_h200, temperature alone, 517 us at 256 rows of 151,936 logits,
# here of 128,256.
COMPARED = Costs(
    "compare_8b_h200",
    ((1, 4.15), (8, 4.15), (32, 4.36), (128, 5.34), (256, 7.6), (1024, 23.7), (8192, 180.2)),
    sampler_row_ms=0.0017,
)
# Of small_kernels_h200/8b-after.json: 4.43 5.95 17.9 and 23.9 208.6; batch 8 and 128, not in that run, taken as 4.9
# and 10.8. The sampler since is a kernel: 224 us in sampling_h200.
NOW = Costs(
    "small_kernels_h200",
    ((1, 3.98), (8, 4.15), (32, 4.23), (128, 5.12), (256, 6.92), (1024, 20.85), (8192, 173.4)),
    sampler_row_ms=0.00074,
)
COSTS = {"compared": COMPARED, "now": NOW}


@dataclass
class Step:
    """On the virtual device until `ends_s`."""

    clock: Clock
    rows: list[RowResult]
    ends_s: float
    waits: bool = False

    @property
    def ready(self) -> bool:
        return self.ends_s <= self.clock.now_s


@dataclass
class Clock:
    now_s: float = 0.0  # the host's
    device_s: float = 0.0  # when the device has done all it was given


@dataclass
class VirtualRunner:
    """Takes the time of the padded shape that the real runner would take."""

    ladder: Ladder
    costs: Costs
    clock: Clock
    spent_ms: Counter[str] = field(default_factory=Counter)
    shapes: Counter[StepShape] = field(default_factory=Counter)
    idle_s: float = 0.0  # of the device, between steps

    def launch(self, plan: StepPlan) -> Step:
        costs, clock = self.costs, self.clock
        shape = self.ladder.of(len(plan.rows), plan.num_tokens, decode=plan.decode_only)
        self.shapes[shape] += 1
        kind = f"decode {shape.rows}" if shape.decode else f"mixed {shape.tokens}"
        products, useful = costs.products_ms(shape.tokens), costs.products_ms(plan.num_tokens)
        decode, prefill = costs.attention_ms(plan)
        drawn = any(row.sample and row.sequence.request.params.temperature > 0 for row in plan.rows)
        sampler = shape.rows * costs.sampler_row_ms * drawn
        total = products + decode + prefill + sampler
        self.spent_ms.update(
            {
                "steps/" + kind: total,
                "parts/products": useful,
                "parts/products of padding": products - useful,
                "parts/decode attention": decode,
                "parts/prefill attention and start": prefill,
                "parts/sampler": sampler,
            }
        )
        clock.now_s += costs.host_ms / 1e3
        self.idle_s += max(0.0, clock.now_s - clock.device_s)
        clock.device_s = max(clock.now_s, clock.device_s) + total / 1e3
        return Step(clock, [RowResult(SampledToken(1) if row.sample else None) for row in plan.rows], clock.device_s)

    def choose(self, launched: Any) -> None:
        raise AssertionError("no step of this runner waits")

    def collect(self, launched: Any) -> list[RowResult]:
        self.clock.now_s = max(self.clock.now_s, launched.ends_s)
        return launched.rows

    def hidden_states(self, token_ids: Sequence[int], start: int, pages: Sequence[int]) -> NDArray[np.float32]:
        raise NotImplementedError("no embeddings here")


@dataclass
class Simulated:
    """What came out; times in ms of the virtual clock."""

    seconds: float
    output_tokens: int
    steps: int
    spent_ms: dict[str, float]
    shapes: dict[str, int]
    idle_ms: float
    ttft_ms: list[float]
    itl_ms: list[float]

    @property
    def rate(self) -> float:
        return self.output_tokens / self.seconds


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def model_config() -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        return ModelConfig.from_directory(make_model_directory("llama-3.1-8b", Path(folder)))


def configured(**settings: Any) -> EngineConfig:
    """As on the GPU: its defaults, and contexts of 4096 tokens as the benchmarks have them."""
    wanted = {"max_model_len": 4096, "num_pages": PAGES, "prefix_cache": False, **settings}
    return resolve(load(environ={}, **wanted), 131_072, "gpu")


def simulate(
    lengths: Sequence[Lengths],
    config: EngineConfig,
    costs: Costs,
    *,
    concurrency: int | None = None,
    rate: float | None = None,
    front_ms: float = 0.0,
    front_threads: int = 1,
    temperature: float = 0.6,
    padding: Padding | None = None,
) -> Simulated:
    """All requests at once, or at most `concurrency` at a time: a client sends the next when one has ended; or `rate`
    a second, at random. `front_ms`: what the server's front takes for a prompt, in one of its threads."""
    model = model_config()
    scheduler = one_scheduler(config, model, config.cache.num_pages or PAGES, Metrics())
    if padding is not None:
        scheduler.config = dataclasses.replace(scheduler.config, padding=padding)
    width = -(-config.model.max_model_len // config.cache.page_size)
    ladder = Ladder(config.compile.decode_buckets, config.compile.token_buckets, width)
    clock = Clock()
    runner = VirtualRunner(ladder, costs, clock)
    engine = Engine(config, model, scheduler, runner)
    waiting = list(enumerate(lengths))[::-1]
    sent: dict[TokenSequence, float] = {}
    last: dict[TokenSequence, float] = {}
    ttft, itl, made = [], [], 0

    source = random.Random(0)
    coming: list[tuple[float, float]] = []  # when a request is with the engine, when its client sent it
    threads = [0.0] * front_threads  # until when they are busy

    def send(at_s: float) -> None:
        begins_s = max(at_s, heapq.heappop(threads))
        heapq.heappush(threads, begins_s + front_ms / 1e3)
        coming.append((begins_s + front_ms / 1e3, at_s))

    def take() -> None:
        number, (prompt, out) = waiting.pop()
        params = SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=out)
        (sequence,) = engine.add(Request(id=str(number), prompt_token_ids=(2,) * prompt, params=params))
        sent[sequence] = coming.pop(0)[1]

    at_s = 0.0
    for _ in range(len(waiting) if rate is not None else min(concurrency or len(waiting), len(waiting))):
        send(at_s)
        at_s += source.expovariate(rate) if rate is not None else 0.0
    while engine.has_work or coming:
        if not engine.has_work:
            clock.now_s = max(clock.now_s, coming[0][0])
        while coming and coming[0][0] <= clock.now_s:
            take()
        for output in engine.step():
            sequence, now = output.sequence, clock.now_s
            if output.error is not None:
                raise RuntimeError(output.error)
            made += 1
            if sequence in last:
                itl.append(1e3 * (now - last[sequence]))
            else:
                ttft.append(1e3 * (now - sent[sequence]))
            last[sequence] = now
            if output.finish_reason is not None and len(waiting) > len(coming):
                send(now)
    names = Counter[str]()
    for shape, count in runner.shapes.items():
        names[f"decode {shape.rows}" if shape.decode else f"mixed {shape.tokens}"] += count
    steps = runner.shapes.total()
    return Simulated(clock.now_s, made, steps, dict(runner.spent_ms), dict(names), 1e3 * runner.idle_s, ttft, itl)


def offline_lengths(requests: int = WORKLOAD_REQUESTS) -> list[Lengths]:
    prompts, outs = workload(requests, WORKLOAD_TOKENS, 10_000)
    return [(len(prompt), out) for prompt, out in zip(prompts, outs, strict=True)]


def drawn(requests: int, prompt: int, answer: int, ratio: float) -> list[Lengths]:
    """Uniform between ratio times the length and the length."""
    source = random.Random(0)
    draw = lambda most: source.randint(max(1, round(ratio * most)), most)  # noqa: E731
    return [(draw(prompt), draw(answer)) for _ in range(requests)]


def report(found: Simulated) -> str:
    lines = [f"{found.rate:,.0f} tok/s: {found.output_tokens} tokens, {found.seconds:.2f} s, {found.steps} steps"]
    for name, ms in sorted(found.spent_ms.items()):
        kind = name.partition("/")[2]
        count = f" in {found.shapes[kind]} steps" if kind in found.shapes else ""
        lines.append(f"  {kind:28} {ms / 1e3:7.3f} s {ms / found.seconds / 10:5.1f}%{count}")
    lines.append(f"  {'device idle':28} {found.idle_ms / 1e3:7.3f} s")
    ttft, itl = ([quantile(of, share) for share in (0.5, 0.99)] for of in (found.ttft_ms, found.itl_ms))
    lines.append(f"  TTFT p50 {ttft[0]:.0f} p99 {ttft[1]:.0f} ms; ITL p50 {itl[0]:.1f} p99 {itl[1]:.1f} ms")
    return "\n".join(lines)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting; VALUE as JSON")
    parser.add_argument("--costs", choices=COSTS, default="now")
    parser.add_argument("--whole", action="store_true", help="prompts are not cut at padded sizes")
    parser.add_argument("--serve", default="", help="concurrencies of a closed loop, greedy")
    parser.add_argument("--rate", default="", help="or requests a second, at random")
    parser.add_argument("--front", type=float, default=0.0, help="ms of the server's front for a prompt")
    parser.add_argument("--front-threads", type=int, default=1, help="that do so at a time")
    parser.add_argument("--waves", type=int, default=2, help="requests a unit of concurrency")
    parser.add_argument("--input", type=int, default=1024)
    parser.add_argument("--output", type=int, default=1024)
    parser.add_argument("--ratio", type=float, default=1.0, help="lengths are drawn from RATIO times these to these")
    parser.add_argument("--attention", type=float, help="TB/s of decode attention")
    parser.add_argument("--products", type=float, default=1.0, help="factor on products of up to 256 tokens")
    parser.add_argument("--prefill", type=float, help="us a token of products in steps of 1024 tokens or more")
    parser.add_argument("--sampler", type=float, help="us of a row that draws")
    return parser.parse_args(words)


def changed(costs: Costs, given: argparse.Namespace) -> Costs:
    """The what-ifs of the command line."""
    few = [(tokens, ms * given.products) for tokens, ms in costs.products if tokens <= FEW_TOKENS]
    many = [(tokens, ms) for tokens, ms in costs.products if tokens > FEW_TOKENS]
    if given.prefill:
        many = [(tokens, tokens * given.prefill / 1e3) for tokens, _ in many]
    return dataclasses.replace(
        costs,
        products=(*few, *many),
        attention_bytes_per_s=given.attention * 1e12 if given.attention else costs.attention_bytes_per_s,
        sampler_row_ms=given.sampler / 1e3 if given.sampler is not None else costs.sampler_row_ms,
    )


def main(words: Sequence[str] | None = None) -> None:
    given = arguments(words)
    costs, padding = changed(COSTS[given.costs], given), Padding() if given.whole else None
    config = configured(**{name: json.loads(value) for name, _, value in (pair.partition("=") for pair in given.set)})
    if not (given.serve or given.rate):
        print(report(simulate(offline_lengths(), config, costs, padding=padding)))
    clients, rates = ([word for word in text.split(",") if word] for text in (given.serve, given.rate))
    loops = [(f"concurrency {word}", int(word) * given.waves, {"concurrency": int(word)}) for word in clients]
    loops += [(f"{word} requests a second", 100 * given.waves, {"rate": float(word)}) for word in rates]
    for name, requests, how in loops:
        lengths = drawn(requests, given.input, given.output, given.ratio)
        how |= {"front_ms": given.front, "front_threads": given.front_threads}
        found = simulate(lengths, config, costs, temperature=0.0, padding=padding, **how)  # type: ignore[arg-type]
        print(f"{name}: {report(found)}")


if __name__ == "__main__":
    main()
