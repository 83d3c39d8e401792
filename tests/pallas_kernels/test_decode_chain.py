from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.kernel_backends import ON_GPU, declined, pairs

from pallas_kernels.decode_chain import cuda
from pallas_kernels.decode_chain.api import Dense, Following, decode_chain
from pallas_kernels.decode_chain.specs import CHAIN_SPECS, EPS, REAL_CHAIN_SPECS, ChainSpec

SPECS = CHAIN_SPECS + (REAL_CHAIN_SPECS if ON_GPU else ())


def arguments(spec, rows=None):
    arrays = {name: None if array is None else jnp.asarray(array) for name, array in spec.inputs().items()}
    x, mixed = arrays["x"][:rows], arrays["mixed"][:rows]
    layer = Dense(*(arrays[name] for name in ("o", "norms", "gate_up", "down", "o_bias")))
    if arrays["next_qkv"] is None:
        return x, mixed, layer, None
    return x, mixed, layer, Following(arrays["next_norms"], arrays["next_qkv"], arrays["next_bias"])


def run(name, *args):
    chain = jax.jit(lambda *a: decode_chain(*a, eps=EPS, implementation=name))
    try:
        return chain(*args)
    except NotImplementedError as reason:
        declined(reason)


def exact(spec):
    """The chain in float64 numpy, nothing rounded between."""
    a = {name: None if array is None else array.astype(np.float64) for name, array in spec.inputs().items()}

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight

    x = a["x"] + a["mixed"] @ a["o"].T + (0 if a["o_bias"] is None else a["o_bias"])
    gate, up = np.split(norm(x, a["norms"][1]) @ a["gate_up"].T, 2, -1)
    x = x + (gate / (1 + np.exp(-gate)) * up) @ a["down"].T
    if a["next_qkv"] is None:
        return x, None
    return x, norm(x, a["next_norms"][0]) @ a["next_qkv"].T + (0 if a["next_bias"] is None else a["next_bias"])


@pytest.mark.parametrize(("name", "spec"), pairs("decode_chain", SPECS))
def test_agrees_with_exact_arithmetic(name, spec):
    limit = 6e-3 if spec.dtype == "bfloat16" else 1e-5
    for got, want in zip(run(name, *arguments(spec)), exact(spec), strict=True):
        if want is None:
            assert got is None
            continue
        assert got.shape == want.shape
        assert got.dtype == jnp.dtype(spec.dtype)
        assert np.linalg.norm(np.asarray(got, np.float64) - want) <= limit * np.linalg.norm(want)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("spec", [spec for spec in REAL_CHAIN_SPECS if spec.T == 96], ids=lambda spec: spec.name)
def test_the_same_bits_again_and_whatever_the_other_rows(spec):
    first = run("cuda", *arguments(spec))
    x, mixed, *weights = arguments(spec)
    others = run("cuda", x.at[7:].set(1), mixed.at[7:].set(-1), *weights)
    for _ in range(20):
        for got, want, other in zip(run("cuda", *arguments(spec)), first, others, strict=True):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
            np.testing.assert_array_equal(np.asarray(other)[:7], np.asarray(want)[:7])


DEALT = ChainSpec("dealt", T=70, D=192, O=1024, F=512, Q=320, biases=True)


@pytest.mark.skipif(ON_GPU, reason="of the emulated machine")
@pytest.mark.parametrize("shared", cuda.SHARED)
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("width", cuda.WIDTHS[False])
def test_however_a_product_is_dealt_out(monkeypatch, width, splits, shared):
    rows = {1: 130, 2: 70, 3: 7}  # tiles of 192, 128 and 64
    spec = replace(DEALT, T=200 if shared == "weights" else rows[splits], O=256 * splits)

    def cut(rows, columns, depth, gated, blocks):
        wide = 224 if splits == 1 else 64
        return cuda.Cut(wide if gated else width, 1 if gated or depth < 256 * splits else splits, shared)

    monkeypatch.setattr(cuda, "cut_for", cut)
    monkeypatch.setattr(cuda, "refuse_sizes", lambda *_: None)
    for got, want in zip(run("cuda_emulated", *arguments(spec)), exact(spec), strict=True):
        assert np.linalg.norm(np.asarray(got, np.float64) - want) <= 6e-3 * np.linalg.norm(want)


@pytest.mark.skipif(ON_GPU, reason="of the emulated machine")
@pytest.mark.parametrize("rows", [3, 66])  # all of a row's sums at one time, and half of them
@pytest.mark.parametrize("splits", [2, 4, 6])
def test_splits_of_long_rows_are_added_up_whatever_their_number(monkeypatch, splits, rows):
    spec = ChainSpec("long_rows", T=rows, D=1280, O=64 * splits, F=64, Q=64)
    monkeypatch.setattr(
        cuda, "cut_for", lambda _, __, depth, gated, ___: cuda.Cut(64, splits if depth == spec.O else 1, "rows")
    )
    for got, want in zip(run("cuda_emulated", *arguments(spec)), exact(spec), strict=True):
        assert np.linalg.norm(np.asarray(got, np.float64) - want) <= 6e-3 * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("rows", "shared", "cuts"),
    [
        (33, "rows", [(128, 4), (224, 1), (128, 4), (96, 2)]),  # 8B: a unit for all but four multiprocessors
        (128, "rows", [(128, 4), (224, 1), (128, 4), (96, 2)]),
        (160, "rows", [(128, 4), (224, 1), (128, 4), (96, 2)]),
        (256, "weights", [(128, 2), (224, 1), (128, 2), (96, 1)]),
    ],
)
def test_a_product_is_cut_so_that_multiprocessors_end_together(rows, shared, cuts):
    D, O, F, Q = 4096, 4096, 14336, 6144  # noqa: E741
    products = (D, O, False), (F, D, True), (D, F, False), (Q, D, False)
    assert [cuda.cut_for(rows, *product, 132) for product in products] == [cuda.Cut(*cut, shared) for cut in cuts]


def test_wrong_shapes_raise_an_error_that_names_them():
    x, mixed, layer, following = arguments(ChainSpec("any", T=2, D=64, O=64, F=64, Q=64, dtype="float32"))
    wrong = Dense(layer.o, layer.norms, layer.gate_up[:-1], layer.down)
    with pytest.raises(ValueError, match=r"gate_up must be \[128, 64\] for x \[2, 64\], got \[127, 64\]"):
        decode_chain(x, mixed, wrong, following, eps=EPS)
    with pytest.raises(ValueError, match=r"mixed must be \[2, 64\]"):
        decode_chain(x, mixed[:1], layer, following, eps=EPS)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"T": 257}, "at most 256 rows"),
        ({"D": 8256}, "at most 8192 numbers"),
        ({"Q": 96}, "Q = 96 is no multiple of 64"),
    ],
)
def test_what_the_cuda_kernel_does_not_do_it_refuses_before_it_runs(sizes, reason):
    T, D, O, F, Q = ({"T": 8, "D": 256, "O": 128, "F": 192, "Q": 384} | sizes).values()  # noqa: E741
    shapes = (T, D), (T, O), (D, O), (2, D), (2 * F, D), (D, F), (2, D), (Q, D)
    x, mixed, o, norms, gate_up, down, after, qkv = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    with pytest.raises(NotImplementedError, match=reason):
        cuda.refuse(x, mixed, Dense(o, norms, gate_up, down), Following(after, qkv))
