import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import kernel_oracles as oracles
from scipy import stats

from jaxllm.graph.sampling import (
    IN_PROMPT,
    MOST,
    SampleInputs,
    position_keys,
    sample,
    set_counts,
    token_logprobs,
)
from pallas_kernels.sampling.api import greedy
from pallas_kernels.sampling.reference import gumbel

DRAWS = 100_000
WORD = 32


def inputs_for(B, V, **changes):
    """Neutral inputs with numpy leaves; each change is a value for all rows or an array of B."""
    neutral = {
        "row": np.arange(B, dtype=np.int32),
        "keys": np.array([[b, 7] for b in range(B)], np.uint32),
        "position": np.zeros(B, np.int32),
        "temperature": np.ones(B, np.float32),
        "top_p": np.ones(B, np.float32),
        "min_p": np.zeros(B, np.float32),
        "presence": np.zeros(B, np.float32),
        "frequency": np.zeros(B, np.float32),
        "repetition": np.ones(B, np.float32),
        "top_k": np.zeros(B, np.int32),
        "bias_ids": np.full((B, 4), V, np.int32),
        "bias": np.zeros((B, 4), np.float32),
        "mask": np.full((B, -(-V // WORD)), 2**WORD - 1, np.uint32),
    }
    for name, value in changes.items():
        neutral[name] = np.broadcast_to(np.asarray(value, neutral[name].dtype), neutral[name].shape)
    return SampleInputs(**neutral)


def pack(allowed):
    """bool[B, V] -> u32[B, ceil(V / 32)]"""
    B, V = allowed.shape
    bits = np.zeros((B, -(-V // WORD) * WORD), bool)
    bits[:, :V] = allowed
    return np.packbits(bits, axis=1, bitorder="little").view("<u4")


def adjusted(logits, inputs, counts, row):
    """One row's logits after mask, bias and penalties, in float64."""
    x = logits.astype(np.float64).copy()
    for v in range(len(x)):
        if not inputs.mask[row, v // WORD] >> np.uint32(v % WORD) & np.uint32(1):
            x[v] = -np.inf
    for token, bias in zip(inputs.bias_ids[row], inputs.bias[row], strict=True):
        if token < len(x):
            x[token] += bias
    for v in range(len(x)):
        count = int(counts[inputs.row[row], v])
        if count:
            x[v] = x[v] / inputs.repetition[row] if x[v] > 0 else x[v] * np.float64(inputs.repetition[row])
        x[v] -= inputs.frequency[row] * (count & MOST) + inputs.presence[row] * bool(count & MOST)
    return x


def log_softmax(x):
    x = x.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


jit_sample = jax.jit(sample, static_argnames=("num_logprobs", "implementation"))

VOCAB = 20
LOGITS = np.random.default_rng(1).standard_normal(VOCAB).astype(np.float32) * np.float32(1.5)
COUNTS = np.zeros((1, VOCAB), np.uint16)
COUNTS[0, :8] = [1, 2, 3, IN_PROMPT, IN_PROMPT | 1, 0, IN_PROMPT | 5, 1]
ALLOWED = np.random.default_rng(2).random((1, VOCAB)) < 0.6
CASES = {
    "plain temperature": {"temperature": 0.8},
    "hot": {"temperature": 1.9},
    "top-k": {"top_k": 6, "temperature": 1.3},
    "top-p": {"top_p": 0.75, "temperature": 1.3},
    "min-p": {"min_p": 0.1, "temperature": 1.3},
    "top-k, top-p and min-p": {"top_k": 12, "top_p": 0.85, "min_p": 0.02, "temperature": 1.5},
    "penalties": {"repetition": 1.3, "frequency": 0.2, "presence": 0.5},
    "negative penalties": {"repetition": 0.8, "frequency": -0.2, "presence": -0.5},
    "bias": {"bias_ids": [[3, VOCAB, 5, 19]], "bias": [[2.0, 50.0, -3.0, 1.0]]},
    "mask": {"mask": pack(ALLOWED)},
    "everything": {
        "mask": pack(ALLOWED), "bias_ids": [[3, VOCAB, 5, 19]], "bias": [[2.0, 50.0, -3.0, 1.0]],
        "repetition": 1.3, "frequency": 0.2, "presence": 0.5, "top_k": 9, "top_p": 0.95, "min_p": 0.01,
        "temperature": 1.2,
    },
}  # fmt: skip


def expected_probabilities(inputs):
    x = adjusted(LOGITS, inputs, COUNTS, 0)
    parameters = (inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p)
    keep = oracles.kept(x.astype(np.float32), *(column[0] for column in parameters))
    weights = np.where(keep, np.exp((x - x.max()) / inputs.temperature[0]), 0.0)
    return weights / weights.sum()


def observed(inputs_of_draws):
    logits = np.broadcast_to(LOGITS, (DRAWS, VOCAB))
    result = jit_sample(logits, inputs_of_draws, COUNTS, num_logprobs=0)
    return np.bincount(np.asarray(result.token), minlength=VOCAB)


def p_value(counted, probabilities):
    """Chi-square; an impossible token that was drawn is a failure by itself. Cells hold at least 5 expected draws."""
    if counted[probabilities == 0].any():
        return 0.0
    expected = probabilities * counted.sum()
    rare = expected < 5
    cells = [*zip(counted[~rare], expected[~rare], strict=True), (counted[rare].sum(), expected[rare].sum())]
    cells = [cell for cell in cells if cell[1] > 0]
    return stats.chisquare(*np.array(cells).T, sum_check=False).pvalue


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_a_hundred_thousand_draws_follow_the_exact_distribution(changes):
    draws = inputs_for(DRAWS, VOCAB, row=0, keys=[[11, 13]], position=np.arange(DRAWS), **changes)
    probabilities = expected_probabilities(inputs_for(1, VOCAB, **changes))
    assert p_value(observed(draws), probabilities) > 0.001


def test_draws_over_keys_follow_the_exact_distribution_too():
    keys = np.random.default_rng(5).integers(0, 2**32, (DRAWS, 2), dtype=np.uint32)
    draws = inputs_for(DRAWS, VOCAB, row=0, keys=keys, position=17)
    assert p_value(observed(draws), expected_probabilities(inputs_for(1, VOCAB))) > 0.001


@pytest.mark.parametrize(
    "wrong", [{"temperature": 1.05}, {"top_k": 19}, {"min_p": 0.1}, {"frequency": 0.02}, {"repetition": 1.05}]
)
def test_the_chi_square_has_teeth(wrong):
    draws = inputs_for(DRAWS, VOCAB, row=0, keys=[[11, 13]], position=np.arange(DRAWS))
    assert p_value(observed(draws), expected_probabilities(inputs_for(1, VOCAB, **wrong))) < 0.001


def random_inputs(rng, B, V, S):
    """Random mixes: each feature on for about half of the rows."""

    def maybe(values, neutral):
        return np.where(rng.random(B) < 0.5, values, neutral)

    allowed = rng.random((B, V)) < 0.7
    allowed[rng.random(B) < 0.5] = True
    allowed[:, 0] = True
    bias_ids = np.stack([rng.permutation(V + 4)[:4] for _ in range(B)])
    return inputs_for(
        B,
        V,
        row=rng.permutation(S)[:B],
        keys=rng.integers(0, 2**32, (B, 2)),
        position=rng.integers(0, 2**20, B),
        temperature=maybe(rng.choice([0.0, 0.3, 1.0, 1.7], B), 1.0),
        top_p=maybe(rng.random(B), 1.0),
        min_p=maybe(rng.random(B) * 0.3, 0.0),
        presence=maybe(rng.uniform(-2, 2, B), 0.0),
        frequency=maybe(rng.uniform(-2, 2, B), 0.0),
        repetition=maybe(rng.uniform(0.5, 2, B), 1.0),
        top_k=maybe(rng.integers(1, V, B), rng.choice([0, -1, 2**31 - 1], B)),
        bias_ids=np.minimum(bias_ids, V),
        bias=rng.uniform(-5, 5, (B, 4)),
        mask=pack(allowed),
    )


def random_counts(rng, S, V):
    counts = rng.poisson(0.3, (S + 1, V)) | np.where(rng.random((S + 1, V)) < 0.2, IN_PROMPT, 0)
    counts[:, 1] = counts[:, 1] & IN_PROMPT | rng.choice([MOST - 1, MOST], S + 1)  # about to saturate
    return counts.astype(np.uint16)


@pytest.mark.parametrize("seed", range(25))
def test_the_whole_pipeline_equals_an_independent_numpy_implementation(seed):
    rng = np.random.default_rng(seed)
    B, V, S, n = 8, 97, 11, 20
    logits = (rng.standard_normal((B, V)) * 2).astype(np.float32)
    inputs, counts = random_inputs(rng, B, V, S), random_counts(rng, S, V)
    got = jax.tree.map(np.asarray, jit_sample(logits, inputs, counts, num_logprobs=n))

    processed = np.stack([adjusted(logits[b], inputs, counts, b) for b in range(B)]).astype(np.float32)
    keys = [oracles.threefry(key, 0, data) for key, data in zip(inputs.keys, inputs.position, strict=True)]
    tokens, certain = oracles.sample(
        processed, np.array(keys), inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p
    )
    np.testing.assert_array_equal(got.token[certain], tokens[certain])
    assert certain.sum() >= B - 2
    after = counts.copy()
    for b in range(B):
        every = log_softmax(logits[b])
        np.testing.assert_allclose(got.logprob[b], every[got.token[b]], atol=2e-6)
        assert got.rank[b] == 1 + (logits[b] > logits[b, got.token[b]]).sum()
        best = np.argsort(-logits[b], kind="stable")[:n]
        np.testing.assert_array_equal(got.top_ids[b], best)
        np.testing.assert_allclose(got.top_logprobs[b], every[best], atol=2e-6)
        if after[inputs.row[b], got.token[b]] & MOST < MOST:
            after[inputs.row[b], got.token[b]] += 1
    np.testing.assert_array_equal(got.counts, after)
    assert not got.bad.any()


def test_a_requests_token_depends_on_its_key_and_position_and_not_on_slot_batch_or_neighbours():
    rng = np.random.default_rng(0)
    V, S = 97, 12
    logits, mine = rng.standard_normal((12, V)).astype(np.float32), {"keys": [[123, 456]], "temperature": 1.5}
    counts = np.zeros((S + 1, V), np.uint16)
    for position in range(8):
        alone = jit_sample(logits[:1], inputs_for(1, V, position=position, **mine), counts, num_logprobs=0)
        for slot in (0, 5, 11):
            company = random_inputs(rng, 12, V, S)
            placed = jax.tree.map(np.copy, company)
            one = inputs_for(1, V, row=company.row[slot], position=position, **mine)
            for field in dataclasses.fields(SampleInputs):
                getattr(placed, field.name)[slot] = getattr(one, field.name)[0]
            together = logits.copy()
            together[slot] = logits[0]
            result = jit_sample(together, placed, counts, num_logprobs=0)
            assert result.token[slot] == alone.token[0]
            assert result.logprob[slot] == pytest.approx(float(alone.logprob[0]), abs=1e-6)


def test_other_positions_and_keys_draw_other_tokens():
    V = 1000
    positions = inputs_for(64, V, row=0, keys=[[1, 2]], position=np.arange(64))
    keys = inputs_for(64, V, row=0, keys=np.arange(128).reshape(64, 2), position=3)
    for inputs in (positions, keys):
        result = jit_sample(np.zeros((64, V), np.float32), inputs, np.zeros((1, V), np.uint16), num_logprobs=0)
        assert len(set(np.asarray(result.token).tolist())) > 50


def test_a_requests_noise_at_one_position_is_unrelated_to_its_noise_at_the_next():
    keys = position_keys(jnp.array([[1, 2]] * 2, jnp.uint32), jnp.array([5, 6], jnp.int32))
    one, other = np.asarray(gumbel(keys, 50_000))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.02


def test_greedy_takes_the_lowest_index_among_ties_and_flags_what_is_not_finite():
    logits = np.array([[1, 3, 3, 0], [5, -2, 5, 5], [0, np.nan, 9, 1], [0, 1, -np.inf, 2]], np.float32)
    token, bad = jax.jit(greedy)(logits)
    assert token[:2].tolist() == [1, 0]
    assert bad.tolist() == [False, False, True, True]
    assert ((token >= 0) & (token < 4)).all()


def test_temperature_zero_is_greedy_after_mask_bias_and_penalties():
    logits = np.array([[5.0, 4.0, 4.0, 1.0]] * 4, np.float32)
    counts = np.zeros((5, 4), np.uint16)
    counts[3, 0] = 2
    inputs = inputs_for(
        4,
        4,
        temperature=0.0,
        top_k=3,
        mask=pack(np.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], bool)),
        bias_ids=[[4, 4, 4, 4], [4, 4, 4, 4], [3, 4, 4, 4], [4, 4, 4, 4]],
        bias=[[9, 9, 9, 9], [9, 9, 9, 9], [7, 9, 9, 9], [9, 9, 9, 9]],
        presence=[0, 0, 0, 1.5],
    )
    result = jit_sample(logits, inputs, counts, num_logprobs=0)
    assert result.token.tolist() == [0, 1, 3, 1]
    assert result.rank.tolist() == [1, 2, 4, 2]


def test_a_row_that_is_not_finite_is_flagged_and_its_neighbours_are_unharmed():
    rng = np.random.default_rng(4)
    V, S = 97, 11
    logits, inputs, counts = (
        rng.standard_normal((8, V)).astype(np.float32),
        random_inputs(rng, 8, V, S),
        random_counts(rng, S, V),
    )
    clean = jax.tree.map(np.asarray, jit_sample(logits, inputs, counts, num_logprobs=20))
    for value in (np.nan, np.inf, -np.inf):
        broken = logits.copy()
        broken[3, 50] = value
        got = jax.tree.map(np.asarray, jit_sample(broken, inputs, counts, num_logprobs=20))
        assert got.bad.tolist() == [False] * 3 + [True] + [False] * 4
        others = np.arange(8) != 3
        for field in ("token", "logprob", "rank", "top_ids", "top_logprobs"):
            np.testing.assert_array_equal(getattr(got, field)[others], getattr(clean, field)[others])
        rows = np.arange(S + 1) != inputs.row[3]
        np.testing.assert_array_equal(got.counts[rows], clean.counts[rows])
        np.testing.assert_array_equal(got.counts[inputs.row[3]], counts[inputs.row[3]])
        assert 0 <= got.token[3] < V


def test_a_row_with_no_allowed_token_is_flagged():
    allowed = np.ones((3, 40), bool)
    allowed[1] = False
    result = jit_sample(
        np.zeros((3, 40), np.float32),
        inputs_for(3, 40, mask=pack(allowed)),
        np.zeros((4, 40), np.uint16),
        num_logprobs=0,
    )
    assert result.bad.tolist() == [False, True, False]


def test_counts_set_in_chunks_equal_a_numpy_count():
    rng = np.random.default_rng(6)
    V, S, C = 300, 3, 32
    counts = jnp.asarray(random_counts(rng, S, V))
    before = np.asarray(counts)
    update = jax.jit(set_counts, donate_argnums=0)
    prompt, output = rng.integers(0, V, 100).astype(np.int32), rng.integers(0, V // 4, 77).astype(np.int32)
    fresh = True
    for tokens, in_prompt in ((prompt, True), (output, False)):
        for first in range(0, len(tokens), C):
            chunk = tokens[first : first + C]
            padded = np.full(C, rng.integers(0, V), np.int32)  # what follows n must not count
            padded[: len(chunk)] = chunk
            counts = update(counts, jnp.int32(2), padded, jnp.int32(len(chunk)), jnp.bool_(in_prompt), jnp.bool_(fresh))
            fresh = False
    expected = np.bincount(output, minlength=V) | np.where(np.bincount(prompt, minlength=V) > 0, IN_PROMPT, 0)
    np.testing.assert_array_equal(np.asarray(counts)[2], expected)
    np.testing.assert_array_equal(np.asarray(counts)[[0, 1, 3]], before[[0, 1, 3]])


def test_counts_saturate_and_leave_the_prompt_bit_alone():
    counts = jnp.zeros((2, 4), jnp.uint16).at[0].set(jnp.array([MOST - 1, IN_PROMPT | MOST, 0, 0], jnp.uint16))
    ids = jnp.array([0, 0, 0, 1, 2], jnp.int32)
    counts = jax.jit(set_counts)(counts, jnp.int32(0), ids, jnp.int32(5), jnp.bool_(False))
    assert counts[0].tolist() == [MOST, IN_PROMPT | MOST, 1, 0]
    inputs = inputs_for(1, 4, temperature=0.0)
    counts = jit_sample(jnp.array([[0.0, 9, 0, 0]]), inputs, counts, num_logprobs=0).counts
    assert counts[0].tolist() == [MOST, IN_PROMPT | MOST, 1, 0]


def test_parameters_are_data_and_never_compile_again():
    rng = np.random.default_rng(7)
    traces = []

    def counted(logits, inputs, counts):
        traces.append(1)
        return sample(logits, inputs, counts, num_logprobs=0)

    run = jax.jit(counted)
    for _ in range(3):
        run(rng.standard_normal((4, 50)).astype(np.float32), random_inputs(rng, 4, 50, 6), random_counts(rng, 6, 50))
    assert len(traces) == 1


def test_token_logprobs_are_those_of_numpys_log_softmax():
    rng = np.random.default_rng(8)
    logits, token = (rng.standard_normal((5, 300)) * 4).astype(np.float32), rng.integers(0, 300, 5).astype(np.int32)
    logprob, rank, ids, top = (np.asarray(x) for x in token_logprobs(jnp.asarray(logits), jnp.asarray(token), 20))
    for b in range(5):
        every = log_softmax(logits[b])
        best = np.argsort(-every, kind="stable")
        np.testing.assert_allclose(logprob[b], every[token[b]], atol=5e-6)
        assert best[rank[b] - 1] == token[b]
        np.testing.assert_array_equal(ids[b], best[:20])
        np.testing.assert_allclose(top[b], every[best[:20]], atol=5e-6)
