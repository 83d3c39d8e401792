import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import kernel_oracles as oracles
from helpers.kernel_backends import jitted, pairs

from pallas_kernels.sampling import cuda, reference
from pallas_kernels.sampling.api import adjusted, draw, greedy, sample
from pallas_kernels.sampling.specs import ADJUST_SPECS, SAMPLING_SPECS, AdjustSpec, SamplingSpec

QUICK = tuple(spec for spec in SAMPLING_SPECS if spec.name == "ties")
LONG = tuple(spec for spec in SAMPLING_SPECS if spec not in QUICK)


@pytest.mark.parametrize(("name", "spec"), pairs("sampling", QUICK))
def test_tokens_equal_those_of_a_sorting_float64_oracle_with_the_same_noise(name, spec):
    compare(name, spec)


@pytest.mark.parametrize(("name", "spec"), [p for p in pairs("sampling", LONG) if p.values[0] != "triton_interpret"])
def test_tokens_of_other_vocabularies_equal_the_oracles(name, spec):
    compare(name, spec)


@pytest.mark.kernels
@pytest.mark.parametrize(("name", "spec"), [p for p in pairs("sampling", LONG) if p.values[0] == "triton_interpret"])
def test_tokens_of_the_interpreted_kernel_equal_the_oracles(name, spec):
    compare(name, spec)


def compare(name, spec):
    inputs = spec.inputs()
    tokens = np.asarray(jitted(sample, name)(*inputs))
    expected, certain = oracles.sample(*inputs)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens[certain], expected[certain])
    assert certain.mean() > 0.8  # the comparison is one
    assert np.isfinite(inputs[0][np.arange(spec.B), tokens]).all()


@pytest.mark.kernels
def test_a_row_of_the_interpreted_kernel_draws_alone_what_it_draws_in_a_batch_and_from_all_tokens_what_xla_draws():
    logits, keys, temperature, top_k, top_p, min_p = SamplingSpec("rows", B=6, V=5000).inputs()
    kernel = functools.partial(sample, implementation="triton_interpret")
    rows = logits, keys, temperature, top_k, top_p, min_p
    whole = np.asarray(jax.jit(kernel)(*rows))
    for b in (2, 5):
        np.testing.assert_array_equal(np.asarray(jax.jit(kernel)(*(array[b : b + 1] for array in rows))), whole[b])
    neutral = temperature, np.zeros_like(top_k), np.ones_like(top_p), np.zeros_like(min_p)
    for truncates in (False, True):
        drawn = (
            np.asarray(sample(logits, keys, *neutral, truncates=truncates, implementation=name))
            for name in ("triton_interpret", "reference")
        )
        np.testing.assert_array_equal(*drawn)


@pytest.mark.kernels
def test_rows_that_keep_more_than_the_candidates_find_their_thresholds_in_passes_over_the_row():
    inputs = FLAT.inputs()
    expected, certain = oracles.sample(*inputs)
    tokens = np.asarray(jax.jit(functools.partial(sample, implementation="triton_interpret"))(*inputs))
    np.testing.assert_array_equal(tokens[certain], expected[certain])
    assert certain.sum() >= 2


def unasked(B, V):
    """counts, row, mask, bias_ids, bias, repetition, frequency, presence of rows that ask for no change."""
    entries, zero = (B, 2), np.zeros(B, np.float32)
    masks = np.full((B, -(-V // 32)), 2**32 - 1, np.uint32)
    biases = np.full(entries, V, np.int32), np.zeros(entries, np.float32)
    return np.zeros((B, V), np.uint16), np.arange(B, dtype=np.int32), masks, *biases, zero + 1, zero, zero


def kernels_of_draw(specs):
    """Without the reference, which is that of two ops tested above."""
    return [pair for pair in pairs("sampling.draw", specs) if pair.values[0] != "reference"]


def masking(logits):
    """The same rows, but with a mask where logits are -inf."""
    B, V = logits.shape
    allowed = np.zeros((B, -(-V // 32) * 32), bool)
    allowed[:, :V] = np.isfinite(logits)
    counts, row, _, *others = unasked(B, V)
    words = np.packbits(allowed, axis=1, bitorder="little").view("<u4")
    return np.where(np.isfinite(logits), logits, np.float32(50)), counts, row, words, *others


EVEN = SamplingSpec(  # more ties with the best than there are candidates
    "even", B=5, V=5000, spread=0.0, parameters=((1.0, 1, 1.0, 0.0), (1.0, 0, 1e-9, 0.0), (0.5, 7, 0.5, 1.0))
)
FLAT = SamplingSpec(
    "flat", B=3, V=9000, spread=0.2, parameters=((1.0, 5000, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 6000, 0.8, 0.0))
)
BROAD = SamplingSpec(  # about as many candidates as fit
    "broad", B=6, V=30001, spread=1.0, parameters=((1.0, 2048, 1.0, 0.0), (1.0, 2040, 0.9, 0.0), (0.5, 0, 0.8, 0.001))
)


@pytest.mark.parametrize(("name", "spec"), kernels_of_draw((*SAMPLING_SPECS, EVEN, FLAT, BROAD)))
def test_a_draw_takes_the_oracles_token_where_masks_hide_the_others(name, spec):
    logits, *drawn = spec.inputs()
    tokens, bad = (np.asarray(each) for each in jitted(draw, name)(*masking(logits), *drawn))
    expected, certain = oracles.sample(logits, *drawn)
    np.testing.assert_array_equal(tokens[certain], expected[certain])
    assert certain.mean() > 0.7
    assert not bad.any()


def together(spec, seed):
    """Everything that rows may ask for at once: adjustments of `spec`, parameters of a SamplingSpec."""
    _, *drawn = SamplingSpec(spec.name, B=spec.B, V=spec.V).inputs(seed)
    return spec.inputs(seed), drawn


@pytest.mark.parametrize(
    ("name", "spec"), [*kernels_of_draw(ADJUST_SPECS), *pairs("sampling.draw", ADJUST_SPECS[2:3])[-1:]]
)
def test_a_draw_is_from_logits_as_masks_biases_and_penalties_leave_them(name, spec):
    for seed in range(2):
        asked, drawn = together(spec, seed)
        new = adjusted_by_hand(spec, *asked)
        good = np.isfinite(new.max(axis=1))
        tokens, bad = (np.asarray(each) for each in jitted(draw, name)(*asked, *drawn))
        np.testing.assert_array_equal(bad, ~good)
        expected, certain = oracles.sample(new[good], *(each[good] for each in drawn))
        np.testing.assert_array_equal(tokens[good][certain], expected[certain])
        assert certain.mean() > 0.7


@pytest.mark.parametrize(("name", "spec"), pairs("sampling.draw", ADJUST_SPECS[1:2]))
def test_a_drawn_row_is_bad_alone_where_a_logit_is_not_finite_or_no_token_allowed(name, spec):
    asked, drawn = together(spec, 0)
    run = jitted(draw, name)
    clean = np.asarray(run(*asked, *drawn)[0])
    asked[0][1, 3], asked[0][2, -1], asked[0][5, 9] = np.nan, np.inf, -np.inf
    asked[3][6] = 0
    asked[4][6] = spec.V
    tokens, bad = (np.asarray(each) for each in run(*asked, *drawn))
    assert np.flatnonzero(bad).tolist() == [1, 2, 5, 6]
    np.testing.assert_array_equal(tokens[~bad], clean[~bad])
    assert ((tokens >= 0) & (tokens < spec.V)).all()


@pytest.mark.parametrize(("name", "spec"), kernels_of_draw((SAMPLING_SPECS[2], FLAT)))
def test_a_drawn_token_does_not_depend_on_the_batch(name, spec):
    logits, *drawn = spec.inputs()
    run = jitted(draw, name)
    whole = np.asarray(run(logits, *unasked(*logits.shape), *drawn)[0])
    for rows in ([0], [2, 1], list(range(spec.B))[::-1]):
        alone = logits[rows]
        tokens = run(alone, *unasked(*alone.shape), *(each[rows] for each in drawn))[0]
        np.testing.assert_array_equal(np.asarray(tokens), whole[rows])


def test_a_vocabulary_longer_than_a_cluster_holds_is_declined():
    with pytest.raises(NotImplementedError, match="at most 393216"):
        cuda.refuse(jax.ShapeDtypeStruct((1, 400_000), jnp.float32))


DRAWS = [
    SamplingSpec("top_k", B=2000, V=40, spread=1.0, parameters=((1.5, 5, 1.0, 0.0),)),
    SamplingSpec("top_p", B=2000, V=40, spread=1.0, parameters=((1.5, 0, 0.7, 0.0),)),
    SamplingSpec("min_p", B=2000, V=40, spread=1.0, parameters=((1.5, 0, 1.0, 0.2),)),
    SamplingSpec("all", B=2000, V=40, spread=1.0, parameters=((1.5, 20, 0.8, 0.1),)),
    SamplingSpec("ties", B=2000, V=40, spread=1.0, parameters=((1.5, 7, 0.8, 0.0),), levels=2),
]


@pytest.mark.parametrize(("name", "spec"), pairs("sampling", DRAWS))
def test_many_draws_of_one_row_reach_every_kept_token_and_no_other(name, spec):
    logits, keys, *parameters = spec.inputs(seed=3)
    logits[:] = logits[0]
    keep = oracles.kept(logits[0], *spec.parameters[0])
    assert 1 < keep.sum() < spec.V
    tokens = np.asarray(jitted(sample, name)(logits, keys, *parameters))
    assert set(tokens) == set(np.flatnonzero(keep))


@pytest.mark.parametrize(("name", "spec"), pairs("sampling", SAMPLING_SPECS[2:3]))
def test_a_rows_token_does_not_depend_on_its_batch(name, spec):
    inputs = spec.inputs()
    run = jitted(sample, name)
    whole = np.asarray(run(*inputs))
    for rows in ([0], [9], [7, 7, 3], list(range(0, 36, 2)), list(range(36))[::-1]):
        np.testing.assert_array_equal(np.asarray(run(*(array[rows] for array in inputs))), whole[rows])


def adjusted_by_hand(spec, logits, counts, row, words, ids, bias, repetition, frequency, presence):
    """In numpy's f32, one operation after the other."""
    allowed = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : spec.V].astype(bool)
    out = np.where(allowed, logits, np.float32(-np.inf))
    for b in range(spec.B):
        used = ids[b] < spec.V
        out[b, ids[b][used]] += bias[b][used]
        count = counts[row[b]]
        seen, times = count > 0, (count & 0x7FFF).astype(np.float32)
        repeated = np.where(out[b] > 0, out[b] / repetition[b], out[b] * repetition[b])
        out[b] = np.where(seen, repeated, out[b])
        out[b] = out[b] - frequency[b] * times - presence[b] * (times > 0).astype(np.float32)
    return out


@pytest.mark.parametrize(("name", "spec"), pairs("sampling.adjusted", ADJUST_SPECS[1:3]))
def test_masks_biases_and_penalties_are_applied_in_order_and_the_largest_found(name, spec):
    inputs = spec.inputs()
    expected = adjusted_by_hand(spec, *inputs)
    inputs[0][0, 0] = np.nan
    inputs[0][1, spec.V - 1] = np.inf
    out, best, bad = (np.asarray(each) for each in jitted(adjusted, name)(*inputs))
    np.testing.assert_array_equal(bad, np.arange(spec.B) < 2)
    np.testing.assert_allclose(out[2:], expected[2:], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(best[2:], out[2:].max(axis=1))


@pytest.mark.parametrize(("name", "spec"), pairs("sampling.greedy", SAMPLING_SPECS[4:8]))
def test_greedy_takes_the_first_of_the_largest_and_flags_rows_that_are_not_finite(name, spec):
    logits = np.where(np.isinf(spec.inputs()[0]), np.float32(-1e30), spec.inputs()[0])
    odd = logits.copy()
    odd[0, -1], odd[-1, 0] = np.nan, -np.inf
    token, bad = (np.asarray(each) for each in jitted(greedy, name)(odd))
    np.testing.assert_array_equal(bad, ~np.isfinite(odd).all(axis=1))
    np.testing.assert_array_equal(token[~bad], logits.argmax(axis=1)[~bad])
    assert token.dtype == np.int32


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (1, jnp.zeros((3, 40), jnp.uint32), r"counts must be u16\[S1, V = 40\]"),
        (3, jnp.zeros((2, 1), jnp.uint32), r"mask must be u32\[2, 2\] for V = 40"),
        (5, jnp.zeros((2, 4)), "bias_ids and bias must be"),
        (7, jnp.zeros(3), r"frequency must be float32\[2\]"),
    ],
)
def test_wrong_requests_raise_an_error_that_names_the_shapes(position, wrong, message):
    arguments = list(map(jnp.asarray, AdjustSpec("two", B=2, V=40).inputs()))
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        adjusted(*arguments)


def test_the_references_bits_are_those_of_jax_random_and_of_the_published_algorithm():
    keys = np.random.default_rng(0).integers(0, 2**32, (4, 2), dtype=np.uint32)
    keys[0] = 0
    counter = jnp.broadcast_to(jnp.arange(300, dtype=jnp.uint32), (4, 300))
    even, odd = map(np.asarray, reference.threefry(keys[:, :1], keys[:, 1:], counter))
    for b, key in enumerate(keys):
        np.testing.assert_array_equal(
            np.stack((even[b], odd[b]), axis=1).ravel()[:599], oracles.threefry_bits(key, 599)
        )
        with jax.threefry_partitionable(True):
            np.testing.assert_array_equal(even[b] ^ odd[b], jax.random.bits(jax.random.wrap_key_data(key), (300,)))


def test_gumbel_noise_has_the_gumbel_distribution():
    noise = np.sort(np.asarray(reference.gumbel(jnp.array([[3, 5]], jnp.uint32), 200_000))[0].astype(np.float64))
    distance = np.abs(np.exp(-np.exp(-noise)) - (np.arange(len(noise)) + 0.5) / len(noise)).max()
    assert distance < 1.95 / np.sqrt(len(noise))  # Kolmogorov-Smirnov, p = 0.001


def test_ordered_bits_compare_as_the_floats_do():
    values = np.array(
        [-np.inf, -3e38, -1.5, -1e-37, -0.0, 0.0, 1e-37, 1.0, np.nextafter(np.float32(1), 2), 3e38, np.inf]
    )
    bits = np.asarray(reference.ordered_bits(jnp.asarray(values, jnp.float32))).astype(np.int64)
    steps = np.diff(bits)
    assert (steps[np.diff(values.astype(np.float32)) > 0] > 0).all()
    assert bits[4] == bits[5]
    assert bits[0] > 0


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, jnp.zeros((3, 0)), r"logits must be f32\[B, V\], not empty, got float32\[3, 0\]"),
        (0, jnp.zeros((3, 9), jnp.bfloat16), r"logits must be f32\[B, V\].*got bfloat16\[3, 9\]"),
        (1, jnp.zeros((3, 2), jnp.int32), r"keys must be u32\[B, 2\] = u32\[3, 2\], got int32\[3, 2\]"),
        (2, jnp.zeros(4), r"temperature must be float32\[B\] = float32\[3\], got float32\[4\]"),
        (3, jnp.zeros(3), r"top_k must be int32\[B\] = int32\[3\], got float32\[3\]"),
        (5, jnp.zeros((3, 1)), r"min_p must be float32\[B\] = float32\[3\], got float32\[3, 1\]"),
    ],
)
def test_wrong_arguments_raise_an_error_that_names_the_shapes(position, wrong, message):
    arguments = [jnp.zeros((3, 9)), jnp.zeros((3, 2), jnp.uint32), jnp.zeros(3), jnp.zeros(3, jnp.int32)]
    arguments += [jnp.zeros(3), jnp.zeros(3)]
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        sample(*arguments)
