"""Which decode steps are one kernel for all layers."""

import pytest

from jaxllm.config import load
from jaxllm.engine.startup import EVERY_ROWS, WHOLE_ROWS, whole_rows


@pytest.mark.parametrize(
    ("kernels", "mesh", "fastest", "rows"),
    [
        ("auto", {}, True, WHOLE_ROWS),
        ("auto", {"tp": 2}, True, (EVERY_ROWS,)),
        ("auto", {"tp": 4}, True, (EVERY_ROWS,)),
        ("auto", {"tp": 8}, True, ()),
        ("auto", {"ep": 2}, True, ()),
        ("auto", {}, False, ()),
        ("chain", {}, False, ()),
        ("layers", {"tp": 4}, False, (EVERY_ROWS,)),
        ("launched", {}, False, ((1, 256),)),
    ],
)
def test_the_kernel_runs_where_it_was_measured_ahead_or_is_asked_for(kernels, mesh, fastest, rows):
    assert whole_rows(kernels, load(**mesh).mesh, fastest=fastest) == rows
