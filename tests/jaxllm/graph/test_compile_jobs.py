"""When a step is traced and when it is compiled."""

import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from jaxllm.graph.compile import compile_jobs
from jaxllm.graph.traces import Job

SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


@pytest.fixture
def watched(monkeypatch):
    """Two jobs; what was traced and what was compiled, in order."""
    seen: list[str] = []
    compile_ = jax.stages.Lowered.compile

    def job(name, offset):
        def function(x):
            seen.append(f"trace {name}")
            return x + offset

        return Job((name,), function, (SCALAR,))

    def compiled(self, *given, **named):
        seen.append("compile")
        return compile_(self, *given, **named)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
    return [job("one", 1.0), job("two", 2.0)], seen


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_all_is_traced_while_weights_are_read_and_compiled_when_they_are_there(watched):
    jobs, seen = watched
    weights: Future[None] = Future()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(compile_jobs, jobs, 2, None, weights)
        until(lambda: seen == ["trace one", "trace two"])
        assert not found.done()
        weights.set_result(None)
        executables = found.result(timeout=20)
    assert seen[2:] == ["compile", "compile"]
    assert [float(executables.table[name,](jnp.float32(1))) for name in ("one", "two")] == [2.0, 3.0]


@pytest.mark.parametrize("when", ["before", "while it traces", "after"])
def test_nothing_is_compiled_for_weights_that_do_not_come(watched, when):
    jobs, seen = watched
    weights: Future[None] = Future()
    if when == "before":
        weights.cancel()
    elif when == "while it traces":
        function = jobs[0].function
        jobs[0] = Job(("one",), lambda x: (weights.cancel(), function(x))[1], (SCALAR,))
    else:
        threading.Timer(0.5, weights.cancel).start()
    with pytest.raises(CancelledError):
        compile_jobs(jobs, 2, None, weights)
    assert "compile" not in seen
    assert len(seen) == {"before": 0, "while it traces": 1, "after": 2}[when]
