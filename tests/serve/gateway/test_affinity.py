"""Prompts to block names, the ring, the memory, and the choice they make together."""

from collections import Counter

import pytest

from jaxllm.config import ConfigError
from serve.gateway.affinity import Hasher, Memory, Ring, prompt_bytes
from serve.gateway.balance import Balancer
from serve.gateway.settings import GatewaySettings, gateway_settings
from serve.gateway.worker import Circuit, Vitals, Worker

URLS = tuple(f"http://10.0.0.{i}:80" for i in range(4))


def settings(**given):
    return GatewaySettings(**{"workers": URLS[:2], "block_bytes": 4, **given})


def balancer(**given):
    known = settings(**given)
    workers = [Worker(url, known) for url in known.workers]
    for worker in workers:
        worker.looked_at(Vitals(True), 0.0)
    return Balancer(known, workers)


def chain(text, owner=b""):
    return Hasher("", 4, 128).chain(text.encode(), owner)


def test_prompts_that_begin_alike_have_chains_that_begin_alike():
    one, other = chain("aaaabbbbcccc"), chain("aaaabbbbdddd")
    assert one[:2] == other[:2]
    assert one[2] != other[2]
    assert chain("xaaabbbbcccc")[1] != one[1]


def test_a_prompt_shorter_than_a_block_is_one_block():
    assert len(chain("ab")) == 1
    assert chain("ab") != chain("ac")


def test_callers_with_other_keys_and_gateways_with_other_salts_share_no_name():
    assert not set(chain("aaaabbbb", b"alice")) & set(chain("aaaabbbb", b"bob"))
    assert not set(Hasher("s", 4, 9).chain(b"aaaabbbb", b"")) & set(Hasher("t", 4, 9).chain(b"aaaabbbb", b""))


def test_no_more_than_the_first_blocks_of_a_long_prompt_are_hashed():
    assert len(Hasher("", 4, 8).chain(b"x" * 10_000, b"")) == 8


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ({"prompt": "abcdef"}, {"prompt": "abcdxy"}, 4),
        ({"prompt": [1, 2, 3]}, {"prompt": [1, 2, 4]}, 4),
        ({"messages": [{"role": "user", "content": "hi"}]}, {"messages": [{"role": "user", "content": "ho"}]}, 20),
        ({"input": "abc", "instructions": "be kind"}, {"input": "xyz", "instructions": "be kind"}, 7),
    ],
)
def test_what_an_engine_computes_first_comes_first(one, other, shared):
    a, b = prompt_bytes(one), prompt_bytes(other)
    assert a != b
    assert a[:shared] == b[:shared]


def test_a_body_without_a_prompt_has_no_affinity():
    assert prompt_bytes({"model": "m"}) == b""
    assert prompt_bytes({"prompt": None}) == b""
    assert prompt_bytes({"prompt": {"a": 1}}) == b""


def test_losing_a_worker_moves_only_its_own_keys():
    whole, less = Ring(URLS), Ring(URLS[:3])
    keys = [chain(str(i))[0] for i in range(500)]
    moved = [key for key in keys if whole.order(key)[0] != less.order(key)[0]]
    assert moved
    assert all(whole.order(key)[0] == URLS[3] for key in moved)
    assert min(Counter(whole.order(key)[0] for key in keys).values()) > 60


def test_the_memory_knows_the_longest_beginning_and_forgets_ends_before_beginnings():
    memory = Memory(3)
    memory.remember(chain("aaaabbbbcccc"), "one")
    assert memory.owner(chain("aaaabbbbxxxx")) == ("one", 2)
    memory.remember(chain("zzzz"), "two")
    assert memory.owner(chain("aaaabbbbcccc")) == ("one", 2)
    assert dict(memory.blocks) == {"one": 2, "two": 1}
    memory.forget("one")
    assert memory.owner(chain("aaaabbbbcccc")) == (None, 0)
    assert len(memory) == 1


def test_a_known_beginning_goes_back_to_its_worker_and_new_ones_are_spread():
    found = balancer()
    first = {i: found.choose(chain(f"prefix{i:02}" * 4), 1.0) for i in range(10)}
    assert sorted(Counter(worker.name for worker in first.values()).values()) in ([4, 6], [5, 5])
    for i in range(10):
        assert found.choose(chain(f"prefix{i:02}" * 4 + "more"), 1.0) is first[i]
    assert found.choices["known"] == 10


def test_a_worker_over_its_share_of_the_load_passes_a_known_prompt_on():
    found = balancer(slack=2.0)
    home = found.choose(chain("aaaabbbb"), 1.0)
    other = next(worker for worker in found.workers.values() if worker is not home)
    attempts = [object() for _ in range(6)]
    for attempt in attempts:
        home.enter(attempt, 1.0, lambda why: None)
    assert found.choose(chain("aaaabbbb"), 1.0) is other
    for attempt in attempts:
        home.leave(attempt, 1.0)
    assert home.burden == 0
    assert found.choose(chain("aaaabbbb"), 1.0) is other, "it has the pages too by now"


def test_round_robin_takes_turns_and_nobody_is_chosen_when_nobody_is_ready():
    found = balancer(policy="round_robin")
    names = [found.choose(chain("aaaa"), 1.0).name for _ in range(4)]
    assert names == [URLS[0], URLS[1]] * 2
    for worker in found.workers.values():
        worker.unready("gone", lost=False)
    assert found.choose(chain("aaaa"), 1.0) is None


def test_a_restarted_engine_has_no_pages_to_remember():
    found = balancer()
    home = found.choose(chain("aaaabbbb"), 1.0)
    home.looked_at(Vitals(True, restarts=1.0), 1.0)
    assert found.memory.owner(chain("aaaabbbb")) == (None, 0)


# ---- circuits and health ----


def test_a_circuit_opens_after_failures_in_a_row_and_one_request_decides():
    circuit = Circuit(break_after=2, first_pause_s=1.0, max_pause_s=3.0)
    circuit.failed(0.0)
    circuit.succeeded()
    circuit.failed(0.0)
    assert circuit.admits(0.0)
    circuit.failed(0.0)
    assert not circuit.admits(0.5)
    assert circuit.admits(1.0)
    circuit.enter()
    assert not circuit.admits(1.0), "one is enough"
    circuit.failed(1.0)
    assert not circuit.admits(2.9), "the pause doubles"
    assert circuit.admits(3.0)
    circuit.enter()
    circuit.succeeded()
    assert circuit.state == "closed"


def test_a_pause_has_a_limit():
    circuit = Circuit(1, 1.0, 4.0)
    now = 0.0
    for _ in range(8):
        circuit.enter()
        circuit.failed(now)
        now = circuit.open_until_s
    circuit.enter()
    circuit.failed(now)
    assert circuit.open_until_s - now == 4.0


def test_sequences_that_run_without_tokens_mean_a_stuck_worker_and_its_requests_are_given_up():
    worker = Worker("w", settings(stall_s=5.0))
    told = []
    worker.looked_at(Vitals(True, generated_tokens=10, running=2), 0.0)
    worker.enter("a", 1.0, told.append)
    worker.looked_at(Vitals(True, generated_tokens=10, running=2), 5.0)
    assert worker.ready
    worker.looked_at(Vitals(True, generated_tokens=10, running=2), 5.1)
    assert not worker.ready
    assert told == ["no token in 5 s"]
    worker.looked_at(Vitals(True, generated_tokens=11, running=2), 6.0)
    assert worker.ready


def test_an_idle_worker_and_one_that_counts_nothing_are_never_stuck():
    worker = Worker("w", settings(stall_s=5.0))
    for now in (0.0, 10.0, 20.0):
        worker.looked_at(Vitals(True, generated_tokens=10, running=0), now)
        assert worker.ready
        worker.looked_at(Vitals(True, generated_tokens=None, running=3), now)
        assert worker.ready


def test_what_others_sent_counts_as_load():
    worker = Worker("w", settings())
    worker.enter("a", 1.0, lambda why: None)
    worker.looked_at(Vitals(True, running=3, waiting=2), 0.0)
    assert worker.burden == 5.0


# ---- settings ----


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "workers is empty"),
        ({"workers": ["127.0.0.1:80"]}, "no server's address"),
        ({"workers": ["https://a:1"]}, "no server's address"),
        ({"workers": ["http://a:1", "http://a:1/"]}, "each server once"),
        ({"workers": 5}, "must be a list"),
        ({"workers": ["http://a:1"], "polcy": "prefix"}, "unknown setting 'polcy'"),
        ({"workers": ["http://a:1"], "policy": "best"}, "one of prefix"),
        ({"workers": ["http://a:1"], "stall_s": "soon"}, "must be like 30.0"),
        ({"workers": ["http://a:1"], "attempts": 0}, "at least 1"),
        ({"workers": ["http://a:1"], "load_bound": 0.5}, "at least 1"),
    ],
)
def test_wrong_settings_are_named(table, said):
    with pytest.raises(ConfigError, match=said):
        gateway_settings(table, {})


def test_flags_beat_the_table():
    found = gateway_settings({"workers": ["http://a:1"], "port": 1, "wait_s": 3}, {"port": 2, "host": None})
    assert (found.port, found.host, found.wait_s) == (2, "127.0.0.1", 3.0)
