"""What tracing gave is found again by exactly the job that would give it again, and computes the same in place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.graph import traces
from jaxllm.graph.steps import Graph
from jaxllm.graph.traces import Job, Traces

GRAPH = Graph(None, "a model", page_size=8, num_pages=4)


def scaled_add(factor, pages, rows):
    return pages.at[0].add(factor * rows[0]), rows.sum()


def job(key=("step", 1), shape=(4, 8), dtype=jnp.float32, donated=(1,), function=scaled_add):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=where)  # noqa: E731
    return Job(key, function, (leaf(), leaf(*shape), [leaf(2, shape[1])]), donated)


def with_list(factor, pages, rows):
    return scaled_add(factor, pages, rows[0])


def arguments():
    return jnp.float32(3), jnp.arange(32.0).reshape(4, 8), [jnp.ones((2, 8))]


def test_what_is_read_back_gives_the_same_bits_in_the_memory_that_was_donated(tmp_path):
    wanted = job(function=with_list)
    direct = wanted.lower().compile()
    first, second = Traces(tmp_path, GRAPH), Traces(tmp_path, GRAPH)
    fresh, read = first.lower(wanted).compile(), second.lower(wanted).compile()
    assert (first.traced, second.traced) == (1, 0)
    expected = direct(*arguments())
    for compiled in (fresh, read):
        assert compiled.memory_analysis().alias_size_in_bytes == direct.memory_analysis().alias_size_in_bytes == 128
        given = arguments()
        for one, other in zip(compiled(*given), expected, strict=True):
            np.testing.assert_array_equal(one, other)
        assert given[1].is_deleted()


def test_a_profile_shows_what_the_executable_is(tmp_path):
    assert "module @jit_step" in Traces(tmp_path, GRAPH).lower(job(function=with_list)).as_text()


@pytest.mark.parametrize(
    ("graph", "changes"),
    [
        (dataclasses.replace(GRAPH, num_pages=5), {}),
        (dataclasses.replace(GRAPH, config="another model"), {}),
        (dataclasses.replace(GRAPH, chained=(1, 8)), {}),
        (GRAPH, {"key": ("step", 2)}),
        (GRAPH, {"shape": (5, 8)}),
        (GRAPH, {"dtype": jnp.bfloat16}),
        (GRAPH, {"donated": ()}),
    ],
)
def test_anything_else_is_another_file(tmp_path, graph, changes):
    assert Traces(tmp_path, graph).name(job(**changes)) != Traces(tmp_path, GRAPH).name(job())


def test_the_structure_of_a_model_is_not_part_of_the_name_as_its_config_is(tmp_path):
    other = dataclasses.replace(GRAPH, graphdef=object())  # would print its address
    assert Traces(tmp_path, other).name(job()) == Traces(tmp_path, GRAPH).name(job())


def test_a_step_that_is_read_builds_the_libraries_it_calls_and_no_others(tmp_path, monkeypatch):
    class Library:
        def __init__(self, name):
            self.name = name

        def library(self):
            built.append(self.name)

        def register(self, loaded):
            pass

    called, *others = traces.LIBRARIES
    monkeypatch.setattr(traces, "LIBRARIES", {name: Library(name) for name in traces.LIBRARIES})
    built = []

    def calls(factor, pages, rows):
        return jax.ffi.ffi_call(called, jax.ShapeDtypeStruct((), jnp.float32))(factor)

    exported = Traces(tmp_path, GRAPH)._export(job(function=calls, donated=()))
    Traces(tmp_path, GRAPH)._write(tmp_path / "step", exported)
    assert others[0].encode() in (tmp_path / "step").read_bytes()  # as one that is allowed
    Traces(tmp_path, GRAPH)._read(tmp_path / "step")
    assert built == [called]


def test_a_call_that_is_not_ours_is_traced_at_every_start(tmp_path, caplog):
    def called(factor, pages, rows):
        return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((), jnp.float32), factor)

    traces = Traces(tmp_path, GRAPH)
    text = traces.lower(job(function=called, donated=())).as_text()
    assert "callback" in text
    assert "traced at every start" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_costs_the_trace_only(tmp_path):
    (tmp_path / "file").write_text("in the way")
    traces = Traces(tmp_path / "file" / "traces", GRAPH)
    assert traces.lower(job(function=with_list)).compile()(*arguments())[1] == 16
