import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.kernel_backends import ON_GPU, jitted, pairs
from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import get_races

from pallas_kernels.dispatch import explain
from pallas_kernels.grouped_matmul import interpreted, mosaic_sm90, plan, planner, routed
from pallas_kernels.grouped_matmul.api import planned, route, routed_mlp
from pallas_kernels.grouped_matmul.specs import LARGE_SPECS, ROUTED_SPECS, RoutedSpec

TOLERANCE = {"float32": 1e-6, "bfloat16": 8e-3}


def oracle(x, gate_up, down, ids, weights):
    """Float64, one (token, choice) pair at a time."""
    out = np.zeros(x.shape)
    x, gate_up, down = (array.astype(np.float64) for array in (x, gate_up, down))
    E, F = down.shape[0], down.shape[2]
    for token, choice in np.argwhere((ids >= 0) & (ids < E)):
        expert = ids[token, choice]
        both = gate_up[expert] @ x[token]
        gate, up = both[:F], both[F:]
        out[token] += weights[token, choice] * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return out


def check(got, spec, arrays):
    assert got.shape == arrays[0].shape
    assert got.dtype == arrays[0].dtype
    expected = oracle(*arrays)
    error = np.linalg.norm(np.asarray(got, np.float64) - expected)
    assert error <= TOLERANCE[spec.dtype] * np.linalg.norm(expected)


@pytest.mark.parametrize(("name", "spec"), pairs("grouped_matmul", ROUTED_SPECS))
def test_routed_experts_match_a_float64_oracle(name, spec):
    arrays = spec.inputs()
    check(jitted(routed_mlp, name)(*arrays), spec, arrays)


@pytest.mark.skipif(not ON_GPU, reason="gigabytes of weights")
@pytest.mark.gpu
@pytest.mark.parametrize("spec", LARGE_SPECS, ids=lambda spec: spec.name)
def test_experts_of_real_models_match_the_reference(spec):
    arrays = spec.inputs()
    got = np.asarray(jitted(routed_mlp, "mosaic_sm90")(*arrays), np.float64)
    expected = np.asarray(jitted(routed_mlp, "reference")(*arrays), np.float64)
    assert np.linalg.norm(got - expected) <= TOLERANCE[spec.dtype] * np.linalg.norm(expected)


ROUTERS = [SimpleNamespace(name=f"{T}x{E}x{k}", T=T, E=E, k=k) for T, E, k in ((5, 8, 2), (3, 60, 4), (17, 128, 8))]


@pytest.mark.parametrize("norm_topk", [False, True])
@pytest.mark.parametrize(("name", "spec"), pairs("grouped_matmul.route", ROUTERS))
def test_routers_take_the_most_likely_experts_and_ties_go_to_the_lower_number(name, spec, norm_topk):
    logits = np.random.default_rng(0).standard_normal((spec.T, spec.E), np.float32) * 2
    logits[0] = 1.0
    logits[1, : spec.E // 2] = logits[1, 0]
    ids, weights = jitted(route, name, k=spec.k, norm_topk=norm_topk)(logits)
    likely = np.exp(logits.astype(np.float64))
    likely /= likely.sum(axis=1, keepdims=True)
    expected = np.argsort(-likely, axis=1, kind="stable")[:, : spec.k]
    np.testing.assert_array_equal(ids, expected)
    chosen = np.take_along_axis(likely, expected, axis=1)
    if norm_topk:
        chosen /= chosen.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights, chosen, rtol=1e-5)


@pytest.mark.parametrize(("name", "spec"), pairs("grouped_matmul.route", ROUTERS[:1]))
def test_a_token_with_a_nan_logit_has_nan_weights_and_experts_in_range(name, spec):
    logits = np.zeros((spec.T, spec.E), np.float32)
    logits[2, 3] = np.nan
    ids, weights = jitted(route, name, k=spec.k, norm_topk=True)(logits)
    assert np.isnan(weights[2]).all()
    assert np.isfinite(np.delete(weights, 2, axis=0)).all()
    assert ((ids >= 0) & (ids < spec.E)).all()


def kernel(**options):
    run = jax.jit(functools.partial(routed.routed_mlp if ON_GPU else interpreted.routed_mlp, **options))
    return lambda *arrays: np.asarray(run(*arrays)).view(np.uint16)


@pytest.mark.parametrize(
    ("T", "E", "widths", "singles"), [(4, 4, [8], 1), pytest.param(11, 8, [16, 8], 3, marks=pytest.mark.kernels)]
)
def test_a_token_has_the_same_bits_alone_in_a_shared_tile_and_in_sorted_tiles(T, E, widths, singles):
    x, gate_up, down, ids, weights = RoutedSpec("bits", T=T, D=128, F=64, E=E, k=2).inputs()
    whole = kernel()(x, gate_up, down, ids, weights)
    in_tiles = [kernel(shared_tokens=0, width=width)(x, gate_up, down, ids, weights) for width in widths]
    one = kernel()
    alone = [one(x[t : t + 1], gate_up, down, ids[t : t + 1], weights[t : t + 1])[0] for t in range(singles)]
    # The interpreter's products are the CPU's, whose last bit may depend on a token's place in its tile.
    for other in (*in_tiles, np.stack([*alone, *whole[singles:]])):
        apart = np.abs(other.astype(np.int32) - whole.astype(np.int32))
        assert apart.max() <= (0 if ON_GPU else 1)


@pytest.mark.skipif(ON_GPU, reason="the interpreter's race detector")
@pytest.mark.parametrize("options", [{}, {"shared_tokens": 0, "width": 8}], ids=["shared tile", "sorted tiles"])
def test_the_kernels_have_no_races(options):
    kernel(**options)(*RoutedSpec("races", T=6, D=128, F=128, E=6, k=2).inputs())
    assert not get_races().races_found


@pytest.mark.parametrize("options", [{}, {"shared_tokens": 0, "width": 8}], ids=["shared tile", "sorted tiles"])
def test_tokens_of_nan_stay_with_themselves(options):
    x, *rest = RoutedSpec("nan", T=20, D=128, F=64, E=8, k=2).inputs()
    poisoned = x.copy()
    poisoned[7] = np.nan
    run = kernel(**options)
    clean, other = run(x, *rest), run(poisoned, *rest)
    np.testing.assert_array_equal(np.delete(other, 7, axis=0), np.delete(clean, 7, axis=0))


ROUTINGS = [(1, 8, 4, "random"), (7, 8, 2, "random"), (30, 4, 2, "one_expert_hot"), (30, 16, 2, "half_elsewhere")]


def pairs_of(ids, E):
    return [(t, c) for t, c in np.argwhere((ids >= 0) & (ids < E))]


def by_a_kernel(ids, E, N, shared):
    return planner.tiles(ids, E, N, shared=shared, interpret=not ON_GPU)


@pytest.mark.parametrize(("T", "E", "k", "routing"), ROUTINGS)
@pytest.mark.parametrize("maker", ["some elsewhere", "none elsewhere", pytest.param("kernel", marks=pytest.mark.gpu)])
def test_a_shared_tile_is_seen_by_every_expert_in_use_once(T, E, k, routing, maker):
    ids = RoutedSpec("", T=T, D=1, F=1, E=E, k=k, routing=routing).inputs()[3]
    if maker == "none elsewhere":
        ids = ids % E
    arrays = jnp.asarray(ids), E, 32
    found = by_a_kernel(*arrays, True) if maker == "kernel" else plan.shared_tile(*arrays, maker == "some elsewhere")
    experts, count, place, tokens = found
    live = np.asarray(experts)[: int(count[0])]
    assert sorted(live) == sorted({int(ids[pair]) for pair in pairs_of(ids, E)})
    assert tokens is None
    for pair in pairs_of(ids, E):
        assert live[place[pair] // 32] == ids[pair]
        assert place[pair] % 32 == pair[0]


@pytest.mark.parametrize("compared", [0, 10**6], ids=["in blocks", "in one block"])
@pytest.mark.parametrize(("T", "E", "k", "routing"), ROUTINGS)
def test_sorted_pairs_fill_tiles_of_their_expert_in_token_order(T, E, k, routing, compared, monkeypatch):
    monkeypatch.setattr(plan, "COMPARED_PAIRS", compared)
    monkeypatch.setattr(plan, "BLOCK_PAIRS", 8)
    ids = RoutedSpec("", T=T, D=1, F=1, E=E, k=k, routing=routing).inputs()[3]
    experts, count, place, tokens = (np.asarray(each) for each in plan.sorted_tiles(jnp.asarray(ids), E, 8))
    live = pairs_of(ids, E)
    sizes = np.bincount([ids[pair] for pair in live], minlength=E)
    assert count[0] == (-(-sizes // 8)).sum() <= len(experts)
    assert sorted(experts[: count[0]]) == sorted(np.repeat(np.arange(E), -(-sizes // 8)))
    taken = [place[pair] for pair in live]
    assert len(set(taken)) == len(taken)
    for pair in live:
        tile, row = divmod(int(place[pair]), 8)
        assert experts[tile] == ids[pair]
        assert tokens[tile, row] == pair[0]
    for expert in range(E):
        own = [place[pair] for pair in live if ids[pair] == expert]
        assert own == sorted(own)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("T", "E", "k", "routing", "N"),
    [*((*routing, 8) for routing in ROUTINGS), (128, 128, 8, "random", 16), (200, 60, 4, "one_expert_hot", 32)],
)
def test_the_kernel_sorts_pairs_as_xla_does(T, E, k, routing, N):
    ids = jnp.asarray(RoutedSpec("", T=T, D=1, F=1, E=E, k=k, routing=routing).inputs()[3])
    own, expected = by_a_kernel(ids, E, N, False), plan.sorted_tiles(ids, E, N)
    live, takes_part = int(expected.live[0]), np.asarray((ids >= 0) & (ids < E))
    assert int(own.live[0]) == live
    np.testing.assert_array_equal(own.experts[:live], expected.experts[:live])
    np.testing.assert_array_equal(own.tokens, expected.tokens)
    np.testing.assert_array_equal(np.asarray(own.place)[takes_part], np.asarray(expected.place)[takes_part])
    assert 0 <= int(own.experts.min()) <= int(own.experts.max()) < E
    assert 0 <= int(own.place.min()) <= int(own.place.max()) < own.tokens.size


def test_too_many_pairs_for_one_kernel_are_planned_by_several():
    ids = jnp.asarray(RoutedSpec("", T=600, D=1, F=1, E=8, k=4).inputs()[3])
    with pytest.raises(NotImplementedError, match="2400 choices of 8 experts: at most 2048 of 256"):
        by_a_kernel(ids, 8, 8, False)
    assert planned(ids, 8, 8, shared=False, platform="interpret").live.shape == (1,)
    assert (
        "grouped_matmul.plan on interpret: reference (triton_interpret declined: 2400 choices of 8 experts" in explain()
    )


@pytest.mark.parametrize(
    ("ids", "N", "shared", "match"),
    [
        (jnp.zeros((2, 0), jnp.int32), 8, True, "not empty"),
        (jnp.zeros((2, 2), jnp.float32), 8, True, "i32"),
        (jnp.zeros((9, 2), jnp.int32), 8, True, "9 tokens do not fit a tile of 8"),
    ],
)
def test_what_cannot_be_planned_is_said(ids, N, shared, match):
    with pytest.raises(ValueError, match=match):
        planned(ids, 8, N, shared=shared)


def test_the_bound_on_tiles_is_reached():
    sizes = [8 + 1] * 3 + [1]  # each but the last fills a tile and begins one
    assert plan.most_tiles(sum(sizes), 4, 8) == sum(-(-size // 8) for size in sizes)
    assert plan.most_tiles(2, 4, 8) == 2


def test_tiles_hold_twice_an_experts_share_until_that_costs_more_than_it_saves():
    widths = [plan.tile_width(T, 8, 128) for T in (1, 40, 128, 256, 512, 1024, 2048, 8192)]
    assert widths == [8, 8, 16, 32, 64, 64, 128, 128]
    assert plan.tile_width(8192, 1, 1) == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (a[0][:, :32], *a[1:]), "disagree on E, D or F"),
        (lambda a: (*a[:3], a[3].astype(np.int64), a[4]), "expert_ids must be i32"),
        (lambda a: (*a[:4], a[4][:, :1]), "expert_weights must be f32"),
        (lambda a: (a[0][0], *a[1:]), "need x"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_shape(change, message):
    with pytest.raises(ValueError, match=message):
        routed_mlp(*change(RoutedSpec("", T=5, D=64, F=64, E=6, k=2).inputs()))


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        (jnp.zeros((1, 8, 64)), jnp.zeros((2, 128, 64)), "bfloat16 or float16 tokens here, got float32"),
        (jnp.zeros((1, 8, 64), jnp.bfloat16), jnp.zeros((2, 128, 64)), "must be bfloat16 like the tokens"),
        (jnp.zeros((1, 8, 96), jnp.bfloat16), jnp.zeros((2, 128, 96), jnp.bfloat16), "multiple of 64 wide, got 96"),
        (jnp.zeros((1, 8, 64), jnp.bfloat16), jnp.zeros((2, 192, 64), jnp.bfloat16), "multiple of 128 rows.*got 192"),
        (jnp.zeros((1, 257, 64), jnp.bfloat16), jnp.zeros((2, 128, 64), jnp.bfloat16), "at most 256 tokens, got 257"),
    ],
)
def test_the_kernel_says_why_it_declines(x, w, message):
    with pytest.raises(NotImplementedError, match=message):
        mosaic_sm90.refuse(x, w, True, mosaic_sm90.default_blocks(x.shape[1], x.shape[2], w.shape[1]))


@pytest.mark.parametrize("F", [768, 384, 192, 96])
def test_a_shard_of_an_experts_rows_still_has_blocks_that_fit(F):
    x, w = jnp.zeros((1, 128, 2048), jnp.bfloat16), jnp.zeros((2, 2 * F, 2048), jnp.bfloat16)
    if F == 96:  # not two blocks of 64
        with pytest.raises(NotImplementedError, match="multiple of 128 rows"):
            mosaic_sm90.refuse(x, w, True, mosaic_sm90.default_blocks(128, 2048, 2 * F))
    else:
        mosaic_sm90.refuse(x, w, True, mosaic_sm90.default_blocks(128, 2048, 2 * F))


@pytest.mark.skipif(ON_GPU, reason="a CPU's gradient")
def test_the_reference_has_gradients():
    x, gate_up, down, ids, weights = RoutedSpec("", T=5, D=64, F=64, E=6, k=2, dtype="float32").inputs()
    ids = np.minimum(ids, 4)  # expert 5 is never chosen

    def loss(x, gate_up, down):
        return routed_mlp(x, gate_up, down, ids, weights, implementation="reference").sum()

    gradients = jax.grad(loss, argnums=(0, 1, 2))(*map(jnp.asarray, (x, gate_up, down)))
    assert all(np.isfinite(each).all() for each in gradients)
    assert np.abs(gradients[1][:5]).max() > 0
    assert (gradients[1][5] == 0).all()
