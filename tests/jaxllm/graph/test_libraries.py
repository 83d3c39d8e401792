import pytest

from jaxllm.graph import libraries
from pallas_kernels.all_reduce import cuda as all_reduce
from pallas_kernels.decode_layers import cuda as decode_layers
from pallas_kernels.decode_layers import wide


@pytest.fixture
def begun(monkeypatch):
    found = []
    monkeypatch.setattr(libraries, "prepare", found.extend)
    return found


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "bfloat16"), ("gpu", "float32")])
def test_nothing_is_built_where_no_step_would_call_it(begun, platform, dtype):
    libraries.begin(platform, dtype, "none", 1)
    assert begun == []


def test_a_quantised_model_builds_the_kernel_of_its_weights_and_not_the_plain_ones(begun):
    libraries.begin("gpu", "bfloat16", "fp8", 1)
    assert decode_layers.KINDS["fp8"].library in begun
    assert decode_layers.KINDS["bf16"].library not in begun
    assert wide.library not in begun
    assert all_reduce.library not in begun


def test_several_devices_build_what_they_add_up_with(begun):
    libraries.begin("gpu", "bfloat16", "none", 2)
    assert {all_reduce.library, wide.library} <= set(begun)


def test_every_library_of_a_plain_model_is_begun(begun):
    """Else the first start builds it when it meets it, and all others wait."""
    libraries.begin("gpu", "bfloat16", "none", 1)
    others = ("jaxllm_fp8", "jaxllm_int")
    plain = [each.library for name, each in libraries.LIBRARIES.items() if not name.startswith(others)]
    assert set(plain) == set(begun)
