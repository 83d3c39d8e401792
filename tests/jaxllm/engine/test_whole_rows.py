"""Which decode steps are one op for all layers, and whose."""

import pytest

from jaxllm.config import load
from jaxllm.engine.startup import SHARED_ROWS, WHOLE_ROWS, whole


@pytest.mark.parametrize(
    ("kernels", "mesh", "platform", "found"),
    [
        ("auto", {}, "gpu", (WHOLE_ROWS, None)),
        ("auto", {"tp": 2}, "gpu", (SHARED_ROWS, "wide")),
        ("auto", {"tp": 4}, "gpu", (SHARED_ROWS, "wide")),
        ("auto", {"tp": 8}, "gpu", (None, "wide")),
        ("auto", {"ep": 2}, "gpu", (None, "wide")),
        ("auto", {}, "cpu", (None, None)),
        ("apart", {}, "gpu", (None, None)),
        ("chain", {}, "gpu", (None, None)),
        ("layers", {}, "gpu", (WHOLE_ROWS, None)),
        ("layers", {"tp": 4}, "cpu", (SHARED_ROWS, None)),
        ("launched", {}, "gpu", (WHOLE_ROWS, "launched")),
        ("launched", {"tp": 2}, "gpu", (WHOLE_ROWS, "launched")),
    ],
)
def test_the_op_runs_where_it_was_measured_ahead_or_is_asked_for(kernels, mesh, platform, found):
    assert whole(kernels, load(**mesh).mesh, platform) == found
