"""Whether this process runs on GPUs, found without JAX."""

import pytest

from jaxllm import gpus


@pytest.mark.parametrize(
    ("here", "visible", "platforms", "found"),
    [
        (2, None, None, True),
        (0, None, None, False),
        (2, "", None, False),
        (2, "-1", None, False),
        (2, "GPU-7f", None, True),
        (2, None, "cpu", False),
        (2, None, "cuda,cpu", True),
    ],
)
def test_there_must_be_gpus_that_are_neither_hidden_nor_passed_over(monkeypatch, here, visible, platforms, found):
    monkeypatch.setattr(gpus, "gpus_here", lambda: here)
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("JAX_PLATFORMS", platforms)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert gpus.runs_on_gpus() is found


def test_where_the_driver_has_no_list_its_tool_is_asked(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$1" = -L ] && printf "GPU 0: H200 (UUID: GPU-7f)\\nGPU 1: H200 (UUID: GPU-03)\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpus.gpus_here() in (2, len(list(gpus.Path("/dev").glob("nvidia[0-9]*"))))
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpus._told() == []
