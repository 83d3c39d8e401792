"""A damaged, foreign or half-written cache entry never reaches JAX; a cache that cannot be used costs time only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxllm.graph.compile_cache import SUM_SUFFIX, open_cache, seal
from pallas_kernels.compiled import GXX, built

ROOT = Path(__file__).parents[3]
PROGRAM = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp
from jaxllm.graph.compile_cache import open_cache, seal
directory = Path(sys.argv[1])
report = open_cache(directory)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
value = jax.jit(lambda x: (x @ x.T).sum())(jnp.arange(12.0).reshape(3, 4))
print(json.dumps([report.entries, report.removed, len(hits), float(value), seal(directory)]))
"""


@pytest.fixture(autouse=True)
def jax_is_left_as_it_was():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def run(directory):
    """[entries found whole, entries removed, cache hits, the result, entries sealed] of a fresh process."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory)], capture_output=True, text=True, check=True, env=environment
    )
    return json.loads(done.stdout)


def entries(directory):
    return [path for path in directory.rglob("*") if path.is_file() and not path.name.endswith((SUM_SUFFIX, "-atime"))]


def test_what_one_process_compiles_the_next_one_loads_unless_a_bit_has_flipped(tmp_path):
    found, removed, hits, value, sealed = run(tmp_path)
    assert (found, removed, hits) == (0, 0, 0)
    assert sealed == len(entries(tmp_path)) > 0
    assert run(tmp_path) == [sealed, 0, sealed, value, 0]
    damaged = max(entries(tmp_path), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    found, removed, hits, again, resealed = run(tmp_path)
    assert (found, removed, hits, resealed) == (sealed - 1, 1, sealed - 1, 1)
    assert again == value


def test_an_entry_that_was_never_sealed_is_removed(tmp_path):
    (tmp_path / "half-cache").write_bytes(b"half an entry")
    (tmp_path / "whole-cache").write_bytes(b"an entry")
    seal(tmp_path)
    (tmp_path / "later-cache").write_bytes(b"another")
    (tmp_path / "half-cache").write_bytes(b"half")
    report = open_cache(tmp_path)
    assert (report.entries, report.removed, report.size_bytes) == (1, 2, len(b"an entry"))
    assert [path.name for path in entries(tmp_path)] == ["whole-cache"]


@pytest.mark.filterwarnings("ignore")
def test_a_folder_that_cannot_be_made_is_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    report = open_cache(tmp_path / "file" / "cache")
    assert not report.usable
    assert "is not used" in caplog.text


def test_a_kernel_library_built_by_another_process_is_kept(tmp_path):
    source = tmp_path / "one.cc"
    source.write_text('extern "C" int one() { return 1; }\n')
    library = built(source, command=GXX, directory=tmp_path / "cache" / "kernels")
    report = open_cache(tmp_path / "cache")
    assert (report.entries, report.removed) == (1, 0)
    assert library.exists()
