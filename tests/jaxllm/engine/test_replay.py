"""What a leader's runner calls, followers call: on fake executables whose state must end alike."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from jaxllm.engine.replay import Announcer, Blob, Call, Follower


class Array:
    """As a device array is: made by calls, not of numpy, found by identity."""

    def __init__(self, value):
        self.value = np.asarray(value)

    def __eq__(self, other):
        return np.array_equal(self.value, other.value)

    __hash__ = None


@dataclass
class Stepped:
    sampled: Array
    hidden: Array | None
    kv: list


@dataclass
class Tables:
    table: dict


@dataclass
class FakeRunner:
    params: dict = field(default_factory=lambda: {"w": Array(3)})
    kv: list = field(default_factory=lambda: [(Array([0, 0]), Array([1, 1]))])
    counts: Array = field(default_factory=lambda: Array([0, 0]))
    last_tokens: Array = field(default_factory=lambda: Array([0]))
    _logits: dict = field(default_factory=lambda: {4: Array([0.0] * 4)})
    _neutral: dict = field(default_factory=lambda: {4: (Array(0), Array(1))})
    log: list = field(default_factory=list)

    def __post_init__(self):
        def step(params, kv, packed):
            pages, more = kv[0]
            self.log.append(("step", params["w"].value, pages.value, np.asarray(packed)))
            return Stepped(Array(packed), Array(packed * 2), [(Array(pages.value + packed), more)])

        def sample(counts, neutral, token):
            self.log.append(("sample", counts.value, neutral.value, np.asarray(token)))
            return Array(token), Array(counts.value + token)

        def read(hidden):
            self.log.append(("read", hidden.value))
            return hidden

        self.executables = Tables({("step", 4): step, ("sample", 4): sample, ("read",): read})

    def drive(self, numbers):
        table = self.executables.table
        for number in numbers:
            stepped = table["step", 4](self.params, self.kv, np.array([number, number + 1], np.int32))
            self.kv = stepped.kv
            neutral = self._neutral[4][1]
            _, self.counts = table["sample", 4](self.counts, neutral, np.int32(number))
            if number % 2:
                table[("read",)](stepped.hidden)


def test_a_follower_makes_the_same_calls_with_the_same_arguments():
    leader, twin, calls = FakeRunner(), FakeRunner(), []
    Announcer(leader, calls.append)
    follower = Follower([twin])
    leader.drive(range(7))
    for call in calls:
        follower.replay(call)
    assert follower.calls == 7 + 7 + 3
    assert str(twin.log) == str(leader.log)


def test_state_is_named_and_host_arrays_are_sent():
    leader, calls = FakeRunner(), []
    Announcer(leader, calls.append)
    leader.drive([1])
    blob = Blob("<i4", (2,), np.array([1, 2], np.int32).tobytes())
    assert calls[0] == Call("('step', 4)", ["params", "kv", blob])
    assert calls[1].arguments == ["counts", "_neutral.4.1", Blob("<i4", (), np.int32(1).tobytes())]
    assert calls[2].arguments == ["('step', 4)=.hidden"]


def test_a_call_is_sent_before_it_is_made():
    leader, seen = FakeRunner(), []
    Announcer(leader, lambda call: seen.append(len(leader.log)))
    leader.drive([0])
    assert seen == [0, 1]


def test_an_argument_that_followers_cannot_have_is_an_error_here_and_not_there():
    leader, calls = FakeRunner(), []
    Announcer(leader, calls.append)
    with pytest.raises(TypeError, match="followers cannot have"):
        leader.executables.table[("read",)](Array([9]))
    assert not calls


def test_a_call_made_of_others_is_sent_once():
    leader, twin, calls = FakeRunner(), FakeRunner(), []
    for runner in (leader, twin):
        table = runner.executables.table
        table[("both",)] = lambda packed, table=table, runner=runner: table["step", 4](runner.params, runner.kv, packed)
    Announcer(leader, calls.append)
    leader.executables.table[("both",)](np.array([5, 6], np.int32))
    assert [call.executable for call in calls] == ["('both',)"]
    Follower([twin]).replay(calls[0])
    assert str(twin.log) == str(leader.log)


def test_lanes_that_share_executables_keep_their_own_state():
    leaders, twins, calls = [FakeRunner(), FakeRunner()], [FakeRunner(), FakeRunner()], []
    for pair in (leaders, twins):
        pair[1].executables = pair[0].executables
        pair[1].log = pair[0].log
    for lane, runner in enumerate(leaders):
        Announcer(runner, calls.append, lane)
    for number in range(5):
        leaders[number % 2].drive([number])
    follower = Follower(twins)
    for call in calls:
        follower.replay(call)
    assert {call.lane for call in calls} == {0, 1}
    assert str(twins[0].log) == str(leaders[0].log)
