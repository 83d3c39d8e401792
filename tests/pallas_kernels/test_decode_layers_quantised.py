"""All layers in one kernel with weights in few bits: the numbers are those of the weights they stand for."""

import jax
import numpy as np
import pytest
from helpers.decode_layers import error, kernels, run, slot

from pallas_kernels.decode_layers.specs import QUANTISED_SPECS


@pytest.mark.parametrize(("name", "spec"), kernels(QUANTISED_SPECS))
def test_quantised_layers_agree_with_the_reference(name, spec):
    given = spec.inputs()
    x, pages = run(name, spec, given)
    expected, written = run("reference", spec, given)
    live = [row for row, length in enumerate(spec.lengths) if length]
    assert error(x[live], expected[live]) < 1.5e-2
    for got, want in zip(jax.tree.leaves(pages), jax.tree.leaves(written), strict=True):
        for row in live:
            page, offset = slot(spec, given, row)
            assert error(got[page, :, offset], want[page, :, offset]) < 1.5e-2
