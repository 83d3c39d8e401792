"""Figures: which way is better, what a share of the floor is, and the two tables."""

import pytest

from jaxllm.tools.figures import RATE, Figure, as_json, comparison, from_json, median_figure, table


def test_a_time_is_better_when_smaller_and_a_rate_when_larger():
    assert Figure("step", "", 4.0, "ms").times_better_than(Figure("step", "", 6.0, "ms")) == 1.5
    assert Figure("rate", "", 6.0, RATE).times_better_than(Figure("rate", "", 4.0, RATE)) == 1.5


def test_the_share_of_the_floor_is_one_where_nothing_could_be_faster():
    assert Figure("step", "", 5.0, "ms", floor=4.0).share_of_floor == 0.8
    assert Figure("rate", "", 80.0, RATE, floor=100.0).share_of_floor == 0.8
    assert Figure("step", "", 5.0, "ms").share_of_floor is None


def test_the_median_stands_for_the_repeats_which_are_kept():
    figure = median_figure("step", "batch 1", "ms", [9.0, 1.0, 2.0])
    assert (figure.value, figure.repeats) == (2.0, (9.0, 1.0, 2.0))


def test_a_figure_survives_json():
    figure = median_figure("step", "batch 1", "ms", [3.0, 1.0], floor=1.0, notes={"host, ms": 0.1})
    assert from_json(as_json(figure)) == figure
    assert as_json(figure)["share_of_floor"] == 0.5


def test_the_table_leaves_out_columns_that_nothing_fills():
    bare = table([median_figure("step", "batch 1", "ms", [5.0])])
    assert bare.splitlines() == [
        "|  | at | median | least to most |",
        "| --- | --- | --- | --- |",
        "| step | batch 1 | 5 ms |  |",
    ]
    full = table([median_figure("step", "batch 1", "ms", [4.0, 6.0], floor=4.0, notes={"host, ms": 0.25})])
    assert full.splitlines()[0] == "|  | at | median | least to most | floor | share of floor | host, ms |"
    assert full.splitlines()[2] == "| step | batch 1 | 5 ms | 4 to 6 | 4 | 80% | 0.25 |"


def test_a_comparison_puts_the_first_engine_against_each_other_where_both_have_the_figure():
    ours = [Figure("step", "batch 1", 4.0, "ms", floor=3.0), Figure("rate", "all", 12_000.0, RATE)]
    theirs = [Figure("step", "batch 1", 5.0, "ms"), Figure("rate", "all", 9_600.0, RATE)]
    other = [Figure("step", "batch 1", 6.4, "ms"), Figure("step", "batch 9", 7.0, "ms")]
    lines = comparison({"ours": ours, "vllm": theirs, "hf": other}).splitlines()
    assert lines[0] == ("|  | at | unit | ours | vllm | hf | ahead of vllm | ahead of hf | floor | share of floor |")
    assert lines[2] == "| step | batch 1 | ms | 4 | 5 | 6.4 | 1.25x | 1.60x | 3 | 75% |"
    assert lines[3] == "| rate | all | tok/s | 12,000 | 9,600 |  | 1.25x |  |  |  |"
    assert lines[4] == "| step | batch 9 | ms |  |  | 7 |  |  |  |  |"


@pytest.mark.parametrize("unit", ["ms", RATE])
def test_a_figure_against_itself_is_neither_ahead_nor_behind(unit):
    figure = Figure("step", "", 3.0, unit)
    assert figure.times_better_than(figure) == 1.0
