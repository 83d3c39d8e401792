"""jaxllm profile: a trace of a steady window of decode steps, and its device time by named scope.

In: an engine and how many rows, which context, how many tokens. Out: a trace folder (for TensorBoard) and a table.

A trace names what ran by kernel and HLO instruction; the scope of an instruction (`jax.named_scope`, jitted functions)
stands in the compiled step's own text. While a trace is taken, XLA runs a step kernel by kernel instead of as one CUDA
graph, so the table holds kernel times and says nothing of gaps; the step's time is what `jaxllm bench` measures.
"""

from __future__ import annotations

import dataclasses
import random
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxllm.core import JaxLLMError, SamplingParams
from jaxllm.engine.engine import Engine

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{[^}]*?op_name=\"([^\"]*)\"", re.MULTILINE)
MODULE = re.compile(r"^HloModule ([\w.\-]+)", re.MULTILINE)
JITTED = re.compile(r"jit\((\w+)\)$")
MACHINERY = frozenset({"while", "body", "cond", "closed_call", "shard_map", "pallas_call", "eval_jaxpr"})
UNKNOWN = "(no scope)"
STATS = ("hlo_module", "program_id", "hlo_op")
Scopes = Mapping[str, str]  # instruction -> op_name, of one compiled module


class ProfileError(JaxLLMError):
    """No trace of a steady window could be taken."""


@dataclass(frozen=True)
class Event:
    """One thing a device did. `op` is its HLO instruction, of a module by name and number; empty: the trace is silent.

    `seconds` are its own, without those of the events inside it: a loop's body counts once.
    """

    name: str
    module: str
    program: str
    op: str
    seconds: float


@dataclass(frozen=True)
class Window:
    """What ran while the trace was taken."""

    folder: Path
    steps: int
    tokens: int


def trace_window(engine: Engine, folder: Path, *, batch: int, context: int, steps: int) -> Window:
    """Bring `batch` rows to decoding at `context`, then trace turns of the engine until each row has `steps` more."""
    source = random.Random(0)
    vocab = engine.model_config.vocab_size
    settle = 8
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=settle + 4 * steps + 64, detokenize=False)
    for row in range(batch):
        prompt = [source.randrange(vocab) for _ in range(context)]
        engine.add(engine.make_request(prompt, params, request_id=f"profile-{row}"))
    try:
        _turn_until(engine, batch, batch * settle)
        before = engine.scheduler.metrics.steps
        jax.profiler.start_trace(str(folder))
        try:
            tokens = _turn_until(engine, batch, batch * steps)
        finally:
            jax.profiler.stop_trace()
    finally:
        for row in range(batch):
            engine.abort(f"profile-{row}")
        while engine.has_work:
            engine.step()
    return Window(folder, engine.scheduler.metrics.steps - before, tokens)


def _turn_until(engine: Engine, batch: int, wanted: int) -> int:
    """Turns until `wanted` tokens came in turns in which every row got one: nothing but decoding."""
    made = 0
    while made < wanted:
        if not engine.has_work:
            raise ProfileError("the requests ended before the window was over")
        outputs = engine.step()
        tokens = [output.sequence for output in outputs if output.token_id is not None]
        made += len(tokens) if len({sequence.request.id for sequence in tokens}) == batch else 0
    return made


# ---- reading the trace ----


def read_events(folder: Path) -> list[Event]:
    """Every device event of the newest trace under `folder`; on a CPU the instructions its threads ran."""
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ProfileError(f"{folder} holds no trace")
    with warnings.catch_warnings():
        # JAX's reader makes its types on first use, with a warning about itself; as an error it would end the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        return list(_events(jax.profiler.ProfileData.from_file(str(files[-1]))))


def _events(data: Any) -> Iterator[Event]:
    planes = list(data.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in devices or [plane for plane in planes if plane.name.startswith("/host:CPU")]:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue  # lines derived from the streams: the same time again
            yield from _own_times(line.events, bool(devices))


def _own_times(events: Iterable[Any], every: bool) -> Iterator[Event]:
    """The events of one thread or stream, those without an HLO instruction only if `every`."""
    found: list[tuple[Event, float]] = []  # and when it ended
    inside: list[int] = []  # places in `found` of the events that are still running
    for event in sorted(events, key=lambda event: (event.start_ns, -event.duration_ns)):
        stats = {str(name): str(value) for name, value in event.stats if name in STATS}
        if not every and "hlo_op" not in stats:
            continue
        while inside and found[inside[-1]][1] <= event.start_ns:
            inside.pop()
        seconds = event.duration_ns * 1e-9
        if inside:
            outer, end = found[inside[-1]]
            found[inside[-1]] = dataclasses.replace(outer, seconds=max(outer.seconds - seconds, 0.0)), end
        module, program, op = (stats.get(name, "") for name in STATS)
        inside.append(len(found))
        found.append((Event(event.name, module, program, op, seconds), event.start_ns + event.duration_ns))
    yield from (event for event, _ in found)


def scopes_of(text: str) -> tuple[str, Scopes]:
    """A compiled module's name, and its instructions' op_names."""
    module = MODULE.search(text)
    return module[1] if module else "", dict(INSTRUCTION.findall(text))


def choose_scopes(events: Iterable[Event], modules: Sequence[tuple[str, Scopes]]) -> dict[tuple[str, str], Scopes]:
    """(module, program) of the trace -> the compiled module it was.

    A step is compiled once a bucket, always under the same name: of those, the one that knows most instructions seen.
    """
    seen: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for event in events:
        seen[event.module, event.program].add(event.op)
    chosen: dict[tuple[str, str], Scopes] = {}
    for (module, program), ops in seen.items():
        candidates = [scopes for name, scopes in modules if name == module]
        if candidates:
            chosen[module, program] = max(candidates, key=lambda scopes: (len(ops & scopes.keys()), -len(scopes)))
    return chosen


def short_scope(op_name: str, depth: int) -> str:
    """jit(forward)/attention/jit(paged)/while/dot_general -> attention/paged: scopes and functions, at most `depth`."""
    outer, *inner = [name[1] if (name := JITTED.fullmatch(part)) else part for part in op_name.split("/")[:-1]] or [""]
    names = [name for name in inner if name.isidentifier() and not name.startswith("_") and name not in MACHINERY]
    return "/".join(names[:depth]) or outer or UNKNOWN


@dataclass(frozen=True)
class ScopeTime:
    scope: str
    seconds: float
    calls: int
    longest: str  # the kernel with the most time


def by_scope(events: Sequence[Event], modules: Sequence[tuple[str, Scopes]], depth: int = 2) -> list[ScopeTime]:
    """Device time of each scope, most first."""
    chosen = choose_scopes(events, modules)
    seconds: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    kernels: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        op_name = chosen.get((event.module, event.program), {}).get(event.op)
        scope = UNKNOWN if op_name is None else short_scope(op_name, depth)
        seconds[scope] += event.seconds
        calls[scope] += 1
        kernels[scope][event.name] += event.seconds
    most_first = sorted(seconds.items(), key=lambda item: -item[1])
    return [ScopeTime(s, t, calls[s], max(kernels[s], key=lambda name: kernels[s][name])) for s, t in most_first]


def table(times: Sequence[ScopeTime], steps: int) -> str:
    """Markdown: milliseconds and kernels a step by scope."""
    total = sum(time.seconds for time in times) or 1.0
    rows = [
        f"| {time.scope} | {time.seconds / steps * 1e3:.3f} | {time.seconds / total:.1%} | {time.calls / steps:.1f} "
        f"| {time.longest[:60]} |"
        for time in times
    ]
    head = ["| scope | ms a step | share | kernels a step | longest kernel |", "| --- | --- | --- | --- | --- |"]
    whole = f"| all | {total / steps * 1e3:.3f} | 100% | {sum(time.calls for time in times) / steps:.1f} | |"
    return "\n".join([*head, *rows, whole])
