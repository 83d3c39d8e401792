"""Which (implementation, spec) pairs the present machine can run: a backend joins every suite by registration.

On a machine without a GPU: what is registered for "cpu" and "interpret". With one: what is registered for "gpu",
marked `gpu` (`pytest -m gpu`). The pairs of the other kind of machine are listed too, as skipped.
"""

import jax
import pytest

from pallas_kernels.dispatch import current_platform, implementations

ON_GPU = current_platform() == "gpu"
WARPGROUPS = "mosaic_sm90_interpret"


def pairs(op, specs, reduced=None):
    """Parameters (implementation name, spec) for pytest.mark.parametrize("name, spec", pairs(...)).

    `reduced`: name of a spec -> the same path in small, or None where others have it. The interpreter of warpgroups
    is given that, and by `make test-kernels` the spec itself.
    """
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
        for spec in specs:
            slow = implementation.name == WARPGROUPS and spec.name in (reduced or {})
            found += [parameter(implementation.name, reduced[spec.name], marks)] if slow and reduced[spec.name] else []
            found += [parameter(implementation.name, spec, [*marks, pytest.mark.kernels] if slow else marks)]
    return found


def parameter(name, spec, marks):
    return pytest.param(name, spec, marks=marks, id=f"{name}-{spec.name}")


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
