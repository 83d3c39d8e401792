"""`jaxllm serve`: flags and a recipe in, a running server out. vLLM's spellings first, SGLang's as aliases.

What is wrong is said before anything slow starts: flags, the model's directory, the address. Knows nothing of requests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxllm.config import ConfigError, environment_api_key, load, load_table, model_directory, show
from jaxllm.core import JaxLLMError
from jaxllm.engine.messages import Ready
from jaxllm.logs import StderrLog, log_to_stderr
from serve.settings import FrontSettings, hash_key

if TYPE_CHECKING:
    from jaxllm.engine.process.links import Link

GIB = 2**30
MULTIPLES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}  # as vLLM reads them


def size(text: str) -> int:
    """4096, 32k (thousands) or 32K (1024s)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG]?)", str(text).strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no number such as 4096, 32k (x 1000) or 32K (x 1024)")
    return round(float(found[1]) * MULTIPLES.get(found[2], 1))


def size_or_auto(text: str) -> int:
    return 0 if str(text) in ("auto", "-1") else size(text)


ENGINE_FLAGS = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "block_size",
    "kv_cache_dtype",
    "num_pages",
    "enable_prefix_caching",
    "dtype",
    "load_format",
    "quantization",
    "packed_weights",
    "scheduling_policy",
    "seed",
    "log_level",
    "data_parallel_size",
    "pipeline_parallel_size",
    "context_parallel_size",
    "expert_parallel_size",
    "tensor_parallel_size",
    "enable_dp_attention",
    "num_redundant_experts",
    "disaggregation_mode",
    "prefill_workers",
    "prefill_listen",
)
FRONT_FLAGS = {  # flag -> setting
    "host": "host",
    "port": "port",
    "uds": "uds",
    "served_model_name": "model_names",
    "max_queue": "max_queue",
    "drain_timeout": "drain_timeout_s",
    "stall_timeout": "stall_s",
    "allowed_origin": "allowed_origins",
    "tool_call_parser": "tool_parser",
    "reasoning_parser": "reasoning_parser",
    "otlp_traces_endpoint": "otlp_traces_endpoint",
}
ALWAYS_ON = {  # vLLM's switches that are none here, and what to do who wants them off
    "enable_auto_tool_choice": "use --tool-call-parser none",
    "enable_chunked_prefill": "raise --max-num-batched-tokens above the longest prompt",
}
ModelArgument = Annotated[str | None, typer.Argument(help="Model directory; default: the bundled model.")]


def front_settings(table: dict[str, Any], flags: dict[str, Any], model: str, keys: dict[str, Any]) -> FrontSettings:
    """Flags beat the recipe's [server] table, which beats the defaults; ConfigError names what is unknown."""
    known = {item.name: item for item in dataclasses.fields(FrontSettings)} | {}
    for name in table:
        if name not in known or name in ("keys", "admin_keys"):
            raise ConfigError(f"unknown setting {name!r} in [server]; allowed: {', '.join(sorted(known))}")
    values = table | {name: value for name, value in flags.items() if value is not None}
    for name in ("model_names", "allowed_origins"):
        if name in values:
            values[name] = tuple(values[name])
    values.setdefault("model_names", (Path(model).name or model,))
    if "template_variables" in values:
        values["template_variables"] = frozenset(values["template_variables"])
    return FrontSettings(**values, **keys)


def read_keys(given: list[str] | None, file: Path | None, fallback: str | None = None) -> tuple[bytes, ...]:
    """Digests of the keys from flags, a file (one a line) and, when there are none, the environment."""
    found = list(given or ())
    if file is not None:
        try:
            found += [line.strip() for line in file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {file}: not readable: {error}") from None
    if not found and fallback:
        found = [fallback]
    if any(not key for key in found):
        raise ConfigError("an API key must not be empty")
    return tuple(dict.fromkeys(map(hash_key, found)))


def start_lines(ready: Ready, settings: FrontSettings, url: str) -> list[str]:
    """The four facts."""
    facts, lines = ready.facts, []
    if "weights_bytes" in facts:
        seconds = facts.get("total_s", 0.0)  # phases overlap
        phases = ", ".join(f"{name} {spent:.1f} s" for name, spent in facts.get("seconds", {}).items())
        lines.append(f"Model loading took {facts['weights_bytes'] / GIB:.2f} GiB memory and {seconds:.1f} s ({phases})")
    cache = f"{facts['cache_bytes'] / GIB:.2f} GiB, " if "cache_bytes" in facts else ""
    lines.append(f"KV cache: {cache}{ready.capacity_tokens:,} tokens")
    times = ready.capacity_tokens / ready.max_model_len
    lines.append(
        f"Maximum concurrency for {ready.max_model_len:,} tokens per request: {min(times, ready.max_num_seqs):.1f}x"
    )
    body = {"model": settings.model_names[0], "messages": [{"role": "user", "content": "Hello!"}]}
    key = " -H 'Authorization: Bearer <key>'" if settings.keys else ""
    if url.startswith("unix:"):
        target = f"--unix-socket {url[5:]} http://localhost/v1/chat/completions"
    else:
        target = f"{url}/v1/chat/completions"
    curl = f"curl {target} -H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'"
    return [*lines, f"Serving {settings.model_names[0]} at {url}   try: {curl}"]


def command(
    model: ModelArgument = None,
    model_path: Annotated[str | None, typer.Option("--model", "--model-path", help="The same, as a flag.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Recipe: TOML of settings.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; default 8000, 0 = any.")] = None,
    uds: Annotated[str | None, typer.Option(help="A unix socket instead of a port.")] = None,
    served_model_name: Annotated[list[str] | None, typer.Option(help="Name clients use; repeatable.")] = None,
    api_key: Annotated[list[str] | None, typer.Option(help="Key clients must send; repeatable.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File of keys, one a line.")] = None,
    admin_key: Annotated[list[str] | None, typer.Option("--admin-key", "--admin-api-key")] = None,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", "--context-length", parser=size_or_auto, metavar="SIZE")
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option("--max-num-seqs", "--max-running-requests", parser=size, metavar="SIZE")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option("--max-num-batched-tokens", "--max-prefill-tokens", parser=size, metavar="SIZE")
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option("--gpu-memory-utilization", "--mem-fraction-static")
    ] = None,
    block_size: Annotated[int | None, typer.Option("--block-size", "--page-size")] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="auto (the model's), or fp8: twice the tokens.")] = None,
    num_pages: Annotated[int | None, typer.Option("--num-gpu-blocks-override")] = None,
    enable_prefix_caching: Annotated[
        bool | None, typer.Option("--enable-prefix-caching/--no-enable-prefix-caching")
    ] = None,
    disable_radix_cache: Annotated[bool, typer.Option("--disable-radix-cache", help="SGLang's name for it.")] = False,
    dtype: Annotated[str | None, typer.Option()] = None,
    load_format: Annotated[str | None, typer.Option(help="auto, or dummy for random weights.")] = None,
    quantization: Annotated[str | None, typer.Option("--quantization", "-q", help="int8, int4 or fp8.")] = None,
    packed_weights: Annotated[
        bool | None, typer.Option("--packed-weights/--no-packed-weights", help="12 bits, lossless, for decode steps.")
    ] = None,
    scheduling_policy: Annotated[str | None, typer.Option("--scheduling-policy", "--schedule-policy")] = None,
    data_parallel_size: Annotated[int | None, typer.Option("--data-parallel-size", "--dp-size", "-dp")] = None,
    pipeline_parallel_size: Annotated[int | None, typer.Option("--pipeline-parallel-size", "--pp-size", "-pp")] = None,
    context_parallel_size: Annotated[int | None, typer.Option("--context-parallel-size", "-cp")] = None,
    expert_parallel_size: Annotated[int | None, typer.Option("--expert-parallel-size", "--ep-size", "-ep")] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option("--tensor-parallel-size", "--tp-size", "-tp")] = None,
    enable_dp_attention: Annotated[
        bool | None, typer.Option("--enable-dp-attention", help="Rows and pages a shard of -ep; shared experts.")
    ] = None,
    num_redundant_experts: Annotated[
        int | None, typer.Option("--num-redundant-experts", "--ep-num-redundant-experts", help="Slots for copies.")
    ] = None,
    disaggregation_mode: Annotated[
        str | None, typer.Option("--disaggregation-mode", "--kv-role", help="none, both, prefill or decode.")
    ] = None,
    prefill_workers: Annotated[str | None, typer.Option(metavar="HOST:PORT,...", help="For mode decode.")] = None,
    prefill_listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="For mode prefill.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", "--random-seed")] = None,
    max_queue: Annotated[int | None, typer.Option("--max-queue", "--max-queued-requests", parser=size)] = None,
    drain_timeout: Annotated[float | None, typer.Option(help="Seconds that requests in flight get at the end.")] = None,
    stall_timeout: Annotated[
        float | None, typer.Option(help="Seconds after which a hung step ends the engine.")
    ] = None,
    allowed_origin: Annotated[list[str] | None, typer.Option(help="CORS: an origin; repeatable.")] = None,
    tool_call_parser: Annotated[str | None, typer.Option(help="auto, none, or a format's name.")] = None,
    enable_auto_tool_choice: Annotated[bool, typer.Option(help="As in vLLM; always on here.")] = True,
    enable_chunked_prefill: Annotated[bool, typer.Option(help="As in vLLM; always on here.")] = True,
    reasoning_parser: Annotated[str | None, typer.Option(help="auto, none, qwen3 or deepseek_r1.")] = None,
    otlp_traces_endpoint: Annotated[str | None, typer.Option(help="OpenTelemetry: where spans go.")] = None,
    metrics_compat: Annotated[str | None, typer.Option(help="vllm: its metric names beside ours.")] = None,
    in_process: Annotated[bool, typer.Option(help="Engine in a thread of this process, to debug.")] = False,
    print_config: Annotated[bool, typer.Option(help="Print what would be used, and exit.")] = False,
    log_level: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Serve a model over HTTP, OpenAI-compatible."""
    given = {name: value for name, value in locals().items() if value is not None and value != []}
    try:
        raise typer.Exit(_serve(given))
    except JaxLLMError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def _serve(given: dict[str, Any]) -> int:
    """The flags that were given, by name; returns the exit code."""
    overrides = {name: given[name] for name in ENGINE_FLAGS if name in given}
    if "model" in given or "model_path" in given:
        overrides["model"] = given.get("model") or given["model_path"]
    if given["disable_radix_cache"]:
        overrides["enable_prefix_caching"] = False
    flags = {field: given[name] for name, field in FRONT_FLAGS.items() if name in given}
    if given.get("metrics_compat") == "vllm":
        flags["metrics_compat_vllm"] = True
    for name, instead in ALWAYS_ON.items():
        if not given[name]:
            raise ConfigError(f"--no-{name.replace('_', '-')}: it is always on here; {instead}")
    config = given.get("config")
    engine_config = load(config, **overrides)
    keys = {
        "keys": read_keys(given.get("api_key"), given.get("api_key_file"), environment_api_key()),
        "admin_keys": read_keys(given.get("admin_key"), None),
    }
    settings = front_settings(load_table(config, "server"), flags, engine_config.model.path, keys)
    if given["print_config"]:
        typer.echo(show(engine_config) + "\n" + show_front(settings), nl=False)
        return 0
    handler = log_to_stderr(engine_config.log_level.upper())
    if engine_config.disaggregation.role == "prefill":
        from serve.disagg.worker import run_worker

        return run_worker(engine_config)
    source = {"config_file": None if config is None else str(config), "overrides": overrides}
    return run(settings, model_directory(engine_config.model.path), source, in_process=given["in_process"], log=handler)


def show_front(settings: FrontSettings) -> str:
    """The [server] table; keys are never printed."""
    lines = ["[server]"]
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if item.name in ("keys", "admin_keys"):
            lines.append(f"# {len(value)} {item.name}")
        elif value is not None:
            shown = sorted(value) if isinstance(value, frozenset) else value
            lines.append(f"{item.name} = {json.dumps(shown)}")
    return "\n".join(lines) + "\n"


def link_of(settings: FrontSettings, source: dict[str, Any], *, in_process: bool) -> Link:
    """To one engine, in a thread or a process, or to a process a replica."""
    from jaxllm.engine.process.choice import in_processes
    from jaxllm.engine.process.links import ProcessLink, ThreadLink
    from jaxllm.engine.process.replicas import fleet

    if in_process:
        from serve.engine_process import build

        return ThreadLink(lambda: build(source), settings.stall_s)
    config = load(source["config_file"], **source["overrides"])
    if "group" not in source and in_processes(config):
        return fleet(config, stall_s=settings.stall_s)
    told = json.dumps({**source, "stall_s": settings.stall_s}).encode()
    return ProcessLink([sys.executable, "-m", "serve.engine_process"], told)


def run(settings: FrontSettings, directory: Path, source: dict[str, Any], *, in_process: bool, log: StderrLog) -> int:
    """Binds, starts, serves; returns the exit code."""
    from serve.client import EngineClient, Supervision
    from serve.front import Front
    from serve.metrics import FrontMetrics
    from serve.run import bind, serve
    from serve.texts import open_tokenizer
    from serve.tracing import make_tracer, span_observer

    bound = bind(settings)
    tokenizer, warnings = open_tokenizer(directory)
    for warning in warnings:
        logging.getLogger(__name__).warning("%s", warning)
    client = EngineClient(
        link_of(settings, source, in_process=in_process),
        tokenizer,
        Supervision(unhealthy_s=settings.unhealthy_s),
        stream_limit_tokens=settings.stream_limit_tokens,
        queue_timeout_s=settings.queue_timeout_s,
    )
    metrics = FrontMetrics(settings.model_names[0] if settings.metrics_compat_vllm else None, log=log)
    end_tracing = lambda: None  # noqa: E731
    if settings.otlp_traces_endpoint is not None:
        tracer, end_tracing = make_tracer(settings.otlp_traces_endpoint, "jaxllm")
        metrics.observers.append(span_observer(tracer, settings.model_names[0]))
    try:
        front = Front(settings, client, metrics, tokenizer)
    except ValueError as error:
        raise ConfigError(str(error)) from None

    def on_ready(url: str) -> None:
        ready = client.health.ready
        with contextlib.suppress(OSError):  # a full disk behind standard output is no reason not to serve
            for line in start_lines(ready, settings, url) if ready is not None else ():
                typer.echo(line)

    try:
        return serve(front, bound, on_ready)
    finally:
        end_tracing()
