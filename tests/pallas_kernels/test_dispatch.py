import logging
import subprocess
import sys

import pytest

from pallas_kernels.dispatch import Registry, imported


def refusing(why):
    def kernel(*args, **kwargs):
        raise NotImplementedError(why)

    return lambda: kernel


def answering(value):
    return lambda: lambda *args, **kwargs: (value, args, kwargs)


@pytest.fixture
def registry():
    return Registry()


def test_the_first_implementation_that_accepts_runs_with_the_callers_arguments(registry):
    registry.register("op", "picky", refusing("head_dim 80 is not 64, 128 or 256"), platforms=("cpu",))
    registry.register("op", "plain", answering("plain"))
    registry.register("op", "late", answering("late"))
    assert registry.dispatch("op", platform="cpu")(1, key=2) == ("plain", (1,), {"key": 2})


def test_only_implementations_of_the_platform_are_asked(registry):
    registry.register("op", "kernel", answering("kernel"), platforms=("cuda",))
    registry.register("op", "kernel_interpret", answering("interpreted"), platforms=("interpret",))
    registry.register("op", "reference", answering("reference"))
    names = {where: [each.name for each in registry.implementations("op", where)] for where in ("cpu", "gpu", "cuda")}
    assert names == {"cpu": ["reference"], "gpu": ["kernel", "reference"], "cuda": ["kernel", "reference"]}
    assert registry.dispatch("op", platform="interpret")()[0] == "interpreted"
    assert [each.name for each in registry.implementations("op")] == ["kernel", "kernel_interpret", "reference"]


def test_the_platform_defaults_to_the_present_backend(registry):
    registry.register("op", "nowhere", answering("nowhere"), platforms=("tpu",))
    registry.register("op", "here", answering("here"), platforms=("cpu", "gpu"))
    assert registry.dispatch("op")()[0] == "here"


def test_when_all_refuse_every_reason_is_raised_and_names_its_implementation(registry):
    registry.register("op", "a", refusing("too wide"), platforms=("cpu",))
    registry.register("op", "b", refusing("too narrow"), platforms=("cpu",))
    with pytest.raises(ExceptionGroup, match="nobody on 'cpu' accepted") as raised:
        registry.dispatch("op", platform="cpu")()
    assert [(str(e), e.__notes__) for e in raised.value.exceptions] == [
        ("too wide", ["from op/a"]),
        ("too narrow", ["from op/b"]),
    ]


def test_an_error_that_is_not_a_refusal_propagates_and_nobody_else_is_asked(registry):
    def broken(*args):
        raise ZeroDivisionError("a bug")

    registry.register("op", "broken", lambda: broken)
    registry.register("op", "plain", answering("plain"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        registry.dispatch("op", platform="cpu")()


def test_a_stack_that_is_not_installed_is_a_refusal_at_the_call_and_not_at_registration(registry):
    registry.register("op", "absent", imported("no_such_gpu_stack.kernels:run"))
    registry.register("op", "plain", answering("plain"))
    assert registry.dispatch("op", platform="cpu")()[0] == "plain"
    assert "absent declined: op/absent cannot be imported: No module named 'no_such_gpu_stack'" in registry.explain()


def test_a_pinned_implementation_runs_on_any_platform_and_its_refusal_propagates(registry):
    registry.register("op", "plain", answering("plain"))
    registry.register("op", "kernel", answering("kernel"), platforms=("gpu",))
    registry.register("op", "picky", refusing("not me"))
    assert registry.dispatch("op", implementation="kernel", platform="cpu")()[0] == "kernel"
    with pytest.raises(NotImplementedError, match="not me"):
        registry.dispatch("op", implementation="picky")()
    with pytest.raises(ValueError, match="no implementation named 'other'; it has plain, kernel, picky"):
        registry.dispatch("op", implementation="other")


def test_the_choice_is_logged_once_and_explained(registry, caplog):
    registry.register("op", "picky", refusing("not me"), platforms=("cpu",))
    registry.register("op", "plain", answering("plain"))
    assert registry.explain() == "nothing has been dispatched yet"
    with caplog.at_level(logging.INFO, "pallas_kernels.dispatch"):
        for _ in range(3):
            registry.dispatch("op", platform="cpu")()
    assert [record.message for record in caplog.records] == ["op on cpu: plain (picky declined: not me)"]
    assert registry.explain() == "op on cpu: plain (picky declined: not me)"


def test_names_are_unique_and_unknown_ops_and_platforms_are_named(registry):
    registry.register("op", "plain", answering("plain"), platforms=("cpu",))
    with pytest.raises(ValueError, match="op already has an implementation named 'plain'"):
        registry.register("op", "plain", answering("again"))
    with pytest.raises(ValueError, match="unknown op 'nothing'; known: op"):
        registry.implementations("nothing")
    with pytest.raises(NotImplementedError, match="no implementation for platform 'tpu'"):
        registry.dispatch("op", platform="tpu")()
    with pytest.raises(ValueError, match="module:function"):
        imported("just.a.module")


def test_importing_dispatch_starts_no_backend():
    code = "import pallas_kernels.dispatch, jax._src.xla_bridge as bridge; assert not bridge.backends_are_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
