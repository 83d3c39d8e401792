"""Configuration: a TOML file and flat overrides go in, one frozen, resolved, printable EngineConfig comes out.

Three steps, each once: `load` (file, environment, overrides -> checked values), `resolve` (a pure function that fills
every automatic value from the model's context length and the platform) and `show` (the result as TOML). Nothing edits
a config afterwards. Every knob is one line: default, check, and the other names it answers to (vLLM's). This is the
only module that reads environment variables. It knows nothing of JAX, devices, weights or tokenizers.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import json
import math
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxllm.core import JaxLLMError
from sharding.axes import MeshConfig

AUTO = 0  # the value of a number that `resolve` fills in
BUNDLED_MODEL = "first-light"
ENVIRONMENT = {
    "JAXLLM_MODEL": "model",
    "JAXLLM_CACHE_DIR": "cache_dir",
    "JAXLLM_LOG": "log_level",
    "JAXLLM_FAULT": "fault",
}
API_KEY_VARIABLE = "JAXLLM_API_KEY"  # read by `environment_api_key`: a secret is no setting that gets printed
OTHER_TABLES = ("server", "gateway", "launch")  # of a recipe: settings of the front, which the engine does not read
PLATFORM_DEFAULTS = {
    "cpu": {"page_size": 16, "max_num_seqs": 16, "token_budget": 512, "dtype": "float32"},
    "gpu": {"page_size": 64, "max_num_seqs": 256, "token_budget": 8192, "dtype": "bfloat16"},
}
LADDERS = {"cpu": (4, None, 32), "gpu": (2, 32, 64)}  # growth; most rows between decode buckets; fewest tokens
DETERMINISTIC_BUDGET = 256  # tokens of every step: few enough that weights, not products, take the time

Check = Callable[[str, Any], Any]


class ConfigError(JaxLLMError, ValueError):
    """A setting is wrong: the message names it, the value, and what is allowed."""


# ---- checks: (name, value) -> the value to keep, or ConfigError ----


def _refuse(name: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{name} = {value!r}: must be {allowed}")


def _integer(low: int, high: int, *, auto: bool = False, optional: bool = False, power_of_two: bool = False) -> Check:
    allowed = f"{'a power of two' if power_of_two else 'an integer'} in [{low}, {high}]"
    allowed += f", or {AUTO} for automatic" if auto else ""

    def check(name: str, value: Any) -> int | None:
        if (optional and value is None) or (auto and value in (None, AUTO) and value is not False):
            return None if optional else AUTO
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _refuse(name, value, allowed)
        if power_of_two and value & (value - 1):
            raise _refuse(name, value, allowed)
        return value

    return check


def _fraction(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 < value <= 1:
        raise _refuse(name, value, "a number in (0, 1]")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, value, "true or false")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str | os.PathLike) or "\0" in os.fspath(value):
        raise _refuse(name, value, "a text without NUL characters")
    return str(value)


def _choice(*names: str, **synonyms: str) -> Check:
    def check(name: str, value: Any) -> str:
        found = synonyms.get(value, value) if isinstance(value, str) else value
        if found not in names:
            raise _refuse(name, value, "one of " + ", ".join(names))
        return found

    return check


def _one_of(*numbers: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or value not in numbers:
            raise _refuse(name, value, "one of " + ", ".join(map(str, numbers)))
        return int(value)

    return check


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise _refuse(name, value, "a number of seconds in (0, 1e6)")
    return float(value)


def _address(name: str, value: Any) -> str:
    host, colon, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536) or {*host} & {*"/ \t\n"}:
        raise _refuse(name, value, "host:port")
    return value


def _addresses(name: str, value: Any) -> tuple[str, ...]:
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, list | tuple):
        raise _refuse(name, value, "a list of host:port, or one text with commas between them")
    return tuple(dict.fromkeys(_address(name, one.strip() if isinstance(one, str) else one) for one in given if one))


def _ladder(name: str, value: Any) -> tuple[int, ...]:
    steps = tuple(value) if isinstance(value, list | tuple) else (0,)
    good = all(isinstance(step, int) and not isinstance(step, bool) and step > 0 for step in steps)
    if not good or list(steps) != sorted(set(steps)):
        raise _refuse(name, value, "a list of increasing integers >= 1 (empty for automatic)")
    return steps


def _knob(default: Any, check: Check, *aliases: str) -> Any:
    """One setting: `aliases` are the flat names it also answers to."""
    return field(default=default, metadata={"check": check, "aliases": aliases})


def _check_fields(section: Any, prefix: str) -> None:
    for spec in dataclasses.fields(section):
        if "check" in spec.metadata:
            value = spec.metadata["check"](prefix + spec.name, getattr(section, spec.name))
            object.__setattr__(section, spec.name, value)  # frozen: the only write is this normalisation


# ---- the settings ----


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Which weights, and how to hold them."""

    path: str = _knob(BUNDLED_MODEL, _text, "model")  # a directory, or the name of a bundled model
    load_format: str = _knob("auto", _choice("auto", "dummy"))
    dtype: str = _knob(
        "auto", _choice("auto", "bfloat16", "float32", "float16", bf16="bfloat16", half="float16", float="float32")
    )
    max_model_len: int = _knob(AUTO, _integer(2, 2**31 - 1, auto=True))
    quantization: str = _knob("none", _choice("none", "int8", "int4", "fp8"))  # of plain weights, when they are loaded
    quantization_group: int = _knob(128, _one_of(32, 64, 128))  # int4: inputs that share a scale
    packed_weights: bool = _knob(False, _flag)  # plain matrices in 12 bits too, for decode steps of few rows

    def __post_init__(self) -> None:
        _check_fields(self, "model.")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Memory for keys and values."""

    page_size: int = _knob(AUTO, _integer(1, 256, auto=True, power_of_two=True), "block_size")  # tokens
    num_pages: int | None = _knob(None, _integer(1, 2**31 - 1, optional=True), "num_gpu_blocks_override")  # None: fit
    memory_fraction: float = _knob(0.9, _fraction, "gpu_memory_utilization")  # of the device, weights included
    # Of keys and values in their pages; auto: the model's. fp8 holds twice the tokens (docs/adr/0042).
    kv_dtype: str = _knob("auto", _choice("auto", "fp8", fp8_e4m3="fp8"), "kv_cache_dtype")
    prefix_cache: bool = _knob(True, _flag, "enable_prefix_caching")
    prefix_index: str = _knob("hashed", _choice("hashed", "radix"))  # how cached pages are found again
    cpu_cache_bytes: int = _knob(512 * 2**20, _integer(2**10, 2**50))  # when the device is a CPU

    def __post_init__(self) -> None:
        _check_fields(self, "cache.")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How many sequences and tokens share a step, and who goes first."""

    max_num_seqs: int = _knob(AUTO, _integer(1, 4096, auto=True))
    token_budget: int = _knob(AUTO, _integer(1, 2**20, auto=True), "max_num_batched_tokens")
    max_prefill_chunk: int | None = _knob(None, _integer(1, 2**20, optional=True), "long_prefill_token_threshold")
    policy: str = _knob("fcfs", _choice("fcfs", "priority", "longest_prefix"), "scheduling_policy")
    overlap: bool = _knob(True, _flag, "async_scheduling")  # launch the next step before the last one is read
    # In one dispatch while nothing can change between them; 1: never. AUTO: 4 where a step is so short that the host's
    # turn shows, see jaxllm.engine.multi_step.
    decode_steps: int = _knob(AUTO, _integer(1, 16, auto=True), "num_scheduler_steps", "num_continuous_decode_steps")
    # One executable computes every step, so that a token's bits depend on nothing but the tokens before it.
    deterministic: bool = _knob(False, _flag)

    def __post_init__(self) -> None:
        _check_fields(self, "scheduler.")


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """Which padded shapes are compiled before the engine is ready, and where the results are kept."""

    decode_buckets: tuple[int, ...] = _knob((), _ladder)  # sequences; the last is max_num_seqs
    token_buckets: tuple[int, ...] = _knob((), _ladder)  # tokens; the last is token_budget
    cache_dir: str = _knob("~/.cache/jaxllm", _text)  # "" = keep nothing
    threads: int = _knob(AUTO, _integer(1, 256, auto=True))  # AUTO: one a core
    # auto: what measured fastest. apart: a kernel an op. layers, launched: decode steps as one op, of up to 128 rows in
    # one kernel where devices share layers, of up to 256 as launches that overlap (launched: always that one). chain:
    # only what lies between two attentions so. reference: attention in plain jnp. Each where a kernel takes the model.
    kernels: str = _knob("auto", _choice("auto", "apart", "layers", "chain", "launched", "reference"))

    def __post_init__(self) -> None:
        _check_fields(self, "compile.")

    @property
    def directory(self) -> Path | None:
        return Path(self.cache_dir).expanduser() if self.cache_dir else None


@dataclass(frozen=True, kw_only=True)
class DisaggregationConfig:
    """Prompts computed apart from tokens. The other tables are then the decode side's; here is what differs."""

    role: str = _knob(  # both: two sides in this process; prefill, decode: one side, the other in other processes
        "none",
        _choice(
            *("none", "both", "prefill", "decode"),
            null="none",
            kv_both="both",
            kv_producer="prefill",
            kv_consumer="decode",
        ),
        *("disaggregation_mode", "kv_role"),
    )
    prefill_tensor: int = _knob(AUTO, _integer(1, 4096, auto=True))  # AUTO, here and below: as the decode side
    prefill_max_num_seqs: int = _knob(AUTO, _integer(1, 4096, auto=True))
    prefill_token_budget: int = _knob(AUTO, _integer(1, 2**20, auto=True))
    prefill_num_pages: int | None = _knob(None, _integer(1, 2**31 - 1, optional=True))  # None: fit
    transfer_bytes: int = _knob(512 * 2**20, _integer(1, 2**50))  # of pages on their way, on each side
    transfer_layers: int = _knob(8, _integer(1, 4096))  # layers that move together
    workers: tuple[str, ...] = _knob((), _addresses, "prefill_workers")  # role decode: who computes its prompts
    listen: str = _knob("127.0.0.1:5800", _address, "prefill_listen")  # role prefill: nobody is asked who they are
    silent_s: float = _knob(10.0, _seconds)  # without a sign of life the other side is dead
    wait_s: float = _knob(60.0, _seconds)  # a prompt waits so long for a worker to come (back), then it fails
    retries: int = _knob(2, _integer(0, 100))  # of a prompt whose worker died

    def __post_init__(self) -> None:
        _check_fields(self, "disaggregation.")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything an engine is built from."""

    model: ModelSource = field(default_factory=ModelSource)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    disaggregation: DisaggregationConfig = field(default_factory=DisaggregationConfig)
    seed: int = _knob(0, _integer(-(2**63), 2**63 - 1))  # of dummy weights and of requests without a seed
    fault: str = _knob("", _text)  # fault points for tests, see jaxllm.engine.faults
    log_level: str = _knob("warning", _choice("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        _check_fields(self, "")


SECTIONS: dict[str, type] = {
    "model": ModelSource,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "compile": CompileConfig,
    "mesh": MeshConfig,
    "disaggregation": DisaggregationConfig,
}


# ---- load ----


def _names() -> Iterator[tuple[str, str, str]]:
    """(flat name, section or "", field) of every setting under every name."""
    for section, kind in (*SECTIONS.items(), ("", EngineConfig)):
        for spec in dataclasses.fields(kind):
            if "check" in spec.metadata:
                yield from ((name, section, spec.name) for name in (spec.name, *spec.metadata["aliases"]))


def setting_names() -> dict[str, tuple[str, str]]:
    """Every flat name `load` accepts -> (section, field); vLLM's names beside ours."""
    return {name: (section, knob) for name, section, knob in _names()}


def _unknown(name: str, where: str, allowed: list[str]) -> ConfigError:
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return ConfigError(f"unknown setting {name!r}{where}{hint}; allowed: {', '.join(sorted(allowed))}")


def _flatten(settings: Mapping[str, Any], where: str) -> dict[tuple[str, str], Any]:
    """Sections (tables, dicts or our dataclasses) and flat names alike -> {(section, field): value}."""
    flat_names = setting_names()
    found: dict[tuple[str, str], Any] = {}
    named: dict[tuple[str, str], str] = {}

    def put(key: tuple[str, str], name: str, value: Any) -> None:
        if key in found and found[key] != value:
            raise ConfigError(f"{named[key]} and {name} are the same setting but differ{where}")
        found[key], named[key] = value, name

    for name, value in settings.items():
        if value is None:
            continue
        if name in SECTIONS and isinstance(value, SECTIONS[name]):
            for spec in dataclasses.fields(value):
                put((name, spec.name), f"{name}.{spec.name}", getattr(value, spec.name))
        elif name in SECTIONS and isinstance(value, Mapping):
            mine = [known for known, (section, _) in flat_names.items() if section == name]
            for inner, inner_value in value.items():
                if inner not in mine:
                    raise _unknown(inner, f" in [{name}]{where}", mine)
                if inner_value is not None:
                    put(flat_names[inner], f"{name}.{inner}", inner_value)
        elif name in flat_names:
            put(flat_names[name], name, value)
        elif name in SECTIONS:
            raise ConfigError(f"{name} = {value!r}{where}: must be a table of settings")
        else:
            raise _unknown(name, where, [*flat_names, *SECTIONS])
    return found


def _read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"config file {os.fspath(path)!r}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {os.fspath(path)!r} is not valid TOML: {error}") from None


def environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Those of our environment variables that are set."""
    found = os.environ if environ is None else environ
    return {name: found[name] for name in ENVIRONMENT if found.get(name)}


def load(
    toml_path: str | os.PathLike[str] | None = None, *, environ: Mapping[str, str] | None = None, **overrides: Any
) -> EngineConfig:
    """Overrides beat environment variables, which beat the file, which beats the defaults.

    An override is one of our names (`page_size=16`), vLLM's name for it (`block_size=16`) or a section
    (`cache={"page_size": 16}`); None means not given.
    """
    from_environ = {ENVIRONMENT[name]: value for name, value in environment(environ).items()}
    values: dict[tuple[str, str], Any] = {}
    if toml_path is not None:
        recipe = {name: value for name, value in _read_toml(toml_path).items() if name not in OTHER_TABLES}
        values |= _flatten(recipe, f" in {os.fspath(toml_path)}")
    values |= _flatten(from_environ, " (from the environment)")
    values |= _flatten(overrides, "")
    top = {knob: value for (section, knob), value in values.items() if not section}
    for section, kind in SECTIONS.items():
        top[section] = kind(**{knob: value for (owner, knob), value in values.items() if owner == section})
    return EngineConfig(**top)


def load_table(toml_path: str | os.PathLike[str] | None, name: str) -> dict[str, Any]:
    """One of a recipe's OTHER_TABLES; empty when there is none."""
    table = _read_toml(toml_path).get(name, {}) if toml_path is not None else {}
    if not isinstance(table, dict):
        raise ConfigError(f"{name} = {table!r}: must be a table of settings")
    return table


def environment_api_key(environ: Mapping[str, str] | None = None) -> str | None:
    return (os.environ if environ is None else environ).get(API_KEY_VARIABLE) or None


# ---- resolve ----


def bucket_ladder(largest: int, smallest: int, growth: int, apart: int | None = None) -> tuple[int, ...]:
    """smallest, smallest * growth, ... and exactly `largest` at the end; at most `apart` apart, or a quarter."""
    steps = []
    step = min(smallest, largest)
    while step < largest:
        steps.append(step)
        step = min(step * growth, step + max(apart, step // 4 // apart * apart)) if apart else step * growth
    return (*steps, largest)


def _buckets(name: str, given: tuple[int, ...], largest: int, *ladder: Any) -> tuple[int, ...]:
    if not given:
        return bucket_ladder(largest, *ladder)
    if given[-1] > largest:
        raise ConfigError(f"compile.{name} = {list(given)}: the largest bucket must be at most {largest}")
    return given if given[-1] == largest else (*given, largest)


def resolve(config: EngineConfig, model_context_length: int, platform: str) -> EngineConfig:
    """Fill every automatic value. Pure: the same arguments give the same config. Resolving twice changes nothing.

    `cache.num_pages` may stay None: only the engine knows how much memory is left.
    """
    platform = "gpu" if platform == "cuda" else platform
    if platform not in PLATFORM_DEFAULTS:
        raise ConfigError(f"platform = {platform!r}: must be one of {', '.join(PLATFORM_DEFAULTS)}")
    defaults: dict[str, Any] = PLATFORM_DEFAULTS[platform]
    max_model_len = config.model.max_model_len or model_context_length
    if max_model_len > model_context_length:
        raise ConfigError(f"model.max_model_len = {max_model_len}: the model's context is {model_context_length}")
    seqs, budget = config.scheduler.max_num_seqs, config.scheduler.token_budget
    if seqs and budget and budget < seqs:
        raise ConfigError(
            f"scheduler.token_budget = {budget}: must be at least scheduler.max_num_seqs ({seqs}), "
            "so that every running sequence can decode in one step"
        )
    seqs = seqs or min(defaults["max_num_seqs"], budget or defaults["max_num_seqs"])
    one_shape = config.scheduler.deterministic
    budget = budget or max(DETERMINISTIC_BUDGET if one_shape else defaults["token_budget"], seqs)
    growth, apart, fewest = LADDERS[platform]
    decode, tokens = config.compile.decode_buckets, config.compile.token_buckets
    if one_shape:
        if (decode or (seqs,)) != (seqs,) or (tokens or (budget,)) != (budget,):
            raise ConfigError("scheduler.deterministic = true: leave compile.decode_buckets and token_buckets to it")
        decode, tokens = (seqs,), (budget,)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            max_model_len=max_model_len,
            dtype=defaults["dtype"] if config.model.dtype == "auto" else config.model.dtype,
        ),
        cache=dataclasses.replace(config.cache, page_size=config.cache.page_size or defaults["page_size"]),
        scheduler=dataclasses.replace(config.scheduler, max_num_seqs=seqs, token_budget=budget),
        compile=dataclasses.replace(
            config.compile,
            decode_buckets=_buckets("decode_buckets", decode, seqs, 1, growth, apart),
            token_buckets=_buckets("token_buckets", tokens, budget, fewest, growth),
        ),
    )


# ---- show ----


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def show(config: EngineConfig) -> str:
    """The config as TOML that `load` reads back to an equal config."""

    def lines(section: Any) -> Iterator[str]:
        for spec in dataclasses.fields(section):
            value = getattr(section, spec.name)
            if "check" in spec.metadata:
                yield f"# {spec.name} is automatic" if value is None else f"{spec.name} = {_toml(value)}"

    parts = ["\n".join(lines(config))]
    parts += [f"[{name}]\n" + "\n".join(lines(getattr(config, name))) for name in SECTIONS]
    return "\n\n".join(parts) + "\n"


# ---- finding the model ----


def bundled_model_dir(name: str = BUNDLED_MODEL) -> Path:
    """Where a model that ships inside the package lies (whether or not it is there)."""
    return Path(str(importlib.resources.files("jaxllm"))) / "models" / name


def model_directory(path: str) -> Path:
    """The directory of a model named by path or by bundled name; ConfigError when there is none."""
    plain = path not in ("", ".", "..") and not {"/", os.sep} & set(path)
    if plain and bundled_model_dir(path).is_dir():
        return bundled_model_dir(path)
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    what = "is a file; give the directory that holds config.json" if directory.exists() else "no such directory"
    raise ConfigError(
        f"model = {path!r}: {what}. A model is a local Hugging Face directory (config.json, tokenizer.json, "
        f"*.safetensors) or the bundled {BUNDLED_MODEL!r}; nothing is downloaded."
    )
