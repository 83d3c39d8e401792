"""Decode steps of some numbers of rows go through the op for everything between two attentions; the others do not."""

import dataclasses
import types

import jax.numpy as jnp
import pytest

from jaxllm.graph import steps
from jaxllm.graph.layers import chain
from jaxllm.graph.steps import Graph
from sharding.collectives import ALONE

GRAPH = Graph("graphdef", "config", 16, 3, chained=(2, 4))


@pytest.mark.parametrize(
    ("decode", "rows", "goes"),
    [(True, 1, False), (True, 2, True), (True, 4, True), (True, 5, False), (False, 3, False)],
)
def test_which_steps_are_chained(decode, rows, goes):
    onward = GRAPH.onward(ALONE, types.SimpleNamespace(decode=decode, rows=rows))
    assert (onward.func is chain.chained) is goes
    assert dataclasses.replace(GRAPH, chained=None).onward(ALONE, types.SimpleNamespace(decode=True, rows=3)).func is (
        steps.joined
    )


def test_what_no_kernel_takes_goes_the_other_way(caplog, monkeypatch):
    def declines(*_, **__):
        raise ExceptionGroup("none", [NotImplementedError("too many rows")])

    monkeypatch.setattr(chain, "_dense", lambda layer: layer)
    layer, x = types.SimpleNamespace(norm_eps=1e-5), jnp.ones((3, 4))
    with caplog.at_level("INFO"):
        out = chain.chained(declines, lambda *_: ("the other way", None), layer, None, x, x)
    assert out == ("the other way", None)
    assert caplog.messages == ["products one by one: too many rows"]
