"""A kernel that breaks the GPU's context ends its process, so that its neighbours do not fail in its name."""

import pytest
from conftest import pytest_runtest_logreport as reported

MESSAGE = "INTERNAL: Failed to synchronise: CUDA_ERROR_MISALIGNED_ADDRESS: misaligned address"


def report(message: str, *keywords: str) -> pytest.TestReport:
    where = ("test_kernel.py", 1, "test_it")
    return pytest.TestReport("test_kernel.py::test_it", where, dict.fromkeys(keywords, 1), "failed", message, "call")


def test_a_broken_context_ends_the_process_with_the_name_of_the_test():
    with pytest.raises(pytest.exit.Exception, match=r"test_kernel.py::test_it broke the GPU"):
        reported(report(MESSAGE, "gpu"))


@pytest.mark.parametrize(("message", "keywords"), [("AssertionError: 1 != 2", ["gpu"]), (MESSAGE, [])])
def test_other_failures_and_other_machines_go_on(message, keywords):
    reported(report(message, *keywords))
