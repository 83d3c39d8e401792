"""The `jaxllm` command: verbs and options in, text out; an error is one line on stderr and exit code 1 or 2.

Exit codes: 0 done, 1 it failed, 2 what was asked is wrong, 130 interrupted. Imports JAX only once a verb needs a
model, so that --help and mistakes answer at once.
"""

from __future__ import annotations

import json
import logging
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from jaxllm.config import ConfigError, environment_api_key, load
from jaxllm.core import JaxLLMError, RequestError, SamplingParams
from serve import chat as terminal
from serve.commands.bench import add_commands as add_bench_commands
from serve.commands.gateway import command as gateway_command
from serve.commands.launch import command as launch_command
from serve.commands.plan import command as plan_command
from serve.commands.serve import command as serve_command

if TYPE_CHECKING:
    from jaxllm.llm import LLM

app = typer.Typer(
    name="jaxllm",
    help="LLM inference in JAX for NVIDIA GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str | None, typer.Option(help="Model directory; default: the bundled model.", show_default=False)]
Config = Annotated[Path | None, typer.Option(help="TOML file of settings.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any setting by its name, such as max_num_seqs=8; repeatable."),
]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens to generate.", show_default=False)]
Temperature = Annotated[float | None, typer.Option(help="0 = greedy; default: the model's suggestion, else 1.")]
TopP = Annotated[float | None, typer.Option(help="Keep the most likely tokens of this total probability.")]
TopK = Annotated[int | None, typer.Option(help="Keep this many of the most likely tokens; 0 = all.")]
MinP = Annotated[float | None, typer.Option(help="Keep tokens at least this likely relative to the best.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.", show_default=False)]
Stop = Annotated[list[str] | None, typer.Option(help="End the text before this string; repeatable.")]
DEFAULT_MAX_TOKENS = 128


def _settings(given: Sequence[str] | None) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is read as TOML where it is TOML, else as text."""
    settings: dict[str, Any] = {}
    for pair in given or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair!r}: must be NAME=VALUE")
        try:
            settings[name.strip().replace("-", "_")] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            settings[name.strip().replace("-", "_")] = value
    return settings


@contextmanager
def _start_progress() -> Iterator[Any]:
    """Says on a terminal which phase of starting runs; silent otherwise."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda phase, share: status.update(f"{phase} {share:.0%}")


def open_llm(model: str | None, config: Path | None, given: Sequence[str] | None) -> LLM:
    """Start the model that the options describe. What is wrong with them is said before JAX is imported."""
    settings = load(config, model=model, **_settings(given))
    logging.basicConfig(
        level=settings.log_level.upper(), stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s"
    )
    from jaxllm.llm import LLM

    with _start_progress() as progress:
        return LLM(config=settings, progress=progress)


def _params(llm: LLM, **given: Any) -> SamplingParams:
    """The model's suggestions, changed by what was given."""
    return llm.default_params.replace(**{name: value for name, value in given.items() if value is not None})


def _check_params(**given: Any) -> None:
    """Mistakes in options are told before seconds are spent on loading."""
    SamplingParams(**{name: value for name, value in given.items() if value is not None})


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from jaxllm.tools.env import version as installed

        typer.echo(f"jaxllm {installed()}")
        raise typer.Exit


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; read from stdin when left out.")] = None,
    model: Model = None,
    config: Config = None,
    max_tokens: MaxTokens = DEFAULT_MAX_TOKENS,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    settings: Settings = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No speed line on stderr.")] = False,
) -> None:
    """Continue a text, printing it as it comes."""
    sampling = dict(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    sampling |= dict(seed=seed, stop=tuple(stop) if stop else None)
    _check_params(**sampling)
    if prompt is None and sys.stdin.isatty():
        raise ConfigError("no prompt: give one as an argument or pipe it in")
    text: str = sys.stdin.read() if prompt is None else prompt
    llm = open_llm(model, config, settings)
    deltas = llm.stream(text, _params(llm, **sampling))
    try:
        heard = terminal.listen(deltas, sys.stdout)
    finally:
        deltas.close()
    typer.echo()
    if heard.error is not None:
        raise JaxLLMError(heard.error)
    if not quiet:
        from jaxllm.engine.output import speed

        typer.echo(str(speed(heard.timings, heard.num_tokens)), err=True)
    if heard.interrupted:
        raise typer.Exit(130)


def _typed_lines() -> Iterator[str]:
    """Lines typed at a prompt, with editing and history, until ctrl-d or ctrl-c."""
    with suppress(ImportError):
        import readline  # noqa: F401 (input() edits lines once it is loaded)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return


@app.command()
def chat(
    model: Model = None,
    config: Config = None,
    system: Annotated[str | None, typer.Option(help="Text of a system message.", show_default=False)] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    settings: Settings = None,
    url: Annotated[
        str | None, typer.Option(help="Talk with a server of OpenAI's API instead of loading a model.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="The server's key; else JAXLLM_API_KEY.")] = None,
) -> None:
    """Talk with the model; /reset forgets, /quit ends, ctrl-c stops an answer. Piped lines are answered one by one."""
    sampling = dict(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    _check_params(**sampling, max_tokens=max_tokens)
    llm: Any
    if url is not None:
        from serve.remote import open_remote

        wanted: dict[str, Any] = {**sampling, "max_tokens": max_tokens}
        given = {name: value for name, value in wanted.items() if value is not None}
        llm = open_remote(url, model, api_key or environment_api_key(), list(given))
        params = SamplingParams(**given)
    else:
        llm = open_llm(model, config, settings)
        params = _params(llm, **sampling).replace(max_tokens=max_tokens)  # None: as far as the context goes
    interactive = sys.stdin.isatty()
    if interactive:
        typer.echo(terminal.HELP, err=True)
    lines = _typed_lines() if interactive else sys.stdin
    conversation = terminal.Conversation(llm, params, system)
    with closing(llm) if url is not None else nullcontext():
        good = terminal.repl(conversation, lines, sys.stdout, sys.stderr, stats=interactive)
    if not good and not interactive:
        raise typer.Exit(1)


@app.command()
def demo(model: Model = None, config: Config = None, settings: Settings = None) -> None:
    """A code completion, a chat answer and a JSON extraction, with their speed."""
    from jaxllm.tools import demo as tool

    if not tool.run(open_llm(model, config, settings), sys.stdout):
        raise JaxLLMError("a task of the demo was not answered as it should be")


@app.command()
def build(
    out: Annotated[Path, typer.Argument(help="Folder to fill; ship it with the model.")],
    model: Model = None,
    config: Config = None,
    settings: Settings = None,
) -> None:
    """Compile every executable a model needs into a folder: a start with --set cache_dir=FOLDER finds them there."""
    given: dict[str, Any] = _settings(settings) | {"cache_dir": str(out)}
    chosen = load(config, model=model, **given)
    from jaxllm.engine.startup import build as compile_into

    typer.echo(f"{compile_into(chosen)}\nuse it with: --set cache_dir={out}")


@app.command()
def env(
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Versions, devices, driver and model found here, for a bug report."""
    from jaxllm.tools import env as tool

    facts = tool.collect(model)
    typer.echo(json.dumps(facts, indent=2) if as_json else tool.render(facts))


app.command("serve")(serve_command)
add_bench_commands(app, lambda model, config, settings: open_llm(model, config, settings))
app.command("gateway")(gateway_command)
app.command("launch")(launch_command)
app.command("plan")(plan_command)


def _fail(error: Exception, code: int) -> NoReturn:
    typer.echo(f"error: {' '.join(str(error).split()) or type(error).__name__}", err=True)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what a user can cause ends in one line and an exit code, never a traceback."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="jaxllm")
    except (ConfigError, RequestError) as error:
        _fail(error, 2)
    except (JaxLLMError, OSError, UnicodeDecodeError) as error:
        _fail(error, 1)


if __name__ == "__main__":
    main()
