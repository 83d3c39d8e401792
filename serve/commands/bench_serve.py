"""`jaxllm bench serve`: flags in, a table and JSON out. vLLM's spellings and metric names. See serve.loadgen."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxllm.config import ConfigError, environment_api_key

DEFAULT_URL = "http://127.0.0.1:8000"
ROWS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2el": "End to end",
}


def serve(
    base_url: Annotated[str, typer.Option("--base-url", "--url", help="Any server of OpenAI's API.")] = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="Default: the server's first.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1)] = 100,
    request_rate: Annotated[float, typer.Option(help="Requests a second; inf = no waiting.")] = math.inf,
    burstiness: Annotated[float, typer.Option(help="1 = Poisson, below 1 = bursts.")] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Closed loop: so many at a time.")] = None,
    dataset_name: Annotated[str, typer.Option(help="random, or sharegpt for lengths like its.")] = "random",
    random_input_len: Annotated[int, typer.Option("--random-input-len", "--input-len", min=1)] = 256,
    random_output_len: Annotated[int, typer.Option("--random-output-len", "--output-len", min=1)] = 128,
    random_range_ratio: Annotated[float, typer.Option(min=0, max=0.99)] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="/v1/chat/completions instead of /v1/completions.")] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos/--no-ignore-eos")] = True,
    temperature: Annotated[float, typer.Option()] = 0.0,
    goodput: Annotated[list[str] | None, typer.Option(help="ttft:MS, tpot:MS, e2el:MS; repeatable.")] = None,
    metric_percentiles: Annotated[str, typer.Option(help="Such as 50,99.")] = "90,99",
    request_timeout: Annotated[float, typer.Option(help="Seconds one request may take.", min=0.001)] = 6 * 3600,
    seed: Annotated[int, typer.Option()] = 0,
    api_key: Annotated[str | None, typer.Option(help="Else JAXLLM_API_KEY.")] = None,
    result_filename: Annotated[Path | None, typer.Option("--result-filename", "--out", help="JSON.")] = None,
) -> None:
    """Send requests and measure: open loop (--request-rate) or closed (--max-concurrency)."""
    from serve import loadgen
    from serve.http_client import Target

    if dataset_name not in ("random", "sharegpt"):
        raise ConfigError(f"--dataset-name {dataset_name!r}: must be random or sharegpt")
    if not request_rate > 0 or not 0 < burstiness < math.inf:
        raise ConfigError("--request-rate and --burstiness must be above 0")
    try:
        percentiles = [float(one) for one in metric_percentiles.split(",")]
    except ValueError:
        percentiles = [-1.0]
    if not all(0 <= one <= 100 for one in percentiles):
        raise ConfigError(f"--metric-percentiles {metric_percentiles!r}: must be numbers in [0, 100], such as 50,99")
    load = loadgen.Load(
        num_prompts=num_prompts,
        request_rate=request_rate,
        burstiness=burstiness,
        max_concurrency=max_concurrency,
        dataset=dataset_name,
        input_len=random_input_len,
        output_len=random_output_len,
        range_ratio=random_range_ratio,
        chat=chat,
        ignore_eos=ignore_eos,
        temperature=temperature,
        timeout_s=request_timeout,
        seed=seed,
    )
    if result_filename is not None:  # before minutes of measuring are lost to it
        result_filename.parent.mkdir(parents=True, exist_ok=True)
    limits = loadgen.goodput_limits(goodput or ())
    target = Target(base_url.rstrip("/").removesuffix("/v1"), api_key or environment_api_key())

    async def body() -> tuple[str, list[loadgen.Outcome], float]:
        name = model or await loadgen.first_model(target)
        outcomes, seconds = await loadgen.run(load, target, name, _progress(num_prompts))
        return name, outcomes, seconds

    name, outcomes, seconds = asyncio.run(body())
    found = loadgen.report(load, outcomes, seconds, limits, percentiles)
    typer.echo(table(found, percentiles))
    if result_filename is not None:
        settings = {key: value if value != math.inf else "inf" for key, value in dataclasses.asdict(load).items()}
        command = " ".join(["jaxllm", *sys.argv[1:]])
        full = {"command": command, "base_url": target.url, "model": name, "load": settings, **found}
        result_filename.write_text(json.dumps(full, indent=1) + "\n")
    if not found["completed"]:
        typer.echo(f"error: no request was answered: {'; '.join(found['errors'])}", err=True)
        raise typer.Exit(1)


def _progress(total: int) -> Any:
    if not sys.stderr.isatty():
        return lambda done: None
    return lambda done: sys.stderr.write(f"\r{done} of {total}" + ("\n" if done == total else ""))


def table(found: dict[str, Any], percentiles: list[float]) -> str:
    lines = [
        f"{'Requests answered, failed':34s}{found['completed']:>10d}{found['failed']:>10d}",
        f"{'Duration, s':34s}{found['duration']:>10.2f}",
        f"{'Tokens in, out':34s}{found['total_input_tokens']:>10d}{found['total_output_tokens']:>10d}",
        f"{'Requests/s':34s}{found['request_throughput']:>10.2f}",
        f"{'Output tokens/s':34s}{found['output_throughput']:>10.1f}",
        f"{'Tokens/s in all':34s}{found['total_token_throughput']:>10.1f}",
    ]
    if "request_goodput" in found:
        lines.append(f"{'Requests/s within the limits':34s}{found['request_goodput']:>10.2f}")
    names = ["mean", "median", *(f"p{p:g}" for p in percentiles)]
    lines.append(f"{'ms':34s}" + "".join(f"{name:>10s}" for name in names))
    for key, title in ROWS.items():
        lines.append(f"{title:34s}" + "".join(f"{found[f'{name}_{key}_ms']:>10.2f}" for name in names))
    return "\n".join(lines)
