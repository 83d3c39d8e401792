"""Every test runs with strict dtype promotion; tests of host code never import JAX."""

import os

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
# Compiling is most of what the suite takes. XLA's newer emitters put each fusion through MLIR, half of that time.
QUICK = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
if QUICK not in (FLAGS := os.environ.get("XLA_FLAGS", "")):  # a worker of xdist has its parent's
    os.environ["XLA_FLAGS"] = f"{FLAGS} {QUICK}".strip()


def pytest_configure(config):
    """Without LLVM's costly passes, here and in children; not on a GPU, where speed is promised."""
    if config.option.markexpr != "gpu":
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


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
def compiled_as_served():
    """With LLVM's costly passes, as for users: what a module runs here, not in children, that promises them bits."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # JAX would give this module what others compiled, and the next one what this one did
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()
