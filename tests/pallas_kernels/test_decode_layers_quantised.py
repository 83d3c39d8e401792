"""All layers in one op with weights in few bits: the numbers are those of the weights they stand for."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.decode_layers import error, kernels, run, slot
from helpers.kernel_backends import ON_GPU

from pallas_kernels import bf12
from pallas_kernels.decode_chain import cuda as chain
from pallas_kernels.decode_layers import emulated
from pallas_kernels.decode_layers.api import Few, decode_layers
from pallas_kernels.decode_layers.cuda import programs_for
from pallas_kernels.decode_layers.reference import widened
from pallas_kernels.decode_layers.specs import BF12_SPECS, EPS, MATRICES, QUANTISED_SPECS, LayersSpec, few
from pallas_kernels.quant_matmul import packing

BY_NAME = {spec.name: spec for spec in (*QUANTISED_SPECS, *BF12_SPECS)}
KINDS = ("int4", "fp8", "int8")
ALONE = ("int4_deep", "fp8_head", "int8_head")
EXACT = {kind: replace(BY_NAME[kind], name=f"{kind}_one", lengths=(3, 5), L=1, F=256) for kind in KINDS}


def ours(specs):
    """Without the kernels for many rows, or of bf12 those for few, which decline."""
    others = {"bf12": ("cuda", "wide")}
    return [p for p in kernels(specs) if not p.values[0].startswith(others.get(p.values[1].kind, ("wide", "launched")))]


@pytest.mark.parametrize(("name", "spec"), ours(BY_NAME.values()))
def test_quantised_layers_agree_with_the_reference(name, spec):
    given = spec.inputs()
    x, pages = run(name, spec, given)
    expected, written = run("reference", spec, given)
    live = [row for row, length in enumerate(spec.lengths) if length]
    assert error(x[live], expected[live]) < 1.5e-2
    for got, want in zip(jax.tree.leaves(pages), jax.tree.leaves(written), strict=True):
        for row in live:
            page, offset = slot(spec, given, row)
            assert error(got[page, :, offset], want[page, :, offset]) < 1.5e-2


@pytest.mark.parametrize(("name", "spec"), ours([BY_NAME[each] for each in ALONE]))
def test_a_row_has_the_same_bits_in_company_and_alone(name, spec):
    given = spec.inputs()
    together, _ = run(name, spec, given)
    row = spec.lengths.index(33)
    alone = given | {key: given[key][row : row + 1] for key in ("x", "page_table", "kv_lens", "cosines", "sines")}
    np.testing.assert_array_equal(run(name, spec, alone)[0][0], together[row])


@pytest.mark.parametrize(("name", "spec"), ours(EXACT.values()))
def test_every_weight_counts_for_what_it_is(name, spec):
    # The head's place is taken by `o`, whose input, attention of one token, is the value that the bias of qkv gives:
    # each output is one column of `o`, exactly, so that all 16 or 256 numbers of a kind can be seen, with their scales.
    spec = replace(spec, lengths=(1,), qkv_bias=True, N=2, K=2)
    given, rng = spec.inputs(), np.random.default_rng(3)
    x, layers, pages, *rows = spec.arguments(given)
    number = {"int4": 16, "int8": 256, "fp8": 256}[spec.kind]
    codes = rng.integers(0, number, (spec.D, spec.N * spec.H))
    codes[:, :number] = np.arange(number)[None] if number <= codes.shape[1] else codes[:, :number]
    if spec.kind == "fp8":
        codes = np.where(codes % 128 == 127, 0, codes).astype(np.uint8)  # NaN
        values = jax.lax.bitcast_convert_type(jnp.asarray(codes), jnp.float8_e4m3fn)
    else:
        signed = (codes - number // 2).astype(np.int8)
        values = packing.pack(jnp.asarray(signed), 4 if spec.kind == "int4" else 8)
    scale = few(jnp.asarray(rng.standard_normal(codes.shape), jnp.float32), spec.kind, spec.group).scale
    nothing = jax.tree.map(jnp.zeros_like, layers[0])
    for column in (0, 9, 15, 77, 254):
        bias = np.zeros(3 * spec.N * spec.H, np.float32)
        bias[2 * spec.N * spec.H + column] = 1
        layer = replace(nothing, o=Few(values, scale), qkv_bias=jnp.asarray(bias, jnp.bfloat16), norms=layers[0].norms)
        out, _ = decode_layers(jnp.zeros_like(x), [layer], pages[:1], *rows, eps=EPS, scale=1.0, implementation=name)
        want = np.asarray(widened(layer.o)[:, column].astype(jnp.bfloat16), np.float32)
        np.testing.assert_array_equal(np.asarray(out[0], np.float32), want)


def with_escapes(weight):
    """Zeros and numbers that have no code, in all steps of slabs and beside each other; a slab of zeros, an outlier."""
    weight = weight.copy()
    weight[::17, ::5] = 0
    weight[32:48, 64:128] = 0
    weight[3, [0, 9, 15]] = -0.0, 1e-33, -1e-30
    weight[12, [9, 77, 110, 111, 126, 127]] = 1e-20, -3e-28, 1e-30, 1e-9, -1e-8, 1e-32
    weight[12, 15] = 2
    weight[22, :15] = 2.0 ** -np.arange(3, 18)
    assert bf12.pack(jnp.asarray(weight))[1] == 0
    return weight


PACKED_CUTS = {  # of o, gate and up, down, qkv: widths and splits
    "whole": ((64, 1), (128, 1), (64, 1), (64, 1)),
    "parted": ((128, 3), (224, 1), (192, 2), (192, 3)),
    "more_than_there_is": ((192, 2), (224, 1), (128, 4), (128, 2)),
}


@pytest.mark.skipif(ON_GPU, reason="of the emulated machine")
@pytest.mark.parametrize(("cuts", "blocks"), [("whole", 2), ("parted", 6), ("more_than_there_is", 2)])
def test_launched_layers_in_12_bits_have_the_bits_of_those_in_16_cut_alike(cuts, blocks, monkeypatch):
    spec = LayersSpec("bf12_launched", (33, 0, 5, *[1] * 14), L=1, D=320, N=6, F=320, o_bias=True, qkv_bias=True)
    given, wide = spec.inputs(), (96, 224, 64, 128)
    for layer in given["layers"]:
        layer.update({key: with_escapes(layer[key]) for key in MATRICES if key in layer})
    numbers = {(320, 768, False): 0, (320, 320, True): 1, (320, 320, False): 2, (1280, 320, False): 3}
    monkeypatch.setattr(emulated, "PROGRAMS", blocks)

    def plain(_, *product):
        return chain.Cut(wide[numbers[product[:3]]], PACKED_CUTS[cuts][numbers[product[:3]]][1], "rows")

    monkeypatch.setattr(chain, "cut_for", plain)
    monkeypatch.setattr(chain, "packed_cut_for", lambda *p: chain.Cut(*PACKED_CUTS[cuts][numbers[p[:3]]], "packed"))
    expected, written = run("launched_emulated", spec, given)
    x, pages = run("launched_emulated", replace(spec, kind="bf12"), given)
    live = [row for row, length in enumerate(spec.lengths) if length]
    np.testing.assert_array_equal(np.asarray(x, np.float32)[live], np.asarray(expected, np.float32)[live])
    for got, want in zip(jax.tree.leaves(pages), jax.tree.leaves(written), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_products_of_12_bits_are_cut_so_that_multiprocessors_end_together():
    products = (4096, 4096, False), (14336, 4096, True), (4096, 14336, False), (6144, 4096, False)
    cuts = [(128, 4), (224, 1), (192, 6), (192, 4)]
    assert [chain.packed_cut_for(*each, 132) for each in products] == [chain.Cut(*cut, "packed") for cut in cuts]


@pytest.mark.parametrize(("name", "spec"), ours([EXACT["int4"]]))
def test_one_nibble_or_one_scale_changes_what_comes_out(name, spec):
    given = spec.inputs()
    x, layers, pages, *rows = spec.arguments(given)

    def out(down):
        layer = replace(layers[0], down=down)
        return np.asarray(
            decode_layers(x, [layer], pages, *rows, eps=EPS, scale=1.0, implementation=name)[0], np.float32
        )

    down = layers[0].down
    before = out(down)
    for changed in (
        replace(down, values=down.values.at[1, 2, 3, 100].set(down.values[1, 2, 3, 100] ^ 8)),
        replace(down, scale=down.scale.at[1, 70].multiply(4)),
    ):
        wrong = np.unique(np.nonzero(out(changed) != before)[1])
        assert len(wrong) == 1
        assert wrong[0] // packing.TILE == 1


@functools.cache
def arguments(spec):
    return spec.arguments(spec.inputs())


def refused(spec, change, **options):
    x, layers, pages, *rows = arguments(spec)
    layers = [change(layer) for layer in layers]
    reasons = []
    for name in ("cuda", "wide", "launched"):
        with pytest.raises(NotImplementedError) as caught:
            decode_layers(x, layers, pages, *rows, eps=EPS, scale=1.0, **options, implementation=name)
        reasons.append(str(caught.value))
    return reasons


def test_what_the_kernels_do_not_do_with_quantised_weights_is_refused_with_the_reason():
    spec = replace(BY_NAME["int4"], lengths=(1,), D=128, N=1, K=1, F=256)
    wide = spec.inputs()["layers"][0]["down"]

    def down(kind, group=128, scales="bfloat16"):
        return lambda layer: replace(layer, down=few(jnp.asarray(wide), kind, group, scales))

    plain = ["quantised weights", "weights that are int4"]
    assert refused(spec, down("int8")) == [
        "weights of one kind, got int4 and int8",
        "quantised weights",
        "weights that are int4 and int8",
    ]
    assert refused(spec, lambda layer: replace(layer, down=jnp.asarray(wide)))[0] == (
        "weights of one kind, got int4 and bf16"
    )
    assert refused(spec, down("int4", 32)) == ["int4 in groups of 64 or 128 inputs, got 32", *plain]
    assert "several sizes" in refused(spec, down("int4", 64))[0]
    assert "several dtypes" in refused(spec, down("int4", 128, "float16"))[0]
    assert "no multiple of 128" in refused(replace(spec, F=192, group=64), lambda layer: layer)[0]
    twelve = refused(replace(BY_NAME["bf12"], lengths=(1,) * 33), lambda layer: layer)
    assert twelve[::2] == ["at most 8 rows, got 33", "at most 32 rows by weights in 12 bits, got 33"]
    assert refused(replace(spec, lengths=(1,) * 20), lambda layer: layer) == ["at most 8 rows, got 20", *plain]


@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_another_shape_are_an_error(kind):
    weight = few(jnp.ones((64, 128)), kind)
    weight.check("good")
    with pytest.raises(ValueError, match=f"layer 3: {kind}"):
        replace(weight, scale=weight.scale[:-1]).check("layer 3") if kind != "int4" else replace(
            weight, scale=weight.scale[:, :-1]
        ).check("layer 3")
    with pytest.raises(ValueError, match="need e4m3"):
        Few(weight.values.astype(jnp.float32), weight.scale).check("layer 3")


def test_packed_strips_of_gate_and_up_are_dealt_out_together():
    assert programs_for(4096, 6144, 4096, 14336, 132, packed=True) == 128
    assert programs_for(64, 384, 128, 64, 12, packed=True) == 12
