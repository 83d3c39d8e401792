"""jaxllm profile: a trace of a steady window of decode steps, and its device time by named scope.

In: an engine and how many rows, which context, how many tokens. Out: a trace folder (for TensorBoard) and a table.

A trace names what ran: on a CPU by HLO instruction, on a GPU by kernel, as a step runs there as CUDA graphs. The scope
of an instruction (`jax.named_scope`, jitted functions) stands in the compiled step's own text. A kernel is named after
its instruction or, where identical kernels are shared, after the first of them; those of libraries and of ours carry
names of their own and get the next instruction of that sort in the text, which lists them in the order they run in.
The table holds kernel times and says nothing of the gaps between them; the step's time is what `jaxllm bench` measures.
"""

from __future__ import annotations

import dataclasses
import random
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxllm.core import JaxLLMError, SamplingParams
from jaxllm.engine.engine import Engine

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\((.*)$", re.MULTILINE)
OP_NAME = re.compile(r"op_name=\"([^\"]*)\"")
MODULE = re.compile(r"^HloModule ([\w.\-]+)", re.MULTILINE)
ENTRY = re.compile(r"^ENTRY .*?\{$(.*?)^\}", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"([._]\d+)+$")
JITTED = re.compile(r"jit\((\w+)\)$")
MACHINERY = frozenset(
    {"call_exported", "while", "body", "cond", "closed_call", "shard_map", "pallas_call", "eval_jaxpr"}
)
LAUNCH_NOTHING = frozenset(
    {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id"}
)
LOOK_AHEAD = 24  # instructions; a kernel's own is never further from the one before
UNKNOWN = "(no scope)"
STATS = ("hlo_module", "program_id", "hlo_op")
LAUNCH = "correlation_id"  # of a CUDA graph: the same for all its kernels


class ProfileError(JaxLLMError):
    """No trace of a steady window could be taken."""


@dataclass(frozen=True)
class Event:
    """One thing a device did. `op` is its HLO instruction, or the CUDA graph it was in; empty: the trace is silent.

    `seconds` are its own, without those of the events inside it: a loop's body counts once.
    """

    name: str
    module: str
    program: str
    op: str
    seconds: float
    launch: str = ""


@dataclass(frozen=True)
class Module:
    """A compiled module: the op_name of every instruction, and what its entry launches, in that order."""

    name: str
    scopes: Mapping[str, str]
    kernels: Mapping[str, str]  # the same by the name of a kernel that is named after its instruction
    entry: tuple[tuple[str, str], ...]  # (instruction, opcode)


def kernel_name(instruction: str) -> str:
    return re.sub(r"[.\-]", "_", instruction)


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
        engine.drain()
        before = engine.scheduler.metrics.steps
        jax.profiler.start_trace(str(folder))
        try:
            tokens = _turn_until(engine, batch, batch * steps) + len(engine.drain())
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
            if not devices:
                yield from _own_times(line.events)
            elif line.name.startswith("Stream"):  # other lines are derived from the streams: the same time again
                yield from map(_event, sorted(line.events, key=lambda event: event.start_ns))


def _event(event: Any) -> Event:
    stats = {str(name): str(value) for name, value in event.stats if name in STATS or name == LAUNCH}
    module, program, op = (stats.get(name, "") for name in STATS)
    return Event(event.name, module, program, op, event.duration_ns * 1e-9, stats.get(LAUNCH, ""))


def _own_times(events: Iterable[Any]) -> Iterator[Event]:
    """The HLO instructions one thread ran."""
    found: list[tuple[Event, float]] = []  # and when it ended
    inside: list[int] = []  # places in `found` of the events that are still running
    for raw in sorted(events, key=lambda event: (event.start_ns, -event.duration_ns)):
        event = _event(raw)
        if not event.op:
            continue
        while inside and found[inside[-1]][1] <= raw.start_ns:
            inside.pop()
        if inside:
            outer, end = found[inside[-1]]
            found[inside[-1]] = dataclasses.replace(outer, seconds=max(outer.seconds - event.seconds, 0.0)), end
        inside.append(len(found))
        found.append((event, raw.start_ns + raw.duration_ns))
    yield from (event for event, _ in found)


# ---- whose time it was ----


def read_module(text: str) -> Module:
    """From a compiled module as XLA prints it, in the order of its schedule."""
    name = MODULE.search(text)
    scopes = {
        instruction: op_name[1]
        for instruction, _, rest in INSTRUCTION.findall(text)
        if (op_name := OP_NAME.search(rest)) is not None
    }
    body = ENTRY.search(text)
    entry = [(i, opcode) for i, opcode, _ in INSTRUCTION.findall(body[1] if body else "")]
    kernels = {kernel_name(instruction): op_name for instruction, op_name in scopes.items()}
    return Module(name[1] if name else "", scopes, kernels, tuple(e for e in entry if e[1] not in LAUNCH_NOTHING))


def choose_modules(events: Iterable[Event], modules: Sequence[Module]) -> dict[tuple[str, str], Module]:
    """(module, program) of the trace -> the compiled module it was.

    A step is compiled once a bucket, always under the same name: of those, the one that knows most of what was seen.
    """
    seen: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for event in events:
        seen[event.module, event.program] |= {event.op, event.name}
    known = [(module, module.scopes.keys() | module.kernels) for module in modules]
    chosen: dict[tuple[str, str], Module] = {}
    for (name, program), ops in seen.items():
        candidates = [(module, names) for module, names in known if module.name == name]
        if candidates:
            best = max(candidates, key=lambda candidate: (len(ops & candidate[1]), -len(candidate[1])))
            chosen[name, program] = best[0]
    return chosen


@dataclass
class Follower:
    """Follows one module's kernels through its text, to know those that are not named after an instruction."""

    module: Module
    at: int = 0
    graph: tuple[str, str] = ("", "")  # the CUDA graph's name and launch
    seen: set[str] = field(default_factory=set)  # graphs of this run of the module
    last: str | None = None

    def op_name(self, event: Event) -> str | None:
        if event.op in self.module.scopes:
            return self.module.scopes[event.op]
        if (event.op, event.launch) != self.graph:
            if event.op in self.seen:  # the module runs anew
                self.at, self.seen = 0, set()
            self.seen.add(event.op)
            self.graph = event.op, event.launch
        self._advance(event.name)
        return self.last

    def _advance(self, kernel: str) -> None:
        """Step over the kernel's instruction. A copy or a library's helper has none and counts to the one before."""
        named = self.module.kernels.get(kernel)
        base = NUMBER.sub("", kernel)
        for place, (instruction, opcode) in enumerate(self.module.entry[self.at : self.at + LOOK_AHEAD]):
            if named is None and opcode == "fusion":
                return  # that one's kernel would have come first
            if NUMBER.sub("", kernel_name(instruction)) == base if named is not None else opcode == "custom-call":
                self.at += place + 1
                self.last = self.module.scopes.get(instruction, self.last)
                break
        self.last = named or self.last


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


def by_scope(events: Sequence[Event], modules: Sequence[Module], depth: int = 2) -> list[ScopeTime]:
    """Device time of each scope, most first."""
    followers = {key: Follower(module) for key, module in choose_modules(events, modules).items()}
    seconds: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    kernels: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        follower = followers.get((event.module, event.program))
        op_name = None if follower is None else follower.op_name(event)
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
