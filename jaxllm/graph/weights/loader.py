"""A Hugging Face checkpoint directory, put tensor by tensor on the device.

In: a directory holding model.safetensors, or model.safetensors.index.json and its shards. Out: the decoder's
parameters. Every header is read and compared with the model first, so all that is missing, extra, misshapen or of
the wrong type is reported at once, by file and name, before device memory is taken. Then each tensor goes from the
mapped file to the device, is cast there, and q, k, v and gate, up are joined there: the host never holds a second
copy. Knows nothing of families beyond the name map.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.config import ConfigError
from jaxllm.core import JaxLLMError
from jaxllm.graph.models.config import ModelConfig, read_json
from jaxllm.graph.models.decoder import Params, abstract
from jaxllm.graph.weights.names import IGNORED_SUFFIXES, Part, leaves, parts
from jaxllm.graph.weights.tensor_file import FLOATS, Tensor, TensorFile, TensorFileError, open_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHOWN_PROBLEMS = 100

Placement = Any  # a jax.Device, a Sharding, or None for the default device
Progress = Callable[[int, int], None]  # bytes on the device, bytes in all


class WeightsError(JaxLLMError, ValueError):
    """A checkpoint does not fit the model. `problems` has one line for every file or tensor at fault."""

    def __init__(self, directory: Path, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        lines = [f"  {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"  and {len(self.problems) - SHOWN_PROBLEMS} more")
        count = f"{len(self.problems)} problem{'s' * (len(self.problems) != 1)}"
        super().__init__("\n".join([f"weights in {directory} cannot be loaded ({count}):", *lines]))


def load(
    directory: str | Path,
    config: ModelConfig,
    dtype: DTypeLike = jnp.bfloat16,
    device: Placement = None,
    progress: Progress | None = None,
) -> Params:
    """The parameters of `config`, cast to `dtype`, on `device`. Raises WeightsError."""
    found = check(Path(directory), config)
    total = sum(tensor.end - tensor.begin for _, _, tensor in found)
    shapes = {path: leaf.shape for path, leaf in leaves(abstract(config)[1])}
    params: Params = {}
    done = 0
    for path, group in itertools.groupby(found, key=lambda entry: entry[0].path):
        arrays = []
        for _, file, tensor in group:
            # A CPU array may alias host memory; one that aliases a mapped file would die with the file.
            arrays.append(jax.device_put(file.view(tensor), device, may_alias=False))
            done += tensor.end - tensor.begin
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        # Waiting here bounds what is in flight, in staging memory and on the device, to one leaf.
        node[path[-1]] = jax.block_until_ready(_join(tuple(arrays), shapes[path], dtype))
        if progress is not None:
            progress(done, total)
    return params


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _join(arrays: tuple[jax.Array, ...], shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return jnp.concatenate([array.astype(dtype) for array in arrays]).reshape(shape)


def check(directory: Path, config: ModelConfig) -> list[tuple[Part, TensorFile, Tensor]]:
    """Where each tensor of the model lies. Reads headers only; raises WeightsError with every problem found."""
    problems: list[str] = []
    weight_map = _weight_map(directory)
    files = _open_files(directory, weight_map, problems)
    where: dict[str, tuple[TensorFile, Tensor]] = {}
    for file in files.values():
        for tensor in file.tensors.values():
            if tensor.name in where:
                problems.append(f"{file.path.name}: {tensor.name} is also in {where[tensor.name][0].path.name}")
            where[tensor.name] = file, tensor
    found = []
    for part in parts(config):
        file, tensor = where.pop(part.name, (None, None))
        home = weight_map.get(part.name, SINGLE)
        if file is None or tensor is None:
            if home in files or part.name not in weight_map:  # else its file is the problem, and already listed
                problems.append(f"{home if home in files else INDEX}: {part.name} is missing{_why_wanted(part)}")
            continue
        if tensor.shape != part.shape:
            problems.append(f"{file.path.name}: {part.name} is {list(tensor.shape)}, wanted {list(part.shape)}")
        if tensor.dtype not in FLOATS:
            problems.append(f"{file.path.name}: {part.name} is {tensor.dtype}, must be one of {', '.join(FLOATS)}")
        found.append((part, file, tensor))
    for name, (file, _) in where.items():
        tied_head = config.tie_embeddings and name == "lm_head.weight"  # transformers drops it too
        if not tied_head and not name.endswith(IGNORED_SUFFIXES):
            problems.append(f"{file.path.name}: {name} has no place in the model")
    if problems:
        raise WeightsError(directory, problems)
    return found


def _why_wanted(part: Part) -> str:
    why = " (config.json has tie_word_embeddings = false)" if part.path == ("head",) else ""
    return f"; wanted {list(part.shape)}{why}"


def _open_files(directory: Path, weight_map: dict[str, str], problems: list[str]) -> dict[str, TensorFile]:
    """The readable files by name; each of the others becomes a problem."""
    files: dict[str, TensorFile] = {}
    for name in dict.fromkeys(weight_map.values()) if weight_map else (SINGLE,):
        # Names are joined to the directory, so they must not lead out of it; links out, as in HF's cache, may.
        if name in ("", "..") or Path(name).name != name or "\0" in name:
            problems.append(f"{INDEX}: {name!r} is not the name of a file in the directory")
        elif not (directory / name).is_file():
            problems.append(f"{name}: no such file, though {INDEX} names it")
        else:
            try:
                files[name] = open_file(directory / name)
            except TensorFileError as error:
                problems.append(f"{name}: {error}")
    if not files:  # nothing to compare with: every tensor would look missing
        raise WeightsError(directory, problems)
    return files


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor to file by the index; empty for a single file, which wins where both exist, as in transformers."""
    if not directory.is_dir():
        raise WeightsError(directory, ["no such directory"])
    if (directory / SINGLE).is_file():
        return {}
    if not (directory / INDEX).is_file():
        raise WeightsError(directory, [f"must hold {SINGLE} or {INDEX}"])
    try:
        weight_map = read_json(directory / INDEX).get("weight_map")
    except ConfigError as error:
        raise WeightsError(directory, [str(error)]) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(directory, [f"{INDEX}: weight_map must map tensor names to file names"])
    wrong = [
        f"{INDEX}: {name} is in {file!r}, not a file name"
        for name, file in weight_map.items()
        if not isinstance(file, str)
    ]
    if wrong:
        raise WeightsError(directory, wrong)
    return {str(name): str(file) for name, file in weight_map.items()}
