"""All layers in one kernel agree with the layers' parts one by one; a row's bits are its own."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers.decode_layers import error, kernels, run, slot
from helpers.kernel_backends import ON_GPU
from jax.sharding import AxisType

from pallas_kernels.decode_chain import cuda as chain
from pallas_kernels.decode_layers import emulated, wide
from pallas_kernels.decode_layers.api import decode_layers
from pallas_kernels.decode_layers.cuda import programs_for
from pallas_kernels.decode_layers.specs import EPS, LAYERS_SPECS, LayersSpec

HEAD = next(spec for spec in LAYERS_SPECS if spec.V)
ONE_HEAD = LayersSpec("one_head", (150,), L=1, D=128, N=1, K=1, F=64, qkv_bias=True)
WIDE = (
    LayersSpec("two_dozen", (17, 300, 0, 64, 5, 1) * 4, L=3, K=1),
    LayersSpec("a_row_cut_between_all", (1200,), L=2, width=80, page_size=64),
    LayersSpec("more_than_64", (40,) * 65 + (1, 0, 100), qk_norm=True, qkv_bias=True, o_bias=True, V=96),
)
MORE = LayersSpec("nearly_200", (40,) * 65 + (1, 0) * 64, D=128, F=128, qk_norm=True)
cpu_only = pytest.mark.skipif(ON_GPU, reason="the emulator is for machines without a GPU")


@pytest.mark.parametrize(("name", "spec"), kernels(LAYERS_SPECS + ((*WIDE, MORE) if ON_GPU else ())))
def test_the_layers_in_one_agree_with_the_reference_and_leave_other_pages_alone(name, spec):
    given = spec.inputs()
    x, pages = run(name, spec, given)
    expected, written = run("reference", spec, given)
    live = [row for row, length in enumerate(spec.lengths) if length]
    bound = 1e-5 if spec.dtype == "float32" else 1.5e-2
    assert error(x[live], expected[live]) < bound
    for got, want, before in zip(pages, written, given["pages"], strict=True):
        for own, other, old in zip(got, want, before, strict=True):
            new = np.zeros(own.shape, bool)
            for row in live:
                page, offset = slot(spec, given, row)
                new[page, :, offset] = True
                assert error(own[page, :, offset], other[page, :, offset]) < bound
            assert own[~new].tobytes() == np.asarray(old)[~new].tobytes()  # NaN too


# Other kernels than that of few rows leave the head to XLA, which adds in another order for another number of rows.
OWN_BITS = [pair for pair in kernels([LAYERS_SPECS[0], HEAD]) if "cuda" in pair.values[0] or not pair.values[1].V]


@pytest.mark.parametrize(("name", "spec"), OWN_BITS)
def test_a_row_has_the_same_bits_in_company_and_alone(name, spec):
    given = spec.inputs()
    together, pages = run(name, spec, given)
    live = [row for row, length in enumerate(spec.lengths) if length > 4]
    for row in live[::2][:2]:
        alone = dict(given)
        for key in ("x", "page_table", "kv_lens", "cosines", "sines"):
            alone[key] = given[key][row : row + 1]
        x, own = run(name, spec, alone)
        np.testing.assert_array_equal(x[0], together[row])
        page, offset = slot(spec, given, row)
        for got, want in zip(own, pages, strict=True):
            np.testing.assert_array_equal(got[0][page, :, offset], want[0][page, :, offset])
            np.testing.assert_array_equal(got[1][page, :, offset], want[1][page, :, offset])


@pytest.mark.parametrize(("name", "spec"), kernels([ONE_HEAD]))
def test_probabilities_keep_more_bits_than_the_values_they_are_multiplied_with(name, spec):
    # Queries, keys and values are biases and pages alone, and the output is attention: what is left of terms 1 and -1,
    # whose values are rounded. Probabilities rounded to bf16 would change all of it.
    given, rng, n = spec.inputs(), np.random.default_rng(4), spec.lengths[0]
    bf16 = given["x"].dtype
    layer, key = given["layers"][0], rng.standard_normal((n, 128)).astype(bf16)
    query = rng.standard_normal(128).astype(bf16)
    scores = key.astype(float) @ query.astype(float) * spec.H**-0.5
    p = np.exp(scores - scores.max())
    signs = rng.permuted(np.tile([[1.0], [-1.0]], (n // 2, 128)), axis=0)
    value = (signs / p[:, None]).astype(bf16)
    for name_ in ("qkv", "down"):
        layer[name_] = np.zeros_like(layer[name_])
    layer["qkv_bias"] = np.concatenate([query, key[-1], value[-1]])
    layer["o"] = np.eye(128, dtype=np.float32).astype(bf16)
    given |= {"x": np.zeros_like(given["x"]), "cosines": np.ones((1, 64), np.float32)}
    given["sines"] = np.zeros((1, 64), np.float32)
    for pages, what in zip(given["pages"][0], (key, value), strict=True):
        for at in range(n - 1):
            page, offset = given["page_table"][0, at // spec.page_size], at % spec.page_size
            pages[page, 0, offset] = what[at]
    want = p @ value.astype(float) / p.sum()
    assert error(run(name, spec, given)[0][0], want) < 1e-2


@cpu_only
@pytest.mark.parametrize(
    ("name", "spec"),
    [(f"{name}_emulated", spec) for name in ("wide", "launched") for spec in WIDE] + [("launched_emulated", MORE)],
    ids=lambda each: getattr(each, "name", each),
)
def test_many_rows_agree_with_the_reference_on_any_machine(name, spec, monkeypatch):
    given, live = spec.inputs(), np.array(spec.lengths) > 0
    expected, written = run("reference", spec, given)
    for blocks in (2, 6):  # of other numbers products have other splits
        monkeypatch.setattr(emulated, "PROGRAMS", blocks)
        x, pages = run(name, spec, given)
        assert error(x[live], expected[live]) < 1.5e-2
        for got, want in zip(jax.tree.leaves(pages), jax.tree.leaves(written), strict=True):
            near = np.testing.assert_allclose
            near(got.astype(np.float32), want.astype(np.float32), rtol=2**-6, atol=2**-5, equal_nan=True)


@cpu_only
def test_attention_adds_up_what_the_depth_of_qkv_was_cut_into(monkeypatch):
    """Widths this small are cut by no choice of their own."""
    spec = LayersSpec("cut", (40, 1, 0, 100), L=2, D=192, F=192, qkv_bias=True, o_bias=True)
    monkeypatch.setattr(chain, "cut_for", lambda *product: chain.Cut(64, 1 if product[3] else 3, "rows"))
    given, live = spec.inputs(), np.array(spec.lengths) > 0
    x, expected = run("launched_emulated", spec, given)[0], run("reference", spec, given)[0]
    assert error(x[live], expected[live]) < 1.5e-2


@cpu_only
def test_more_layers_than_a_launch_holds_are_several_launches(monkeypatch):
    spec = replace(WIDE[2], name="deep", L=3, V=0)
    given, live = spec.inputs(), np.array(spec.lengths) > 0
    x, pages = run("wide_emulated", spec, given)
    monkeypatch.setattr(wide, "MOST_LAYERS", 2)
    parted, written = run("wide_emulated", spec, given)
    assert error(parted[live], x[live]) < 1e-2  # the first qkv of a launch is XLA's
    expected = run("reference", spec, given)[0]
    assert error(parted[live], expected[live]) < 1.5e-2
    assert len(written) == len(pages) == 3


@cpu_only
def test_blocks_without_a_share_in_some_stage_take_part_in_the_others(monkeypatch):
    spec = replace(LAYERS_SPECS[0], name="narrow", lengths=(70, 0, 5), D=64, N=1, K=1, F=64, L=2, V=40)
    monkeypatch.setattr(emulated, "PROGRAMS", 12)
    assert programs_for(64, 384, 128, 64, 12) == 12  # D has four units: the fourth block has a run of keys and only qkv
    given = spec.inputs()
    x, expected = run("cuda_emulated", spec, given)[0], run("reference", spec, given)[0]
    assert error(x[[0, 2]], expected[[0, 2]]) < 1.5e-2


def test_the_8b_shape_is_dealt_out_evenly_to_128_of_132_multiprocessors():
    assert programs_for(4096, 6144, 4096, 14336, 132) == 128


def test_a_machine_too_small_for_the_residual_stream_is_refused():
    with pytest.raises(NotImplementedError, match="needs 64 multiprocessors, there are 4"):
        programs_for(8192, 10240, 8192, 28672, 4)


@cpu_only
@pytest.mark.parametrize(
    ("name", "most", "F"),
    [("wide_emulated", 1, 128), ("wide_emulated", wide.MOST_LAYERS, 128), ("launched_emulated", 1, 512)],
    ids=["launch_a_layer", "one_launch", "launches_that_overlap"],
)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.kernels)])
def test_devices_that_share_layers_hold_the_same_bits_step_after_step(ranks, name, most, F, monkeypatch):
    monkeypatch.setattr(wide, "MOST_LAYERS", most)
    spec = LayersSpec(
        "shared",
        (17, 300, 0, 64, 5, 100),
        L=3,
        N=2 * ranks,
        K=ranks,
        F=F * ranks,
        qkv_bias=True,
        o_bias=True,
        qk_norm=True,
    )
    given, live = spec.inputs(), np.array(spec.lengths) > 0
    expected, written = run("reference", spec, given)
    x, layers, pages, *rows = spec.arguments(given)
    options = {"eps": EPS, "scale": spec.H**-0.5, "groups": (tuple(range(ranks)),)}
    op = functools.partial(decode_layers, **options, implementation=name)
    step = spec.shared_by(op, jax.make_mesh((ranks,), ("t",), axis_types=(AxisType.Auto,)), layers[0])
    layers = spec.dealt(layers, ranks)
    for _ in range(3):  # lines hold what an earlier step sent
        got, pools = step(x, layers, pages, *rows)
        got = np.asarray(got).reshape(ranks, len(live), -1)[:, live]
        assert error(got[0], expected[live]) < 1.5e-2
        for other in got[1:]:
            np.testing.assert_array_equal(other, got[0])
        for pool, want in zip(jax.tree.leaves(pools), jax.tree.leaves(written), strict=True):
            near = np.testing.assert_allclose
            near(np.asarray(pool, np.float32), want.astype(np.float32), rtol=2**-6, atol=2**-5, equal_nan=True)
