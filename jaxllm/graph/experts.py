"""Routed experts that can be moved between devices: their tables in a model's parameters, and the move itself.

In: the Homes of a model, its parameters. Out: parameters with a table in each sparse layer, and a function from one
layer's experts and the slots they come from to the same experts elsewhere. No shape depends on where an expert lies, so
nothing is compiled when they move. Knows nothing of load or of when to move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.graph.models.decoder import Params
from jaxllm.graph.spread import Home
from sharding.axes import expert_rows
from sharding.balance import table_of
from sharding.dispatch import moved
from sharding.placement import Placement

LEAVES = ("experts_gate_up", "experts_down")
TABLE = "copies"


def sparse_layers(params: Params) -> list[int]:
    """Those that have experts."""
    return [number for number, layer in params["layers"].items() if LEAVES[0] in layer["mlp"]]


def add_tables(home: Home, params: Params) -> None:
    """To parameters just loaded: where their experts were put. Does nothing where experts stay."""
    experts, placement = home.model.experts, home.placement
    if experts is None or placement is None or not experts.copies:
        return
    table = table_of(expert_rows(home.model, placement.config).reshape(-1), experts.count, experts.copies)
    for number in sparse_layers(params):
        params["layers"][number]["mlp"][TABLE] = jax.device_put(table, home.whole)


def move(placement: Placement, params: Params) -> tuple[Callable[..., Params], tuple[Any, ...]]:
    """The move of one layer's experts, and its abstract arguments: the leaves and i32[slots]."""
    number = sparse_layers(params)[0]
    names = {name: name for name in LEAVES}
    placement.roles.update({name: placement.roles["params"]["layers"][number]["mlp"][name] for name in LEAVES})

    def run(leaves: Params, source: jax.Array) -> Params:
        return jax.tree.map(lambda leaf: moved(leaf, source, "expert", placement.config.expert), leaves)

    leaves = {name: params["layers"][number]["mlp"][name] for name in LEAVES}
    slots = jax.tree.leaves(leaves)[0].shape[0]
    source = jax.ShapeDtypeStruct((slots,), np.dtype(jnp.int32), sharding=placement.whole)
    return placement.wrap(run, (names, "whole"), names), (leaves, source)
