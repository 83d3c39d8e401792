import pytest
from helpers.fake_runner import Host
from helpers.requests import request

from jaxllm.core import Sequence
from jaxllm.engine.policy import SequenceQueue, fcfs, priority
from jaxllm.engine.scheduler import PATIENCE


def queued(policy, priorities):
    queue = SequenceQueue()
    for arrival, value in enumerate(priorities):
        sequence = Sequence(request(id=str(arrival), priority=value))
        queue.push(policy(sequence, arrival), sequence)
    queue.check()
    return [sequence.request.id for sequence in queue]


def test_first_come_is_first_served_whatever_the_priority():
    assert queued(fcfs, [5, 0, 5, -1]) == ["0", "1", "2", "3"]


def test_the_lower_priority_value_goes_first_and_ties_by_arrival():
    assert queued(priority, [5, 0, 5, -1, 0]) == ["3", "1", "4", "0", "2"]


def test_a_returning_sequence_takes_its_old_place():
    queue, sequences = SequenceQueue(), [Sequence(request(id=str(i))) for i in range(4)]
    for i in (0, 2, 3, 1):
        queue.push((i,), sequences[i])
    assert list(queue) == sequences
    assert queue[0] is sequences[0]
    assert queue[-1] is sequences[3]


def test_removing_what_is_not_queued_is_an_error():
    queue = SequenceQueue()
    queue.push((1,), Sequence(request()))
    with pytest.raises(KeyError):
        queue.remove((2,))
    assert len(queue) == 1


def longest_prefix_host(**settings):
    host = Host(policy="longest_prefix", max_num_seqs=1, num_pages=200, max_model_len=100, **settings)
    host.add(request(id="seed", prompt=range(40), max_tokens=1))
    host.run()
    return host


@pytest.mark.parametrize("radix", [False, True])
def test_the_waiting_sequence_that_finds_the_most_of_itself_goes_first(radix):
    host = longest_prefix_host(radix=radix)
    for name, prompt in (("cold", range(500, 540)), ("half", [*range(20), 7]), ("whole", [*range(40), 7])):
        host.add(request(id=name, prompt=prompt, max_tokens=1))
    host.run()
    assert [sequence.request.id for sequence in host.finished] == ["seed", "whole", "half", "cold"]


def test_a_sequence_that_finds_nothing_is_not_passed_over_for_ever():
    host = longest_prefix_host()
    host.add(request(id="cold", prompt=range(500, 540), max_tokens=1))
    for number in range(PATIENCE + 10):
        host.add(request(id=f"warm {number}", prompt=[*range(40), number], max_tokens=1))
    host.run()
    order = [sequence.request.id for sequence in host.finished]
    assert order.index("cold") == PATIENCE + 1
