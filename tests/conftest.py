"""Every test runs with strict dtype promotion; tests of host code never import JAX."""

import os
import sys

import pytest
from helpers import vocabularies

from jaxllm.tokenizer import Tokenizer

# What CUDA says when a kernel has broken its context: every later call of the process says it too.
BROKEN = ("CUDA_ERROR_", "misaligned address", "illegal memory access", "illegal instruction")

os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
# Threads of XLA's CPU pool. Interpreted warpgroups wait for each other on them: two cores' worth would deadlock.
os.environ.setdefault("NPROC", "16")
# Devices to spread a model over; everything else runs on the first.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# XLA's newer emitters put each fusion through MLIR, half of all time to compile.
QUICK = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
FLAGS = os.environ.get("XLA_FLAGS", "").replace(QUICK, "").strip()  # a worker of xdist has its parent's
os.environ["XLA_FLAGS"] = f"{FLAGS} {QUICK}".strip()


def pytest_collection_finish():
    """XLA reads its flags once: here. Children do without: what the older emitters make is slower to serve with."""
    if "jax" in sys.modules:
        sys.modules["jax"].jit(lambda: 0)()
    os.environ["XLA_FLAGS"] = FLAGS


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """Later failures of a broken GPU say nothing of their tests: end here, with the name of the one that broke it."""
    if report.failed and "gpu" in report.keywords and any(word in report.longreprtext for word in BROKEN):
        pytest.exit(f"{report.nodeid} broke the GPU's context: nothing after it in this process was run", returncode=1)


@pytest.fixture(scope="session")
def vocabulary_directories(tmp_path_factory):
    """Kind of tokenizer -> a model directory that holds one."""
    root = tmp_path_factory.mktemp("vocabularies")
    return {name: make(root / name) for name, make in vocabularies.KINDS.items()}


@pytest.fixture(scope="session")
def tokenizers_by_kind(vocabulary_directories):
    return {name: Tokenizer.from_directory(path) for name, path in vocabulary_directories.items()}


@pytest.fixture(scope="module")
def children_compile_in_haste():
    """Processes that a module starts make machine code without LLVM's costly passes and by the older emitters: where
    no bits are promised. Their starts are longer than what they serve."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        patch.setenv("XLA_FLAGS", f"{FLAGS} {QUICK}".strip())
        yield


@pytest.fixture(scope="module")
def compiled_in_haste(children_compile_in_haste):
    """This process and its children do: for modules that compile much. Not on a GPU, where speed is promised."""
    import jax

    if jax.default_backend() == "gpu":
        yield
        return
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()  # JAX would give the next module what this one compiled
