"""`jaxllm bench` and `jaxllm profile`: options in, a table on stdout and JSON or a trace folder out.

A bench sets what its figures need (prefix cache off, room for the batches and contexts) unless a recipe or --set says
otherwise; a model directory without weights gets random ones. Knows nothing of how figures are measured.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxllm.config import ConfigError, load, model_directory, setting_names
from jaxllm.core import SamplingParams
from jaxllm.tools.figures import Figure, as_json, machine, table
from serve.commands.bench_serve import serve as bench_serve

if TYPE_CHECKING:
    from jaxllm.engine.engine import Engine
    from jaxllm.engine.process.remote import RemoteEngine
    from jaxllm.engine.replicas import ReplicatedEngine
    from jaxllm.llm import LLM
    from jaxllm.tools.bench import Bench, Counted

OpenLLM = Callable[[str | None, Path | None, Sequence[str]], "LLM"]

Model = Annotated[str | None, typer.Argument(help="Model directory; default: the bundled model.", show_default=False)]
Config = Annotated[Path | None, typer.Option(help="TOML file of settings; used as it is.", show_default=False)]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any setting; repeatable.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write the figures to this JSON file.")]
Repeats = Annotated[int, typer.Option(min=1, help="Measure each figure this often; medians are shown.")]
Label = Annotated[str, typer.Option(help="Which build this is, kept in the JSON, such as a commit.")]


def numbers(text: str) -> list[int]:
    """1,8,32"""
    parts = [part for part in text.split(",") if part.strip()]
    if not all(re.fullmatch(r"\s*[1-9]\d*\s*", part) for part in parts):
        raise ConfigError(f"{text!r}: must be a list of integers >= 1, such as 1,8,32")
    return [int(part) for part in parts]


def with_defaults(model: str | None, config: Path | None, given: Sequence[str] | None, **wanted: Any) -> list[str]:
    """--set pairs of what a bench needs, then the ones given; a recipe leaves only those given."""
    if config is not None:
        return list(given or ())
    names = setting_names()
    taken = {names.get(pair.partition("=")[0].strip().replace("-", "_")) for pair in given or ()}
    directory = model_directory(load(model=model).model.path)
    if not any(directory.glob("*.safetensors")):
        wanted["load_format"] = "dummy"
    added = [f"{name}={json.dumps(value)}" for name, value in wanted.items() if names[name] not in taken]
    return [*added, *(given or ())]


def longest(model: str | None, tokens: int) -> int:
    """max_model_len for requests of so many tokens; ConfigError if the model's context is shorter."""
    from jaxllm.graph.models.config import ModelConfig

    context = ModelConfig.from_directory(model_directory(load(model=model).model.path)).context_length
    if tokens > context:
        raise ConfigError(f"this needs {tokens} tokens a request; the model's context is {context}")
    return min(max(4096, tokens), context)


def process_age_s() -> float:
    """Seconds since this process was started, by the kernel's clock (to 10 ms)."""
    started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    up_s = float(Path("/proc/uptime").read_text().split()[0])
    return up_s - started_ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Subject:
    """The engine that is measured, and what is told of it beside its figures."""

    bench: Bench
    metrics: Counted
    about: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        return {**self.about, "compiles_after_ready": self.metrics.compiles_after_ready}


def write(figures: Sequence[Figure], out: Path | None, label: str, subject: Subject | None = None) -> None:
    """The table to stdout; with what was measured beside it, to a file."""
    facts = {} if subject is None else subject.facts()
    typer.echo(table(figures))
    if subject is not None:
        typer.echo(f"compiles after ready: {facts['compiles_after_ready']}", err=True)
    if out is None:
        return
    about = {**machine(facts.pop("device", "")), "commit": label, "command": " ".join(["jaxllm", *sys.argv[1:]])}
    document = {**about, **facts, "seconds": round(process_age_s(), 1), "figures": [as_json(f) for f in figures]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")


def _heard(figures: Iterable[Figure]) -> list[Figure]:
    """Each figure told as it comes: a long run shows where it is, and an interrupted one what it had."""
    found = []
    for figure in figures:
        found.append(figure)
        typer.echo(f"{figure.what}, {figure.at}: {figure.value:.4g} {figure.unit}", err=True)
    return found


def _measurable(llm: LLM) -> tuple[Engine | ReplicatedEngine | RemoteEngine, Counted]:
    """An engine that LLM started, and its counts."""
    from jaxllm.engine.engine import Engine
    from jaxllm.engine.replicas import ReplicatedEngine

    if isinstance(llm.engine, Engine | ReplicatedEngine):
        return llm.engine, llm.engine.scheduler.metrics
    from jaxllm.engine.process.remote import RemoteEngine

    if isinstance(llm.engine, RemoteEngine):
        return llm.engine, llm.engine.counts
    raise ConfigError("a bench needs an engine that computes all of it: disaggregation.role must be none")


def _subject(llm: LLM, repeats: int) -> Subject:
    """The bench of this model on the device that its engine found; that device's name, and where start-up went."""
    from jaxllm.tools.bench import Bench, floors

    engine, metrics = _measurable(llm)
    assert llm.report is not None
    device = llm.report.device_kind
    phases = {name: round(s, 3) for name, s in llm.report.seconds.items()}
    about = {"device": device, "ready_s": round(process_age_s(), 2), "start_phases_s": phases}
    llm.generate([[0, 1, 2, 3]], SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1), use_tqdm=False)
    about["first_token_s"] = round(process_age_s(), 2)
    config = engine.config
    about["mesh"] = str(config.mesh)
    known = device if config.mesh.size == 1 else ""  # floors are one device's
    least = floors(engine.model_config, known, config.model.quantization, config.cache.kv_dtype)
    return Subject(Bench(llm, least, metrics, repeats), metrics, about)


@dataclass(frozen=True)
class Commands:
    """The verbs, over a way to open a model."""

    open_llm: OpenLLM

    def latency(
        self,
        model: Model = None,
        config: Config = None,
        batch: Annotated[str, typer.Option(help="Rows that decode together.")] = "1,8,32",
        context: Annotated[str, typer.Option(help="Tokens before the first that is timed.")] = "1024",
        prefill: Annotated[str, typer.Option(help="Prompt lengths; empty for none.")] = "1024",
        requests: Annotated[int, typer.Option(min=0, help="Then `throughput` with so many, in the same engine.")] = 0,
        repeats: Repeats = 3,
        settings: Settings = None,
        out: Out = None,
        label: Label = "",
    ) -> None:
        """Decode step and prefill in milliseconds, beside what the hardware allows."""
        batches, contexts, prefills = numbers(batch), numbers(context), numbers(prefill)
        need = max([256 + c for c in contexts] + [16 + p for p in prefills] + [2049 if requests else 0])
        wanted = dict(prefix_cache=False, max_model_len=longest(model, need))
        if not requests:
            wanted["max_num_seqs"] = max(batches, default=1)
        llm = self.open_llm(model, config, with_defaults(model, config, settings, **wanted))
        subject = _subject(llm, repeats)
        figures = _heard(subject.bench.latency(batches, contexts, prefills))
        figures += _heard([subject.bench.throughput(requests)] if requests else [])
        write(figures, out, label, subject)

    def throughput(
        self,
        model: Model = None,
        config: Config = None,
        requests: Annotated[int, typer.Option(min=1)] = 256,
        shortest: Annotated[int, typer.Option(min=1, help="Fewest tokens of a prompt and of an answer.")] = 100,
        most: Annotated[int, typer.Option(min=1, help="Most tokens of a prompt and of an answer.")] = 1024,
        repeats: Repeats = 1,
        settings: Settings = None,
        out: Out = None,
        label: Label = "",
    ) -> None:
        """Output tokens a second of requests that all come at once: the workload of nano-vllm and mini-sglang."""
        if shortest > most:
            raise ConfigError(f"--shortest {shortest}: must be at most --most {most}")
        wanted = dict(prefix_cache=False, max_model_len=longest(model, 2 * most + 1))
        llm = self.open_llm(model, config, with_defaults(model, config, settings, **wanted))
        subject = _subject(llm, repeats)
        write(_heard([subject.bench.throughput(requests, (shortest, most))]), out, label, subject)

    def prefix(
        self,
        model: Model = None,
        config: Config = None,
        shared: Annotated[str, typer.Option(help="Tokens of the prefix.")] = "8192",
        repeats: Repeats = 3,
        settings: Settings = None,
        out: Out = None,
        label: Label = "",
    ) -> None:
        """Time to first token behind a prefix that is new, and behind one that another prompt has brought."""
        lengths = numbers(shared)
        wanted = dict(prefix_cache=True, max_model_len=longest(model, max(lengths, default=1) + 64))
        llm = self.open_llm(model, config, with_defaults(model, config, settings, **wanted))
        subject = _subject(llm, repeats)
        write(_heard(subject.bench.shared_prefix(lengths)), out, label, subject)

    def startup(
        self,
        model: Model = None,
        config: Config = None,
        repeats: Repeats = 1,
        settings: Settings = None,
        out: Out = None,
        label: Label = "",
    ) -> None:
        """Seconds from process start to first token: a cold compile cache, then a warm one; by phase."""
        from jaxllm.tools.bench import startup

        options = ["--config", str(config)] if config is not None else []
        for pair in with_defaults(model, config, settings):
            options += ["--set", pair]
        child = [sys.executable, "-m", "serve.cli", "bench", "first-token", *([model] if model else []), *options]
        write(_heard(startup([*child, "--cache-dir"], repeats)), out, label)

    def first_token(
        self, cache_dir: Annotated[str, typer.Option()], model: Model = None, config: Config = None,
        settings: Settings = None,
    ) -> None:  # fmt: skip
        """What `startup` times."""
        from jaxllm.tools.bench import report_first_token

        llm = self.open_llm(model, config, [*(settings or ()), f"cache_dir={json.dumps(cache_dir)}"])
        engine, _ = _measurable(llm)
        assert llm.report is not None
        report, vocabulary = llm.report, engine.model_config.vocab_size
        typer.echo(report_first_token(llm, report.total_s, report.seconds, vocabulary))

    def profile(
        self,
        model: Model = None,
        config: Config = None,
        batch: Annotated[int, typer.Option(min=1, help="Rows that decode together.")] = 8,
        context: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 256,
        steps: Annotated[int, typer.Option(min=1, help="Decode steps to trace.")] = 16,
        depth: Annotated[int, typer.Option(min=1, help="Names of a scope to keep.")] = 2,
        trace: Annotated[Path, typer.Option(help="Folder of the trace, for TensorBoard or Perfetto.")] = Path("trace"),
        settings: Settings = None,
    ) -> None:
        """Trace a steady window of decode steps; device time by named scope."""
        from jaxllm.engine.engine import Engine
        from jaxllm.engine.runner import Runner
        from jaxllm.tools import profiler

        wanted = dict(prefix_cache=False, max_num_seqs=batch, max_model_len=longest(model, context + 4 * steps + 80))
        llm = self.open_llm(model, config, with_defaults(model, config, settings, **wanted))
        if not isinstance(llm.engine, Engine) or not isinstance(llm.engine.runner, Runner):
            raise ConfigError("a profile needs an engine of this process")
        window = profiler.trace_window(llm.engine, trace, batch=batch, context=context, steps=steps)
        modules = [profiler.read_module(text) for text in llm.engine.runner.executables.texts()]
        typer.echo(profiler.table(profiler.by_scope(profiler.read_events(trace), modules, depth), window.steps))
        typer.echo(f"{window.steps} steps, {window.tokens} tokens; trace in {trace}", err=True)


def add_commands(app: typer.Typer, open_llm: OpenLLM) -> None:
    """`jaxllm bench …` and `jaxllm profile`."""
    commands = Commands(open_llm)
    bench = typer.Typer(
        help="Measure decode step, prefill, throughput, start-up, or a server under load.", no_args_is_help=True
    )
    bench.command("latency")(commands.latency)
    bench.command("throughput")(commands.throughput)
    bench.command("prefix")(commands.prefix)
    bench.command("startup")(commands.startup)
    bench.command("first-token", hidden=True)(commands.first_token)
    bench.command("serve")(bench_serve)
    app.add_typer(bench, name="bench")
    app.command("profile")(commands.profile)
