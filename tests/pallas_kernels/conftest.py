"""Interpreted kernels are hundreds of little programs: compiling them is most of what their tests take."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _in_haste(compiled_in_haste):
    pass
