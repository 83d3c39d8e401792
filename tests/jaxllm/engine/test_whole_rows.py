"""Which decode steps are one op for all layers, or between two attentions, and whose."""

import pytest

from jaxllm.config import load
from jaxllm.engine.startup import CHAINED_ROWS, SHARED_ROWS, WHOLE_ROWS, fused


@pytest.mark.parametrize(
    ("kernels", "mesh", "platform", "found"),
    [
        ("auto", {}, "gpu", (CHAINED_ROWS, WHOLE_ROWS, None)),
        ("auto", {"tp": 2}, "gpu", (CHAINED_ROWS, SHARED_ROWS, "wide")),
        ("auto", {"tp": 4}, "gpu", (CHAINED_ROWS, SHARED_ROWS, "wide")),
        ("auto", {"tp": 8}, "gpu", (CHAINED_ROWS, None, "wide")),
        ("auto", {"ep": 2}, "gpu", (CHAINED_ROWS, None, "wide")),
        ("auto", {}, "cpu", (None, None, None)),
        ("apart", {}, "gpu", (None, None, None)),
        ("reference", {}, "gpu", (None, None, None)),
        ("chain", {}, "gpu", (WHOLE_ROWS, None, None)),
        ("layers", {}, "gpu", (None, WHOLE_ROWS, None)),
        ("layers", {"tp": 4}, "cpu", (None, SHARED_ROWS, None)),
        ("launched", {}, "gpu", (None, WHOLE_ROWS, "launched")),
        ("launched", {"tp": 2}, "gpu", (None, WHOLE_ROWS, "launched")),
    ],
)
def test_ops_are_fused_where_that_was_measured_ahead_or_is_asked_for(kernels, mesh, platform, found):
    assert fused(kernels, load(**mesh).mesh, platform) == found
