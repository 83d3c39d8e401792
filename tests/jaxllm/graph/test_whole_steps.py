"""A decode step whose layers are one op gives the logits and the pages of one that goes layer by layer."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.graph.inputs import StepShape, pack
from jaxllm.graph.layers import whole
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import abstract
from jaxllm.graph.quant.leaf import QuantisedWeight, StackedWeight
from jaxllm.graph.quant.scheme import Scheme
from jaxllm.graph.steps import Graph, step
from jaxllm.graph.weights import packed
from jaxllm.graph.weights.random import dummy
from pallas_kernels.decode_layers.api import Few

PAGE, PAGES, ROWS = 8, 12, 4
SIZES = dict(vocab_size=83, num_layers=2, d_model=64, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=96)


def stepped(config, params, *, whole, dtype=jnp.float32):
    """Rows of 9, 1 and 20 tokens, and padding, over pages with something in them."""
    shape = StepShape(ROWS, ROWS, decode=True)
    table = np.zeros((4, 3), np.int32)
    table[:3] = np.random.default_rng(0).permutation(PAGES)[:9].reshape(3, 3)
    packed = jnp.asarray(pack(shape, [5, 80, -2], [1, 1, 1], [9, 1, 20], [0, 2, 1], [0, 1, 2], [], scratch_row=3))
    held = (PAGES, config.num_kv_heads, PAGE, config.head_dim)
    keys = jax.random.split(jax.random.key(1), (config.num_layers, 2))
    kv = [tuple(jax.random.normal(key, held, dtype) for key in pair) for pair in keys]
    graph = Graph(
        abstract(config, dtype)[0],
        config,
        PAGE,
        PAGES,
        whole=(1, 128) if whole else None,
        reference_attention=True,
    )
    run = jax.jit(functools.partial(step, graph, shape))
    last_tokens, logits = jnp.asarray([1, 7, 3, 0], jnp.int32), jnp.zeros((ROWS, config.vocab_size))
    return run(params, kv, jnp.asarray(table), last_tokens, logits, packed)


def random_weights(config):
    params = dummy(config, jnp.float32)
    return jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf + 0.1, params)  # so that norms are not ones


@pytest.mark.parametrize("tied", [False, True])
def test_the_step_gives_the_logits_tokens_and_pages_of_layers_one_by_one(tied, caplog):
    config = ModelConfig(**SIZES, tie_embeddings=tied)
    params = random_weights(config)
    with caplog.at_level(logging.INFO):
        got, want = stepped(config, params, whole=True), stepped(config, params, whole=False)
    assert "by themselves" not in caplog.text
    assert got.logits.dtype == want.logits.dtype == jnp.float32
    assert np.std(want.logits[:3]) > 0.1
    np.testing.assert_allclose(got.logits[:3], want.logits[:3], atol=1e-4)
    np.testing.assert_array_equal(got.token_ids[:3], want.token_ids[:3])
    np.testing.assert_array_equal(got.last_tokens[:3], want.last_tokens[:3])
    for one, other in zip(jax.tree.leaves(got.kv), jax.tree.leaves(want.kv), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_quantised_head_comes_after_layers_in_one(caplog):
    config = ModelConfig(**SIZES)
    params = random_weights(config)
    params["head"] = Scheme("int8").leaf(("layers", 0, "mlp", "down"), params["head"])
    with caplog.at_level(logging.INFO):
        got, want = stepped(config, params, whole=True), stepped(config, params, whole=False)
    assert "final norm and head run by themselves: the head's weights are not of the layers' kind" in caplog.text
    np.testing.assert_allclose(got.logits[:3], want.logits[:3], atol=1e-4)


def quantised(config, scheme, *, head=True):
    params = random_weights(config)
    for layer in params["layers"].values():
        for part, names in (("attention", ("qkv", "o")), ("mlp", ("gate_up", "down"))):
            for name in names:
                layer[part][name] = scheme.leaf((name,), layer[part][name])
    if head:
        params["head"] = scheme.leaf(("head",), params["head"])
    return params


EVEN = SIZES | dict(vocab_size=128, d_model=128, num_heads=8, d_ff=256)  # nothing that leaves would pad


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", 64), Scheme("int4", 128)], ids=str)
def test_quantised_layers_in_one_give_what_they_give_one_by_one(scheme, caplog):
    config = ModelConfig(**EVEN)
    params = quantised(config, scheme)
    with caplog.at_level(logging.INFO):
        got, want = stepped(config, params, whole=True), stepped(config, params, whole=False)
    assert "one by one" not in caplog.text
    assert ("by themselves" in caplog.text) == (scheme.kind == "int4")  # its head is int8
    assert np.std(want.logits[:3]) > 0.1
    np.testing.assert_allclose(got.logits[:3], want.logits[:3], atol=1e-4)
    for one, other in zip(jax.tree.leaves(got.kv), jax.tree.leaves(want.kv), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_fp8_layers_in_one_do_not_round_activations(caplog):
    config = ModelConfig(**EVEN)
    params = quantised(config, Scheme("fp8"))
    wide = jax.tree.map(
        lambda leaf: leaf.widened() if isinstance(leaf, QuantisedWeight) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, QuantisedWeight),
    )
    with caplog.at_level(logging.INFO):
        got, want = stepped(config, params, whole=True), stepped(config, wide, whole=False)
    assert "one by one" not in caplog.text
    np.testing.assert_allclose(got.logits[:3], want.logits[:3], atol=1e-4)


def odd(leaf, **changed):
    return dataclasses.replace(leaf, **changed)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("fp8", lambda leaf: odd(leaf, x_scale=jnp.float32(1))),
        ("fp8", lambda leaf: odd(leaf, scale=jnp.ones((leaf.inputs // 128, leaf.outputs)))),
        ("int4", lambda leaf: odd(leaf, zero=jnp.zeros_like(leaf.scale))),
        ("int4", lambda leaf: odd(leaf, order=jnp.arange(leaf.inputs)[::-1])),
        ("int8", lambda leaf: StackedWeight.of((leaf,))),
    ],
    ids=["static_activations", "blocks", "zeros", "order", "stacked"],
)
def test_leaves_with_more_to_them_run_one_by_one(kind, change, caplog):
    config = ModelConfig(**EVEN)
    params = quantised(config, Scheme(kind))
    params["layers"][1]["mlp"]["down"] = change(params["layers"][1]["mlp"]["down"])
    with caplog.at_level(logging.INFO):
        got, want = stepped(config, params, whole=True), stepped(config, params, whole=False)
    assert "weights of another form than the kernel's" in caplog.text
    np.testing.assert_array_equal(got.logits[:3], want.logits[:3])


def test_padded_leaves_run_one_by_one(caplog):
    config = ModelConfig(**SIZES)
    params = quantised(config, Scheme("int8"))
    with caplog.at_level(logging.INFO):
        got, want = stepped(config, params, whole=True), stepped(config, params, whole=False)
    assert "weights of another form than the kernel's" in caplog.text
    np.testing.assert_array_equal(got.logits[:3], want.logits[:3])


def asked_of(monkeypatch, takes, config, params):
    """A step where only kernels for `takes`, kinds of layers and head, are there; the kinds it asked for, and it."""
    asked, plainly = [], whole.decode_layers

    def layers(x, layers, pages, *rows, head, **how):
        table = None if head is None else head.table
        kinds = [
            each.kind if isinstance(each, Few) else "plain" for each in (layers[0].down, table) if each is not None
        ]
        asked.append(tuple(kinds))
        if asked[-1] not in takes:
            raise ExceptionGroup("nobody", [NotImplementedError("not these")])
        return plainly(x, layers, pages, *rows, head=head, **how)

    monkeypatch.setattr(whole, "decode_layers", layers)
    return asked, stepped(config, params, whole=True, dtype=jnp.bfloat16)


TWINS, PLAIN = ("bf12", "plain"), ("plain", "plain")


@pytest.mark.parametrize(
    ("takes", "asks"),
    [([TWINS, PLAIN], [TWINS]), ([PLAIN], [TWINS, PLAIN]), ([], [TWINS, PLAIN])],
)
def test_twins_are_asked_for_first_and_give_the_same_bits_whichever_is_taken(takes, asks, monkeypatch):
    config = ModelConfig(**EVEN)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_weights(config))
    want = stepped(config, params, whole=True, dtype=jnp.bfloat16)
    monkeypatch.setattr(whole, "PACKED_ROWS", range(ROWS, ROWS + 1))
    asked, got = asked_of(monkeypatch, takes, config, packed.with_twins(params))
    assert asked == asks
    if takes:
        np.testing.assert_array_equal(got.logits[:3], want.logits[:3])
    else:
        np.testing.assert_allclose(got.logits[:3], want.logits[:3], rtol=0.05, atol=0.1)


@pytest.mark.parametrize("rows", [range(1, ROWS), range(ROWS + 1, 33)])
def test_steps_of_other_numbers_of_rows_read_plain_weights(rows, monkeypatch):
    config = ModelConfig(**EVEN)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_weights(config))
    monkeypatch.setattr(whole, "PACKED_ROWS", rows)
    asked, _ = asked_of(monkeypatch, [TWINS, PLAIN], config, packed.with_twins(params))
    assert asked == [PLAIN]
