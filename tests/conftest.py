"""Every test runs with strict dtype promotion; tests of host code never import JAX."""

import os

import pytest
from helpers import vocabularies

from jaxllm.tokenizer import Tokenizer

os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
# Threads of XLA's CPU pool. Interpreted warpgroups wait for each other on them: two cores' worth would deadlock.
os.environ.setdefault("NPROC", "16")
# Devices to spread a model over; everything else runs on the first.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")


@pytest.fixture(scope="session")
def vocabulary_directories(tmp_path_factory):
    """Kind of tokenizer -> a model directory that holds one."""
    root = tmp_path_factory.mktemp("vocabularies")
    return {name: make(root / name) for name, make in vocabularies.KINDS.items()}


@pytest.fixture(scope="session")
def tokenizers_by_kind(vocabulary_directories):
    return {name: Tokenizer.from_directory(path) for name, path in vocabulary_directories.items()}
