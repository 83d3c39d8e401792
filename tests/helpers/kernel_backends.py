"""Which (implementation, spec) pairs the present machine can run: a backend joins every suite by registration.

On a machine without a GPU: what is registered for "cpu" and "interpret". With one: what is registered for "gpu",
marked `gpu` (`pytest -m gpu`). The pairs of the other kind of machine are listed too, as skipped.
"""

import jax
import pytest

from pallas_kernels.dispatch import current_platform, implementations

ON_GPU = current_platform() == "gpu"


def pairs(op, specs):
    """Parameters (implementation name, spec) for pytest.mark.parametrize("name, spec", pairs(...))."""
    here = ("gpu",) if ON_GPU else ("cpu", "interpret")
    found = []
    for implementation in implementations(op):
        needs_gpu = "gpu" in implementation.platforms
        runs_here = any(platform in implementation.platforms for platform in here)
        if needs_gpu and not runs_here:
            marks = [pytest.mark.gpu, pytest.mark.skip(reason="needs an NVIDIA GPU")]
        elif not runs_here:
            marks = [pytest.mark.skip(reason="runs on a machine without a GPU")]
        else:
            marks = [pytest.mark.gpu] if ON_GPU else []
        found += [
            pytest.param(implementation.name, spec, marks=marks, id=f"{implementation.name}-{spec.name}")
            for spec in specs
        ]
    return found


def declined(reason):
    """Skips the test; a source that its compiler does not take is no refusal."""
    if " failed on " in str(reason):
        raise reason
    pytest.skip(f"declined: {reason}")


def jitted(op_api, name, **options):
    """The op through the named implementation, compiled once per shape; a documented refusal skips the test."""
    compiled = jax.jit(lambda *arrays: op_api(*arrays, implementation=name, **options))

    def call(*args):
        try:
            return compiled(*args)
        except NotImplementedError as reason:
            declined(reason)

    return call
