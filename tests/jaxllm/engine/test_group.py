"""A group comes together over real sockets, or says in one line why not; and its end is noticed."""

import queue
import re
import socket
import threading
import time

import pytest
from helpers.ports import free_port

from jaxllm.engine import group
from jaxllm.engine.group import Built, Devices, Following, GroupError, GroupPlace, Leading
from jaxllm.engine.replay import Blob, Call

OPEN = []


@pytest.fixture
def place():
    port = free_port()

    def make(rank, **changes):
        given = {"coordinator": f"127.0.0.1:{port}", "processes": 2, "token": "secret", "timeout_s": 30.0, **changes}
        return GroupPlace(rank=rank, **given)

    yield make
    while OPEN:
        OPEN.pop().close()


def connected(address):
    """A connection to who may not be listening yet."""
    until = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(address)
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.05)


class Outcome:
    """What a thread of a member came to."""

    def __init__(self, function):
        self.found = queue.SimpleQueue()
        self.lost, self.refused = queue.SimpleQueue(), queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self.thread.start()

    def _run(self, function):
        try:
            member = function(self)
            OPEN.append(member)
            self.found.put(member)
        except GroupError as error:
            self.found.put(error)

    def get(self):
        return self.found.get(timeout=40)


def leads(place, config="c"):
    return Outcome(lambda own: Leading.gather(place, config, own.lost.put))


def joins(place, config="c"):
    return Outcome(lambda own: Following.join(place, config, own.lost.put, own.refused.put))


def test_calls_reach_every_follower_in_their_order(place):
    leader = leads(place(0, processes=3))
    followers = [joins(place(rank, processes=3)).get() for rank in (2, 1)]
    leading = leader.get()
    for i in range(50):
        leading.call(Call("step", [Blob("<i4", (1,), bytes([i, 0, 0, 0])), "kv"]))
    for follower in followers:
        assert [follower.next_call().arguments[0].data[0] for _ in range(50)] == list(range(50))


def test_followers_may_be_there_before_the_leader(place):
    follower = joins(place(1))
    time.sleep(0.5)
    assert isinstance(leads(place(0)).get(), Leading)
    assert isinstance(follower.get(), Following)


def test_a_missing_process_is_named_after_the_stated_time(place):
    leader, began = leads(place(0, processes=3, timeout_s=1.0)), time.monotonic()
    follower = joins(place(1, processes=3))
    assert str(leader.get()) == "2 of 3 processes came within 1 s; missing: rank 2"
    assert time.monotonic() - began < 10
    assert isinstance(follower.get(), Following)
    assert "missing: rank 2" in follower.refused.get(timeout=20)


def test_a_coordinator_that_is_not_there_is_said_after_the_stated_time(place):
    began = time.monotonic()
    error = joins(place(1, timeout_s=1.0)).get()
    assert re.fullmatch(r"the coordinator 127.0.0.1:\d+ did not answer within 1 s \(Connection refused\)", str(error))
    assert time.monotonic() - began < 10


def test_a_port_that_is_taken_is_said_at_once(place):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        leader = place(0, coordinator=f"127.0.0.1:{taken.getsockname()[1] - 1}")  # ours is the port after JAX's
        assert "is in use by another process" in str(leads(leader).get())


def test_an_address_of_another_machine_is_said_at_once(place):
    assert "is not an address of this machine" in str(leads(place(0, coordinator="192.0.2.7:5790")).get())


def test_unlike_versions_are_told_to_both_sides(place, monkeypatch):
    leader = leads(place(0))
    time.sleep(0.3)
    real = group.hello_of

    def older(place, config, nonce):
        hello = real(place, config, nonce)
        return group.Hello(1, 2, {**hello.versions, "jax": "0.1"}, config, hello.proof) if place.rank else hello

    monkeypatch.setattr(group, "hello_of", older)
    follower = joins(place(1))
    version = group.versions()["jax"]
    for outcome in (leader, follower):
        assert str(outcome.get()) == f"version mismatch: rank 1 has jax 0.1 and rank 0 has {version}"


@pytest.mark.parametrize(
    ("changes", "config", "said"),
    [
        ({}, "other", "config mismatch: the settings of rank 1 are not those of rank 0"),
        ({"processes": 4}, "c", "rank 1 was told of 4 processes and rank 0 of 2"),
        ({"rank": 7, "processes": 2}, "c", "rank 7 is not in a group of 2 processes"),
        ({"rank": 0}, "c", "rank 0 is not in a group of 2 processes"),
    ],
)
def test_a_member_that_does_not_fit_ends_the_attempt_with_one_line(place, changes, config, said):
    leader = leads(place(0))
    follower = joins(place(changes.pop("rank", 1), **changes), config)
    assert str(leader.get()) == str(follower.get()) == said


def test_two_processes_cannot_be_one_rank(place):
    leader = leads(place(0, processes=3))
    first = joins(place(1, processes=3))
    assert isinstance(first.get(), Following)
    second = joins(place(1, processes=3))
    assert str(leader.get()) == str(second.get()) == "two processes say that they are rank 1"


@pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\0\0\0\4\xc1\xc1\xc1\xc1"])
def test_strangers_and_port_scanners_do_not_disturb_a_group(place, noise):
    leader = leads(place(0))
    with connected(place(1).address) as stranger:
        stranger.sendall(noise)
    assert isinstance(joins(place(1)).get(), Following)
    assert isinstance(leader.get(), Leading)


def test_a_wrong_token_is_sent_away_and_the_group_goes_on(place):
    leader = leads(place(0))
    assert "wrong token" in str(joins(place(1, token="guess")).get())
    assert isinstance(joins(place(1)).get(), Following)
    assert isinstance(leader.get(), Leading)


def test_unequal_hosts_are_told_to_both_sides(place):
    leader, follower = leads(place(0)), joins(place(1))
    leading, following = leader.get(), follower.get()
    threading.Thread(target=following.compare, args=(Devices("H100", 4),), daemon=True).start()
    why = "unequal hosts: rank 1 has 4 x H100 and rank 0 has 8 x H100"
    with pytest.raises(GroupError, match=why):
        leading.compare(Devices("H100", 8), "unequal hosts")
    assert follower.refused.get(timeout=20) == why


def test_equal_members_are_welcome(place):
    leader, follower = leads(place(0)), joins(place(1))
    leading, following = leader.get(), follower.get()
    thread = threading.Thread(target=following.compare, args=(Built(7, "x"),))
    thread.start()
    leading.compare(Built(7, "x"), "unequal engines")
    thread.join(5)
    assert not thread.is_alive()


def test_the_end_of_a_follower_and_what_it_says_are_told_to_the_leader(place):
    leader, follower = leads(place(0)), joins(place(1))
    leading, following = leader.get(), follower.get()
    following.refuse("out of memory")
    assert leader.lost.get(timeout=20) == "rank 1: out of memory"
    assert leading.lines


def test_the_end_of_the_leader_is_told_to_its_followers(place):
    leader, follower = leads(place(0)), joins(place(1))
    leader.get().lines[1]._socket.shutdown(socket.SHUT_RDWR)
    assert isinstance(follower.get(), Following)
    assert follower.lost.get(timeout=20) == "the leader is gone"


def test_a_follower_that_is_stopped_is_lost_after_a_while(place, monkeypatch):
    monkeypatch.setattr(group, "SILENT_S", 2.0)  # a loaded machine may take one to answer
    monkeypatch.setattr(group, "BEAT_S", 30.0)
    leader, follower = leads(place(0)), joins(place(1))
    assert isinstance(leader.get(), Leading)
    assert isinstance(follower.get(), Following)
    assert leader.lost.get(timeout=20) == "rank 1 has been silent for 2 s"


def test_signs_of_life_keep_a_silent_follower(place, monkeypatch):
    monkeypatch.setattr(group, "SILENT_S", 2.0)
    monkeypatch.setattr(group, "BEAT_S", 0.1)
    leader, follower = leads(place(0)), joins(place(1))
    leader.get()
    following = follower.get()
    time.sleep(3.5)
    assert leader.lost.empty()
    assert following.said.empty()
