import time

import numpy as np
import pytest
from helpers.requests import request

from jaxllm.core import RequestError, Sequence
from jaxllm.engine.decoding.mask import TokenMask, allow_all, check_mask

VOCAB = 77  # not a multiple of 32


def allowed(row, vocab=VOCAB):
    """The set of allowed tokens, read bit by bit as the contract words it."""
    return {t for t in range(row.size * 32) if row[t // 32] >> np.uint32(t % 32) & np.uint32(1)}


def mask_after(output, vocab=VOCAB, **asked):
    made = request(prompt=(1, 2), **asked)
    check_mask(made, vocab)
    sequence = Sequence(made)
    sequence.tokens += output
    return TokenMask(sequence, vocab).bits()


def test_a_request_that_bans_nothing_has_no_mask():
    assert mask_after([3], eos=(0,)) is None


def test_every_token_and_no_bit_beyond_the_vocabulary_is_set():
    assert allowed(allow_all(VOCAB)) == set(range(VOCAB))
    assert allow_all(64).tolist() == [0xFFFFFFFF, 0xFFFFFFFF]


def test_only_allowed_tokens_are_set():
    row = mask_after([], allowed_token_ids=[0, 31, 32, 33, 76])
    assert row.dtype == np.uint32
    assert row.shape == (3,)
    assert allowed(row) == {0, 31, 32, 33, 76}


def test_a_bad_word_of_one_token_is_always_banned():
    assert allowed(mask_after([], bad_words=[(5,), (6,)])) == set(range(VOCAB)) - {5, 6}
    assert allowed(mask_after([5, 9], bad_words=[(5,), (6,)])) == set(range(VOCAB)) - {5, 6}


def test_the_last_token_of_a_longer_bad_word_is_banned_only_after_the_others():
    words = [(10, 11, 12), (11, 40), (50, 51)]
    assert mask_after([10], bad_words=words) is None
    assert allowed(mask_after([10, 11], bad_words=words)) == set(range(VOCAB)) - {12, 40}
    assert allowed(mask_after([9, 11], bad_words=words)) == set(range(VOCAB)) - {40}
    assert mask_after([10, 11, 13], bad_words=words) is None


def test_a_bad_word_that_begins_in_the_prompt_is_not_banned():
    assert mask_after([], bad_words=[(2, 3)]) is None
    assert mask_after([7], bad_words=[(2, 7, 3)]) is None


def test_two_words_that_end_in_one_machine_word_are_both_banned():
    assert allowed(mask_after([4], bad_words=[(4, 33), (4, 34), (4, 33)])) == set(range(VOCAB)) - {33, 34}


def test_ending_tokens_are_banned_until_min_tokens_are_there():
    asked = {"min_tokens": 2, "eos": (7,), "stop_token_ids": [8, 64]}
    assert allowed(mask_after([], **asked)) == set(range(VOCAB)) - {7, 8, 64}
    assert allowed(mask_after([1], **asked)) == set(range(VOCAB)) - {7, 8, 64}
    assert mask_after([1, 1], **asked) is None


def test_all_rules_apply_together():
    row = mask_after([4], allowed_token_ids=[4, 5, 6, 7, 8], bad_words=[(4, 5), (6,)], min_tokens=2, eos=(7,))
    assert allowed(row) == {4, 8}


def test_what_did_not_change_is_the_same_read_only_array():
    sequence = Sequence(request(allowed_token_ids=[1, 2], bad_words=[(1, 2)]))
    mask = TokenMask(sequence, VOCAB)
    first = mask.bits()
    sequence.tokens += [1]
    assert allowed(mask.bits()) == {1}
    sequence.tokens += [2]
    assert mask.bits() is first
    assert allowed(first) == {1, 2}
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0


def test_a_mask_made_after_preemption_goes_on_where_the_old_one_was():
    sequence = Sequence(request(prompt=(1,), bad_words=[(4, 5, 6)], min_tokens=3, eos=(0,)))
    old = TokenMask(sequence, VOCAB)
    for token in (4, 5, 4, 5):
        sequence.tokens.append(token)
        assert np.array_equal(old.bits(), TokenMask(sequence, VOCAB).bits())


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("allowed_token_ids", {"allowed_token_ids": [1, VOCAB]}),
        ("stop_token_ids", {"stop_token_ids": [VOCAB]}),
        ("bad_words", {"bad_words": [(1, VOCAB)]}),
        ("bad_words", {"bad_words": [()]}),
        ("bad_words", {"allowed_token_ids": [1, 2], "bad_words": [(1,), (2,)]}),
        ("min_tokens", {"allowed_token_ids": [1], "min_tokens": 1, "stop_token_ids": [1]}),
    ],
)
def test_a_request_that_names_strangers_or_allows_nothing_is_refused_by_name(field, asked):
    with pytest.raises(RequestError) as caught:
        check_mask(request(**asked), VOCAB)
    assert caught.value.field == field


def test_a_dead_end_reached_later_is_a_row_of_zeros():
    assert not mask_after([1], allowed_token_ids=[1], bad_words=[(1, 1)]).any()


def test_a_row_for_a_large_vocabulary_costs_no_loop_over_it():
    sequence = Sequence(request(bad_words=[(4, 5)], min_tokens=10**6, max_tokens=None, eos=(0,)))
    sequence.tokens += [4]
    mask = TokenMask(sequence, 152_000)
    best = min(_timed(mask.bits) for _ in range(20))
    assert best < 1e-3  # a Python loop over 152,000 tokens takes ten times as long


def _timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
