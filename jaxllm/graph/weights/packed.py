"""A plain model's matrices once more, in 12 bits a weight without loss: what decode steps of few rows read.

In: parameters, on their devices or as shapes. Out: the same with their twins beside them, under a key that no model
has: matrices of layers by their names, gate_up with its rows in turns. Of a matrix that devices share, each packs its
own part. The head's table has none, as no kernel reads one. Twins come and go with the parameters they were made of, so
that none is ever older. Knows nothing of steps, nor of when twins pay.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.core import JaxLLMError
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import Params
from pallas_kernels import bf12

KEY = "packed"  # sorts behind all that a model has: the first leaf stays the first
PLACES = {"qkv": "attention", "o": "attention", "gate_up": "mlp", "down": "mlp"}
AT_ONCE = 2**24  # weights: packing takes some 40 bytes of each beside them


class PackingError(JaxLLMError):
    """These weights cannot be packed; the message says which and why."""


def refusal(model: ModelConfig, params: Params) -> str | None:
    """Why a model of these parameters, or their shapes, gets no twins; None: it can."""
    if model.experts is not None:
        return "experts"
    if any(model.windows):
        return "attention within a window"
    for number, layer in params["layers"].items():
        if layer["mlp"].get("gate_up_bias") is not None:
            return "a bias of gate and up"
        for name, place in PLACES.items():
            why = _odd(layer[place][name])
            if why:
                return f"layer {number}: {name} is {why}"
    return None


def _odd(weight: Any) -> str | None:
    if not isinstance(weight, jax.Array | jax.ShapeDtypeStruct):
        return "quantised"
    if weight.dtype != jnp.bfloat16:
        return f"{weight.dtype}, not bfloat16"
    own = weight.shape if weight.sharding is None else weight.sharding.shard_shape(weight.shape)
    if any(size % bf12.TILE for size in own):
        return f"{list(own)} on a device, not of multiples of {bf12.TILE}"
    return None


def with_shapes(params: Params) -> Params:
    """Shapes of parameters that `refusal` has nothing against, with those of their twins."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        N, K = leaf.shape
        return jax.ShapeDtypeStruct(_tiles(N, K), jnp.int32, sharding=leaf.sharding)

    return {**params, KEY: _tree({path: shape(leaf) for path, leaf in _matrices(params)})}


def with_twins(params: Params) -> Params:
    """The parameters with their twins, made where they lie. PackingError where one is too odd for 12 bits."""
    programs = begin(params)
    made = {path: programs[_program_of(path, leaf)].result()(leaf) for path, leaf in _matrices(params)}
    for path, (_, failed) in made.items():
        if int(failed):
            odd = f"{int(failed)} slab{'s' if int(failed) > 1 else ''} of {bf12.SLAB} x {bf12.TILE} weights"
            raise PackingError(f"{'.'.join(map(str, path))}: {odd} with exponents too far apart for 12 bits")
    return {**params, KEY: _tree({path: words for path, (words, _) in made.items()})}


Program = tuple[tuple[int, ...], jax.sharding.Sharding, bool]  # of a matrix's shape, placement and turns
_BEGUN: dict[Program, Future[Callable[[Any], tuple[jax.Array, jax.Array]]]] = {}
_LOCK = threading.Lock()


def begin(params: Params) -> dict[Program, Future[Callable[[Any], tuple[jax.Array, jax.Array]]]]:
    """Compiles what packs these matrices, or those of these shapes: once a process, each kind in its own thread."""
    with _LOCK:
        for path, leaf in _matrices(params):
            program = _program_of(path, leaf)
            if program not in _BEGUN:
                _BEGUN[program] = future = Future()
                threading.Thread(target=_compile, args=(future, *program), daemon=True).start()
        return dict(_BEGUN)


def _program_of(path: tuple[Any, ...], leaf: Any) -> Program:
    return leaf.shape, leaf.sharding, path[-1] == "gate_up"


def _compile(future: Future[Any], shape: tuple[int, ...], sharding: jax.sharding.Sharding, turned: bool) -> None:
    try:
        weight = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
        future.set_result(_packer(sharding).lower(weight, turned=turned).compile())
    except BaseException as error:
        with _LOCK:
            _BEGUN.pop((shape, sharding, turned), None)  # whoever asks next tries again
        future.set_exception(error)


def without_twins(params: Params) -> Params:
    """What the model itself has."""
    return {key: own for key, own in params.items() if key != KEY}


def _matrices(params: Params) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for number, layer in params["layers"].items():
        for name, place in PLACES.items():
            yield ("layers", number, name), layer[place][name]


def _tree(leaves: Mapping[tuple[Any, ...], Any]) -> dict[Any, Any]:
    tree: dict[Any, Any] = {}
    for (*before, last), leaf in leaves.items():
        node = tree
        for key in before:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def _tiles(N: int, K: int) -> tuple[int, ...]:
    return N // bf12.TILE, K // bf12.TILE, bf12.TILE // bf12.SLAB, bf12.WORDS


def _packer(sharding: jax.sharding.Sharding) -> Any:
    return _spread(sharding.mesh, sharding.spec) if isinstance(sharding, NamedSharding) else _pack


@functools.cache
def _spread(mesh: Mesh, spec: P) -> Any:
    """`_pack` of each device's own part."""
    cut = [name for along in spec if along is not None for name in ((along,) if isinstance(along, str) else along)]

    def pack(weight: jax.Array, *, turned: bool) -> tuple[jax.Array, jax.Array]:
        def own(part: jax.Array) -> tuple[jax.Array, jax.Array]:
            words, failed = _pack(part, turned=turned)
            return words, jax.lax.psum(failed, tuple(cut)) if cut else failed

        return jax.shard_map(own, mesh=mesh, in_specs=(spec,), out_specs=(spec, P()), check_vma=False)(weight)

    return jax.jit(pack, static_argnames="turned")


@functools.partial(jax.jit, static_argnames="turned")
def _pack(weight: jax.Array, *, turned: bool) -> tuple[jax.Array, jax.Array]:
    """bf12.pack some rows at a time. Where the last ones are fewer, some are done twice, and counted so."""
    weight = bf12.in_turns(weight) if turned else weight
    N, K = weight.shape
    rows = max(1, min(AT_ONCE // (bf12.TILE * K), N // bf12.TILE)) * bf12.TILE
    if rows == N:
        return bf12.pack(weight)

    def some(number: jax.Array, made: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first = jnp.minimum(number * rows, N - rows)
        words, failed = bf12.pack(jax.lax.dynamic_slice_in_dim(weight, first, rows))
        return jax.lax.dynamic_update_slice_in_dim(made[0], words, first // bf12.TILE, axis=0), made[1] + failed

    return jax.lax.fori_loop(0, -(-N // rows), some, (jnp.zeros(_tiles(N, K), jnp.int32), jnp.int32(0)))
