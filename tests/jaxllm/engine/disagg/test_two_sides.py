"""Prefill and decode on sides of their own, without devices: one engine's tokens, and no page lost at any moment."""

import random
import threading

import pytest
from helpers.fake_runner import expected_tokens
from helpers.requests import request
from helpers.two_sides import Broken, recover, two_sides, whole

from jaxllm.core import FinishReason, RequestError


def run(engine, limit=3000):
    outputs = []
    for _ in range(limit):
        if not engine.has_work:
            return outputs
        outputs += engine.step()
        engine.check()
    raise AssertionError(f"still work after {limit} turns")


def heard(outputs, sequence):
    return [out.token_id for out in outputs if out.sequence is sequence and out.token_id is not None]


def right(sequence):
    """A finished sequence said what it says alone; one that was taken back said the beginning of it."""
    count = sequence.num_output
    return sequence.output_token_ids == expected_tokens(sequence.request.prompt_token_ids, count, index=sequence.index)


@pytest.mark.parametrize("feeds", [False, True], ids=["one thread", "fed"])
@pytest.mark.parametrize("chance", [1.0, 0.3])
def test_every_token_is_the_one_that_one_engine_gives_and_is_told_once(chance, feeds):
    engine = two_sides(chance=chance, chunk=7, feeds=feeds)
    asked = [request(f"r{i}", 3 + 5 * i, max_tokens=6 + i) for i in range(9)]
    sequences = [engine.add(one)[0] for one in asked]
    outputs = run(engine)
    for sequence in sequences:
        assert sequence.finish_reason is FinishReason.LENGTH
        assert right(sequence)
        assert heard(outputs, sequence) == sequence.output_token_ids
    whole(engine)


def test_the_decode_side_computes_no_prompt():
    engine = two_sides()
    asked = [request(f"r{i}", 20, max_tokens=5) for i in range(4)]
    for one in asked:
        engine.add(one)
    run(engine)
    assert engine.decode.runner.num_computed_tokens == 4 * 4  # of five tokens the first comes with the pages
    assert engine.prefill.runner.num_computed_tokens == 4 * 20


def test_a_first_token_that_ends_the_sequence_ends_it_and_nothing_is_decoded():
    engine = two_sides()
    prompt = tuple(range(50, 61))
    first = expected_tokens(prompt, 1)[0]
    stopped = engine.add(request("s", prompt, eos=(first,)))[0]
    one = engine.add(request("o", 9, max_tokens=1))[0]
    outputs = run(engine)
    assert (stopped.finish_reason, one.finish_reason) == (FinishReason.STOP, FinishReason.LENGTH)
    assert len(outputs) == 2
    assert engine.decode.runner.num_computed_tokens == 0
    whole(engine)


def test_pages_that_the_decode_side_has_are_not_sent_again():
    engine = two_sides(chance=1.0)
    shared = tuple(range(200, 224))  # six pages
    engine.add(request("a", (*shared, 1, 2), max_tokens=3))
    run(engine)
    before = engine.prefill.moved_pages
    again = engine.add(request("b", (*shared, 3, 4, 5), max_tokens=3))[0]
    run(engine)
    assert engine.prefill.moved_pages - before == 1
    assert again.num_cached == 24
    assert right(again)
    engine.scheduler.evict(64)
    engine.prefill.forget_cached()
    engine.add(request("c", (*shared, 6), max_tokens=3))
    run(engine)
    assert engine.prefill.moved_pages - before == 8


def test_siblings_share_the_prompts_pages_on_both_sides():
    engine = two_sides(chance=1.0)
    sequences = engine.add(request("n", 21, max_tokens=4, n=3))
    run(engine)
    assert all(map(right, sequences))
    assert engine.prefill.moved_pages == 6 + 1 + 1
    whole(engine)


def test_prompt_log_probabilities_come_whole_with_the_first_token():
    engine = two_sides(chunk=5)
    sequence = engine.add(request("p", 14, max_tokens=3, prompt_logprobs=0))[0]
    outputs = run(engine)
    assert [lp.token_id for out in outputs for lp in out.prompt_logprobs] == sequence.tokens[1:14]
    assert outputs[0].prompt_logprobs
    assert outputs[0].token_id is not None


def test_a_full_decode_side_makes_the_prefill_side_wait():
    engine = two_sides(decode_pages=14, chance=1.0)
    asked = [engine.add(request(f"r{i}", 18, max_tokens=10))[0] for i in range(5)]
    most = 0
    while engine.has_work:
        engine.step()
        engine.check()
        most = max(most, engine.prefill.scheduler.num_running + engine.prefill.scheduler.num_waiting)
    assert most <= 2  # 14 pages hold two prompts of five pages and their spare pages
    assert all(map(right, asked))


def test_what_the_decode_side_preempts_it_computes_again_by_itself():
    engine = two_sides(decode_pages=20, chance=1.0)
    asked = [engine.add(request(f"r{i}", 9, max_tokens=50))[0] for i in range(4)]
    outputs = run(engine)
    assert engine.decode.scheduler.metrics.preemptions > 0
    assert all(map(right, asked))
    assert all(heard(outputs, sequence) == sequence.output_token_ids for sequence in asked)
    assert engine.decode.runner.num_computed_tokens > 4 * 49
    whole(engine)


def test_an_arriving_sequence_that_is_preempted_is_awaited_anew():
    engine = two_sides(decode_pages=13, chance=1.0)
    old = [engine.add(request(f"o{i}", 7, max_tokens=60))[0] for i in range(2)]
    while engine.decode.scheduler.pool.num_free > 4:
        engine.step()
    engine.prefill.runner.chance = 0.02  # what comes now takes long
    new = engine.add(request("new", 11, max_tokens=3))[0]
    turns = set()
    while engine.has_work:
        engine.step()
        engine.check()
        turns |= {key.turn for key in engine._handoffs if key.request_id == "new"}
    assert max(turns) > 0
    assert all(map(right, [*old, new]))
    whole(engine)


def test_a_request_that_one_side_could_never_hold_is_refused_with_nothing_left_behind():
    engine = two_sides(prefill_pages=4)
    with pytest.raises(RequestError, match="the cache has 4 pages"):
        engine.add(request("long", 40))
    whole(engine)


def test_a_failed_prefill_step_ends_its_prompts_and_the_decodes_go_on():
    engine = two_sides(chance=1.0)
    decoding = engine.add(request("d", 9, max_tokens=40))[0]
    while not decoding.num_output:
        engine.step()
    filling = [engine.add(request(f"f{i}", 30))[0] for i in range(2)]
    engine.prefill.runner.broken = 1
    outputs = run(engine)
    errors = {out.sequence: out.error for out in outputs if out.error}
    assert set(errors) == set(filling)
    assert all(error.startswith("engine_error: ") for error in errors.values())
    assert right(decoding)
    assert decoding.finish_reason is FinishReason.LENGTH
    after = engine.add(request("after", 30))[0]
    run(engine)
    assert right(after)
    whole(engine)


def test_a_failed_prefill_step_also_ends_what_was_computed_and_has_not_arrived():
    engine = two_sides(chance=1.0, limit=1000)
    decoding = engine.add(request("d", 9, max_tokens=60))[0]
    while not decoding.num_output:
        engine.step()
    send = engine.prefill.send

    def slowly(layers, pages):
        block = send(layers, pages)
        block.chance = 0.0  # its copy takes for ever
        return block

    engine.prefill.send = slowly
    leaving = engine.add(request("l", 30))[0]
    while engine.prefill._wanted or not any(handoff.first for handoff in engine._handoffs.values()):
        engine.step()
    assert engine.prefill._under_way
    engine.prefill.send = send
    engine.add(request("f", 9))
    engine.prefill.runner.broken = 1
    outputs = run(engine)
    assert leaving in {out.sequence for out in outputs if out.error}
    assert right(decoding)
    whole(engine)


@pytest.mark.parametrize("feeds", [False, True], ids=["one thread", "fed"])
def test_a_prefill_side_that_fails_twice_in_a_row_is_not_kept_up(feeds):
    engine = two_sides(chance=1.0, feeds=feeds)
    breakable(engine).broken = 2
    first = engine.add(request("a", 9))[0]
    run(engine)
    assert first.finish_reason is FinishReason.ERROR
    second = engine.add(request("b", 9))[0]
    with pytest.raises(Broken):
        run(engine)
    recover(engine, [second])
    whole(engine)


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_what_a_turn_has_to_tell_is_told_though_the_prefill_side_fails_in_it(ahead):
    engine = two_sides(chance=1.0)
    ending = engine.add(request("d", 9, max_tokens=12))[0]
    outputs = []
    while ending.num_output < 12 - ahead:
        outputs += engine.step()
    failing = engine.add(request("f", 9))
    engine.prefill._failed_in_a_row, engine.prefill.runner.broken = 1, 1
    while engine._fault is None:
        outputs += engine.step()
    assert heard(outputs, ending) == ending.output_token_ids
    assert engine.has_work
    with pytest.raises(Broken):
        engine.step()
    recover(engine, [ending, *failing])
    run(engine)
    whole(engine)


def test_pages_under_way_of_a_prompt_that_nobody_wants_any_more_are_work():
    engine = two_sides(limit=1, chance=0.0)
    engine.add(request("a", 30))
    while not engine.prefill._batch:
        engine.step()
    engine.abort("a")
    assert engine.has_work
    for block in engine.prefill._under_way:
        block.pages.chance = 1.0
    run(engine)
    whole(engine)


def breakable(engine):
    """The prefill side's runner, whoever feeds it."""
    side = engine.prefill
    return side.runner if side.feeder is None else side.feeder.runner


def test_a_token_does_not_wait_for_the_launch_of_a_prompts_step():
    engine = two_sides(chance=1.0, feeds=True)
    decoding = engine.add(request("d", 9, max_tokens=40))[0]
    while decoding.num_output < 3:
        engine.step()
    begun, go_on = threading.Event(), threading.Event()
    launch = breakable(engine).launch

    def held_up(plan):
        begun.set()
        assert go_on.wait(20)
        return launch(plan)

    breakable(engine).launch = held_up
    filling = engine.add(request("f", 9, max_tokens=2))[0]
    while not begun.is_set():
        engine.step()
    before = decoding.num_output
    for _ in range(10):
        engine.step()
    assert decoding.num_output >= before + 9
    assert not filling.num_output
    go_on.set()
    run(engine)
    assert right(decoding)
    assert right(filling)
    whole(engine)


def test_a_launch_that_fails_in_its_thread_ends_its_prompts_and_the_decodes_go_on():
    engine = two_sides(chance=1.0, feeds=True)
    decoding = engine.add(request("d", 9, max_tokens=60))[0]
    while not decoding.num_output:
        engine.step()
    breakable(engine).broken = 1
    failing = engine.add(request("a", 9))[0]
    run(engine)
    assert failing.finish_reason is FinishReason.ERROR
    assert right(decoding)
    assert decoding.finish_reason is FinishReason.LENGTH
    whole(engine)


class Machine:
    """Random requests, aborts and failures of either side; books checked after each."""

    def __init__(self, seed, feeds):
        self.rng = rng = random.Random(seed)
        self.engine = two_sides(
            seed=seed,
            chance=rng.choice([1.0, 0.6, 0.15]),
            decode_pages=rng.choice([24, 30, 64]),
            prefill_pages=rng.choice([22, 26, 64]),
            decode_seqs=rng.choice([2, 6]),
            prefill_seqs=rng.choice([1, 4]),
            chunk=rng.choice([None, 3, 9]),
            context=80,
            policy=rng.choice(["fcfs", "priority", "longest_prefix"]),
            limit=rng.choice([1, 6, 100]),
            feeds=feeds,
        )
        self.sequences, self.heard, self.errors, self.count = [], {}, set(), 0

    def add(self):
        rng = self.rng
        shared = tuple(range(500, 500 + rng.choice([0, 8, 17])))
        own = tuple(rng.choices(range(400), k=rng.randrange(1, 40)))
        more = {"prompt_logprobs": 0} if rng.random() < 0.1 else {}
        asked = request(
            f"q{self.count}",
            shared + own,
            max_tokens=rng.randrange(1, 20),
            n=rng.choice([1, 1, 1, 3]),
            priority=rng.randrange(3),
            **more,
        )
        self.count += 1
        self.sequences += self.engine.add(asked)

    def step(self, drain=False):
        try:
            outputs = self.engine.drain() if drain else self.engine.step()
        except Broken:  # what this turn had to tell is lost, and every sequence ends
            recover(self.engine, self.sequences)
            self.errors |= {s for s in self.sequences if s.finish_reason is FinishReason.ERROR}
            return
        for out in outputs:
            if out.token_id is not None:
                self.heard.setdefault(out.sequence, []).append(out.token_id)
            if out.error:
                self.errors.add(out.sequence)

    def turn(self):
        roll = self.rng.random()
        live = [s for s in self.sequences if not s.finished]
        if roll < 0.15 and len(live) < 12:
            self.add()
        elif roll < 0.19 and live:
            self.engine.abort(self.rng.choice(live).request.id)
        elif roll < 0.21 and live:
            self.engine.finish(self.rng.choice(live), FinishReason.STOP, "stop")
        elif roll < 0.215:
            breakable(self.engine).broken = 1
        elif roll < 0.22:
            self.engine.decode.runner.broken = 1
        elif roll < 0.24:
            self.step(drain=True)
        else:
            self.step()
        self.engine.check()


@pytest.mark.parametrize(
    ("seed", "feeds"), [*((seed, False) for seed in range(30)), *((seed, True) for seed in range(30, 40))]
)
def test_no_page_is_lost_and_no_token_is_wrong_whatever_happens(seed, feeds):
    machine = Machine(seed, feeds)
    for _ in range(250):
        machine.turn()
    breakable(machine.engine).broken = machine.engine.decode.runner.broken = 0
    for _ in range(5000):
        if not machine.engine.has_work:
            break
        machine.step()
        machine.engine.check()
    whole(machine.engine)
    assert all(map(right, machine.sequences))
    for sequence in machine.sequences:
        assert sequence.finished
        if sequence not in machine.errors:
            assert machine.heard.get(sequence, []) == sequence.output_token_ids
        if sequence.finish_reason is FinishReason.LENGTH:
            assert sequence.num_output == sequence.request.params.max_tokens
