import threading

import pytest

from pallas_kernels.compiled import once, prepare

PATIENCE_S = 20


def test_different_things_are_made_at_one_time_and_each_once():
    both = threading.Barrier(2, timeout=PATIENCE_S)
    made = []

    @once
    def make(name):
        made.append(name)
        both.wait()  # for the other one
        return name.upper()

    threads = [threading.Thread(target=make, args=(name,)) for name in ("a", "b", "a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sorted(made) == ["a", "b"]
    assert make("a") == "A"


def test_who_wants_what_is_being_prepared_waits_for_it():
    begun, may_end, builds = threading.Event(), threading.Event(), []

    @once
    def library():
        builds.append(threading.current_thread())
        begun.set()
        assert may_end.wait(PATIENCE_S)
        return "built"

    prepare([library])
    assert begun.wait(PATIENCE_S)
    threading.Timer(0.05, may_end.set).start()
    assert library() == "built"
    assert builds != [threading.current_thread()]
    assert len(builds) == 1


def test_what_cannot_be_built_is_said_to_who_wants_it():
    tried = threading.Event()

    @once
    def library():
        tried.set()
        raise NotImplementedError("nvcc is not on this machine")

    prepare([library])
    assert tried.wait(PATIENCE_S)
    with pytest.raises(NotImplementedError, match="nvcc"):
        library()
