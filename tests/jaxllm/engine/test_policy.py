import pytest
from helpers.requests import request

from jaxllm.core import Sequence
from jaxllm.engine.policy import SequenceQueue, fcfs, priority


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
