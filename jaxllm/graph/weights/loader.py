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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.config import ConfigError
from jaxllm.core import JaxLLMError
from jaxllm.graph.models.config import ModelConfig, read_json
from jaxllm.graph.models.decoder import Params, abstract
from jaxllm.graph.quant import stored
from jaxllm.graph.quant.scheme import MATRICES, PLAIN, Scheme, complaint
from jaxllm.graph.quant.stored import StoredTensor
from jaxllm.graph.spread import PlaceLeaf
from jaxllm.graph.weights import kv_scales, manifest
from jaxllm.graph.weights.names import IGNORED_SUFFIXES, TOP_TENSORS, Part, leaves, parts
from jaxllm.graph.weights.tensor_file import FLOATS, Tensor, TensorFile, TensorFileError, open_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHOWN_PROBLEMS = 100
PLAIN_SUFFIX = "weight"

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
    scheme: Scheme = PLAIN,
    place: PlaceLeaf | None = None,
) -> Params:
    """The parameters of `config`, cast to `dtype`, quantised as `scheme` says, on `device`, or where `place` puts them.

    Raises WeightsError.
    """
    damaged = manifest.problems(Path(directory))
    if damaged:
        raise WeightsError(Path(directory), damaged)
    found = check(Path(directory), config)
    total = sum(tensor.end - tensor.begin for tensor in (entry.tensor for entry in found))
    shapes = {path: leaf.shape for path, leaf in leaves(abstract(config)[1])}
    params: Params = {}
    losses: list[str] = []
    done = 0
    for path, group in itertools.groupby(found, key=lambda entry: entry.part.path):
        tensors: dict[str, dict[str, jax.Array]] = {}
        for entry in group:
            # A CPU array may alias host memory; one that aliases a mapped file would die with the file.
            array = jax.device_put(entry.file.view(entry.tensor), device, may_alias=False)
            tensors.setdefault(entry.part.name, {})[entry.suffix] = array
            done += entry.tensor.end - entry.tensor.begin
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        # Waiting here bounds what is in flight, in staging memory and on the device, to one leaf.
        try:
            leaf, loss = _leaf(config, path, shapes[path], list(tensors.values()), dtype, scheme)
        except ValueError as error:
            losses.append(f"{', '.join(tensors)}: {error}")
            continue
        node[path[-1]] = leaf if place is None else jax.block_until_ready(place(path, leaf))
        losses += loss
        cut_off = kv_scales.complaint(config, path, leaf)
        losses += [] if cut_off is None else [cut_off]
        if progress is not None:
            progress(done, total)
    if losses:
        raise WeightsError(Path(directory), losses)
    return params


def _leaf(
    config: ModelConfig,
    path: tuple[str | int, ...],
    shape: tuple[int, ...],
    tensors: list[dict[str, jax.Array]],
    dtype: DTypeLike,
    scheme: Scheme,
) -> tuple[Any, list[str]]:
    """The leaf that these tensors make, and what is wrong with it."""
    if config.stored is not None and any(each.keys() != {PLAIN_SUFFIX} for each in tensors):
        return jax.block_until_ready(stored.leaf(config.stored, tensors)), []
    arrays = tuple(each[PLAIN_SUFFIX] for each in tensors)
    whole = _join(arrays, shape, dtype)
    leaf = jax.block_until_ready(scheme.leaf(path, whole))
    loss = complaint(path, whole, leaf)
    return leaf, [] if loss is None else [loss]


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _join(arrays: tuple[jax.Array, ...], shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return jnp.concatenate([array.astype(dtype) for array in arrays]).reshape(shape)


@dataclass(frozen=True)
class Found:
    """A tensor of a checkpoint: `suffix` says which of the tensors of its part it is."""

    part: Part
    suffix: str
    file: TensorFile
    tensor: Tensor


def check(directory: Path, config: ModelConfig) -> list[Found]:
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
        plain = where.get(part.name)
        for name, wanted in _wanted(config, part, plain[1].dtype if plain else None):
            file, tensor = where.pop(name, (None, None))
            home = weight_map.get(name, SINGLE)
            if file is None or tensor is None:
                # Else its file is the problem, and already listed.
                if not wanted.optional and (home in files or name not in weight_map):
                    problems.append(f"{home if home in files else INDEX}: {name} is missing{_why_wanted(name, wanted)}")
                continue
            problems += _misfits(file, tensor, wanted)
            found.append(Found(part, wanted.suffix, file, tensor))
    for name, (file, _) in where.items():
        tied_head = config.tie_embeddings and name == "lm_head.weight"  # transformers drops it too
        if not tied_head and not name.endswith(IGNORED_SUFFIXES):
            problems.append(f"{file.path.name}: {name} has no place in the model")
    if config.kv_scales and kv_scales.read(directory, config.num_layers) != config.kv_scales:
        problems.append("its k_scale and v_scale are not those the engine was built with")
    if problems:
        raise WeightsError(directory, problems)
    return found


def _wanted(config: ModelConfig, part: Part, plain_dtype: str | None) -> Iterator[tuple[str, StoredTensor]]:
    """Names and shapes of the tensors that make this part: one, or what a quantised checkpoint has for a matrix."""
    is_quantised = config.stored is not None and part.path[-1] in MATRICES and plain_dtype not in FLOATS
    if config.stored is None or not is_quantised:
        yield part.name, StoredTensor(PLAIN_SUFFIX, part.shape, tuple(FLOATS))
        return
    module = part.name.removesuffix(PLAIN_SUFFIX)
    for tensor in stored.tensors(config.stored, *part.shape):
        yield module + tensor.suffix, tensor


def _misfits(file: TensorFile, tensor: Tensor, wanted: StoredTensor) -> Iterator[str]:
    plain = wanted.suffix == PLAIN_SUFFIX
    shapes = tensor.shape, wanted.shape
    if not plain:  # scales are written with sizes of 1, or as one number for all
        shapes = tuple(tuple(size for size in shape if size != 1) for shape in shapes)
    if shapes[0] != shapes[1] and not (wanted.suffix == "weight_scale" and shapes[0] == ()):
        yield f"{file.path.name}: {tensor.name} is {list(tensor.shape)}, wanted {list(wanted.shape)}"
    if tensor.dtype not in wanted.dtypes:
        yield f"{file.path.name}: {tensor.name} is {tensor.dtype}, must be one of {', '.join(wanted.dtypes)}"


def _why_wanted(name: str, wanted: StoredTensor) -> str:
    why = " (config.json has tie_word_embeddings = false)" if name == TOP_TENSORS["head"] else ""
    return f"; wanted {list(wanted.shape)}{why}"


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
