"""jaxllm env: what this machine and installation are, for a bug report.

In: nothing but the machine (and which model is meant). Out: named facts in sections, as data and as text. Whatever
cannot be found out is said in its place; nothing here fails.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from pathlib import Path

from jaxllm.config import ConfigError, environment, load, model_directory

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "tokenizers", "safetensors", "jinja2", "msgspec", "rich", "typer")
GPU_PACKAGES = ("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
DRIVER_FILE = Path("/proc/driver/nvidia/version")

Facts = dict[str, dict[str, str]]


def version(package: str = "jaxllm") -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def collect(model: str | None = None) -> Facts:
    """Sections of facts. `model` as given to LLM; None = the configured one."""
    packages = {name: version(name) for name in PACKAGES}
    packages |= {name: found for name in GPU_PACKAGES if (found := version(name)) != "not installed"}
    return {
        "jaxllm": {"version": version(), "python": sys.version.split()[0], "platform": platform.platform()},
        "packages": packages,
        "devices": _devices(),
        "driver": {"nvidia": _driver()},
        "model": _model(model),
        "environment": environment() or {"": "none of ours is set"},
    }


def _driver() -> str:
    try:
        return DRIVER_FILE.read_text().splitlines()[0].removeprefix("NVRM version:").strip()
    except (OSError, IndexError):
        return "no NVIDIA driver is loaded"


def _devices() -> dict[str, str]:
    try:
        import jax

        facts = {"backend": jax.default_backend()}
        for device in jax.devices():
            limit = (device.memory_stats() or {}).get("bytes_limit")
            memory = f", {limit / 2**30:.1f} GiB" if limit else ""
            facts[str(device.id)] = f"{device.device_kind}{memory}"
        return facts | {"runtime": jax.devices()[0].client.platform_version.splitlines()[0]}
    except Exception as error:  # a broken driver or plugin is what one runs this to find out
        return {"error": f"{type(error).__name__}: {error}"}


def _model(model: str | None) -> dict[str, str]:
    try:
        directory = model_directory(load(model=model).model.path)
    except ConfigError as error:
        return {"error": str(error)}
    facts = {"directory": str(directory)}
    try:
        config = json.loads((directory / "config.json").read_text("utf-8"))
        facts["architecture"] = ", ".join(config.get("architectures") or ["(none named)"])
        facts["layers"] = str(config.get("num_hidden_layers"))
        facts["context"] = str(config.get("max_position_embeddings"))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        facts["config.json"] = f"not readable: {error}"
    sizes = [file.stat().st_size for file in directory.glob("*.safetensors")]
    return facts | {"weights": f"{len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB"}


def render(facts: Facts) -> str:
    """The facts as lines a person reads."""
    lines: list[str] = []
    for section, entries in facts.items():
        lines.append(section)
        lines += [f"  {name + ':' if name else '':<14} {value}" for name, value in entries.items()]
    return "\n".join(lines)
