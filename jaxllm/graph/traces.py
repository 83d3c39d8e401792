"""Step functions as StableHLO on disk: a start that finds them there neither traces nor lowers the model.

In: a folder of the compile cache (`compile_cache` checks and seals its files) and jobs. Out: each job lowered. A file
is named by the digest of all that tracing reads: this source, the versions, the device, the graph and the arguments.
Tracing runs Python for every kernel, seconds a step; reading a file back takes milliseconds, and nothing in it is code
that Python runs (jax.export: StableHLO in a flatbuffer).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax import export

from jaxllm.graph.libraries import LIBRARIES
from jaxllm.graph.multi_step import MultiStepped
from jaxllm.graph.steps import Graph, Sampled, Stepped

log = logging.getLogger(__name__)
Key = tuple[Any, ...]  # what an executable is, then its static shapes
SUFFIX = ".stablehlo"
ROOT = Path(__file__).parents[2]
READ_BY_TRACING = ("jaxllm/core.py", "jaxllm/graph", "pallas_kernels", "sharding")
# Kernels as custom calls. JAX promises nothing of them between its versions, but the one that wrote a file reads it.
OUR_CALLS = ("mosaic_gpu_v2", "__gpu$xla.gpu.triton", "triton_kernel_call", *LIBRARIES)

for kind in (Stepped, Sampled, MultiStepped):
    export.register_namedtuple_serialization(kind, serialized_name=f"jaxllm.{kind.__name__}")


@dataclass(frozen=True)
class Job:
    """One executable: its place in the table, a pure function, abstract arguments, which of them are written over."""

    key: Key
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()

    def lower(self) -> jax.stages.Lowered:
        return self.lower_as(self.function)

    def lower_as(self, function: Callable[..., Any]) -> jax.stages.Lowered:
        """keep_unused: memory that comes in only to be written over."""
        return jax.jit(function, donate_argnums=self.donated, keep_unused=True).lower(*self.arguments)


@dataclass
class Traces:
    """Of one graph on one device. What is not there yet is traced, and kept."""

    directory: Path
    graph: Graph
    traced: int = 0
    _salt: str = field(init=False)

    def __post_init__(self) -> None:
        # What is kept is read by the same version: kernels need not keep to the IR of older ones.
        jax.config.update("jax_export_ignore_forward_compatibility", True)
        known = {part.name: getattr(self.graph, part.name) for part in dataclasses.fields(self.graph)}
        # The module's structure follows from its config, the flags and the arguments' tree.
        self._salt = repr({name: value for name, value in known.items() if name != "graphdef"})

    def lower(self, job: Job) -> jax.stages.Lowered:
        path = self.directory / (self.name(job) + SUFFIX)
        exported = self._read(path)
        if exported is None:
            self.traced += 1
            try:
                exported = self._export(job)
            except (ValueError, NotImplementedError) as error:  # a custom call that is not ours, a callback
                log.warning("%s is traced at every start: %s", job.key, error)
                return job.lower()
            self._write(path, exported)
            exported = export.deserialize(exported.serialize())  # as every later start will, so that XLA's cache fits
        call = exported.call

        def stored(*arguments: Any) -> Any:
            return call(*jax.tree.leaves(arguments))

        stored.__name__ = str(job.key[0])  # what profiles call it
        return job.lower_as(stored)

    def name(self, job: Job) -> str:
        leaves, structure = jax.tree.flatten(job.arguments)
        shapes = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
        said = (_source(), _versions(leaves[0].sharding), self._salt, job.key, str(structure), shapes, job.donated)
        return hashlib.sha256(repr(said).encode()).hexdigest()

    def _export(self, job: Job) -> export.Exported:
        leaves, structure = jax.tree.flatten(job.arguments)
        bare = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves
        ]  # where they lie is said when it is read
        flat = jax.jit(lambda *leaves: job.function(*jax.tree.unflatten(structure, leaves)), keep_unused=True)
        allowed = [export.DisabledSafetyCheck.custom_call(name) for name in OUR_CALLS]
        platform = str(_device(leaves[0].sharding).platform)
        platforms = ["cuda" if platform == "gpu" else platform]
        return export.export(flat, platforms=platforms, disabled_checks=allowed)(*bare)

    def _read(self, path: Path) -> export.Exported | None:
        try:
            exported = export.deserialize(bytearray(path.read_bytes()))
            # Not of the whole file, which also lists the calls that a step may have.
            _provide(exported.mlir_module_serialized)
        except (OSError, NotImplementedError):  # none, or made where a library could be built that cannot be here
            return None
        return exported

    def _write(self, path: Path, exported: export.Exported) -> None:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
        with contextlib.suppress(OSError):  # read-only or full: the next start traces again
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(exported.serialize())
            temporary.replace(path)


def _provide(module: bytes) -> None:
    """What tracing the kernels in this module would have brought into the process."""
    if b"mosaic_gpu" in module:
        importlib.import_module("jax.experimental.mosaic.gpu")  # tells the runtime where its library lies
    for target, each in LIBRARIES.items():
        if target.encode() in module:
            each.register(each.library())


def _device(sharding: jax.sharding.Sharding) -> Any:
    return next(iter(sharding.device_set))


def _versions(sharding: jax.sharding.Sharding) -> tuple[str, ...]:
    """Of JAX, its settings that tracing asks for, and the device that kernels are made for."""
    device = _device(sharding)
    facts = (getattr(device, name, None) for name in ("platform", "device_kind", "compute_capability", "core_count"))
    settings = (jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision)
    return tuple(map(str, (jax.__version__, version("jaxlib"), device.client.platform_version, *facts, *settings)))


@functools.cache
def _source() -> str:
    """A digest of the files that tracing runs or reads."""
    digest = hashlib.sha256()
    for part in READ_BY_TRACING:
        place = ROOT / part
        files = [place] if place.is_file() else sorted(place.rglob("*"))
        for path in files:
            if path.suffix in (".py", ".json", ".cu", ".h"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
