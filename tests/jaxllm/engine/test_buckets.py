"""What a step takes of what waits, where steps are padded."""

from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.engine.buckets import Padding, few_tokens

POWERS = Padding((64, 128, 256, 512, 1024, 2048, 4096, 8192))


@pytest.mark.parametrize(
    ("tokens", "decodes", "taken"),
    [
        (1024, 0, 1024),  # nothing to pad
        (1100, 0, 1024),  # and 76 in a step of 128
        (1100, 64, 1024),
        (1900, 0, 2048),  # 1024 and 876 pad as much
        (1400, 256, 2048),  # 1024, then 632 with the decodes: 512 and again 376, which is 512
        (1400, 64, 1024),  # then 440: 512 and nothing else
        (7000, 0, 4096),  # 7,168 in all, an eighth less
        (7200, 0, 8192),  # 7,424
        (300, 0, 512),  # two steps that read the weights are no better than one of twice the tokens
        (1024 + 200, 256, 1024),
        (140, 130, 256),  # 128 is no room for the decodes
    ],
)
def test_the_size_below_is_taken_where_the_rest_costs_less_than_padding(tokens, decodes, taken):
    assert POWERS.best(tokens, decodes) == taken


def test_few_tokens_are_more_where_a_step_has_much_to_read_or_to_launch_and_little_to_multiply():
    assert few_tokens(32, 7.0e9) == 256
    assert few_tokens(28, 0.44e9) > 900  # 0.6B shape
    assert few_tokens(48, 3.0e9, sparsity=10.0) == 2560
    assert few_tokens(32, 7.0e9, devices=8) > 256
    assert POWERS.best(1100, 0) == 1024
    assert Padding(POWERS.sizes, few=2048).best(1100, 0) == 2048


def test_a_full_budget_nothing_but_decodes_and_no_sizes_leave_the_budget_as_it_is():
    assert POWERS.budget(8192, 64, [5000, 5000]) == 8192
    assert POWERS.budget(8192, 64, []) == 8192
    assert Padding().budget(8192, 64, [1036]) == 8192
    assert POWERS.budget(8192, 64, [1036]) == 1024


def test_what_waits_behind_a_full_budget_is_not_looked_at():
    lengths = iter([8000, 300, 7])
    POWERS.budget(8192, 0, lengths)
    assert list(lengths) == [7]


@given(
    sizes=st.sets(st.integers(1, 500), min_size=1, max_size=8).map(lambda found: tuple(sorted(found))),
    few=st.integers(1, 300),
    decodes=st.integers(0, 499),
    more=st.integers(1, 500),
)
def test_steps_end_and_cost_at_most_what_one_padded_step_would(sizes, few, decodes, more):
    tokens = min(decodes + more, sizes[-1])
    decodes = min(decodes, tokens - 1)
    padding, spent, left = Padding(sizes, few), 0, tokens
    whole = max(sizes[bisect_left(sizes, tokens)], few)
    while left > decodes:
        taken = padding.best(left, decodes)
        assert taken in sizes
        assert taken > decodes
        spent += max(taken, few)
        left = decodes + max(0, left - taken) if taken < left else decodes
    assert spent <= whole
