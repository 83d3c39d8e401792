"""`jaxllm plan`: a model, devices and goals in, ranked meshes and a recipe out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jaxllm.config import ConfigError, load
from serve.commands.serve import size


def command(
    model: Annotated[str, typer.Argument(help="Model directory, bundled model, or a known shape: llama-3.1-8b.")],
    gpus: Annotated[str, typer.Option(metavar="NxDEVICE", help="Such as 8xH200.")] = "1xH200",
    ttft: Annotated[str | None, typer.Option(metavar="TIME", help="Longest time to the first token: 500ms.")] = None,
    tpot: Annotated[str | None, typer.Option(metavar="TIME", help="Longest mean time a token: 20ms.")] = None,
    prompt: Annotated[int, typer.Option(parser=size, metavar="SIZE", help="Tokens of a prompt.")] = 1024,
    output: Annotated[int, typer.Option(parser=size, metavar="SIZE", help="Tokens of an answer.")] = 256,
    costs: Annotated[
        str, typer.Option(help="Which recorded engine to predict: auto (ours) or stock (plain JAX).")
    ] = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the best mesh as a recipe.")] = None,
    show_errors: Annotated[bool, typer.Option("--errors", help="Show predictions beside the recorded runs.")] = False,
) -> None:
    """Rank the meshes of so many GPUs for a model, and write the recipe of the best."""
    from jaxllm.tools import planner

    count, name = planner.parse_gpus(gpus)
    device = planner.read_device(name)
    if costs not in device.costs:
        raise ConfigError(f"--costs {costs!r}: must be one of {', '.join(device.costs)}")
    dims, context = planner.find_model(model)
    if prompt + output > context:
        raise ConfigError(f"--prompt {prompt} and --output {output}: the model's context is {context}")
    times = planner.parse_time("--ttft", ttft), planner.parse_time("--tpot", tpot)
    goal = planner.Goal(count, name, *times, prompt=prompt, output=output, costs=costs)
    ranking = planner.rank(dims, device, goal, load())
    typer.echo(planner.render(ranking, device, goal))
    if show_errors:
        typer.echo(planner.render_errors(device))
    if not ranking.plans:
        raise typer.Exit(1)
    if out is not None:
        out.write_text(planner.recipe(model, ranking.plans[0], goal))
        typer.echo(f"wrote {out}: {ranking.plans[0].mesh}")
