"""Random requests, aborts, endings and steps in any order: the books balance after each, and no token is wrong."""

import random

from helpers.fake_runner import Host, expected_tokens
from helpers.requests import request
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jaxllm.core import FinishReason
from jaxllm.engine.buckets import Padding

PAGE_SIZE, VOCAB = 4, 50
EXECUTED = {"rules": 0, "preemptions": 0, "hits": 0, "evictions": 0, "saved dispatches": 0}


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        caching=st.booleans(),
        radix=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority", "longest_prefix"]),
        num_pages=st.integers(8, 13),
        rows=st.integers(2, 6),
        budget=st.integers(6, 20),
        chunk=st.sampled_from([None, 1, 3, 6]),
        overlap=st.booleans(),
        sizes=st.sampled_from([(), (20,), (2, 4, 8, 16, 20), (5, 12, 20)]),
        decode_steps=st.sampled_from([1, 2, 4]),
    )
    def start(self, caching, radix, policy, num_pages, rows, budget, chunk, overlap, sizes, decode_steps):
        self.host = Host(
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            token_budget=budget,
            max_num_seqs=rows,
            max_model_len=30,
            max_prefill_chunk=chunk,
            caching=caching,
            radix=radix,
            policy=policy,
            overlap=overlap,
            padding=Padding(sizes, few=3),
            decode_steps=decode_steps,
        )
        self.number = 0
        self.sequences = []
        self.aborted = set()

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 16),
        max_tokens=st.integers(1, 20),
        n=st.sampled_from([1, 1, 2, 4]),
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "", "tenant"]),
        fails_at=st.sampled_from([None, None, None, None, 0, 3]),
    )
    def add(self, family, length, max_tokens, n, priority, salt, fails_at):
        EXECUTED["rules"] += 1
        name = str(self.number)
        self.number += 1
        if fails_at is not None:
            self.host.runner.errors.add((name, fails_at))
        prompt = [family * 100 + place for place in range(length)]  # prompts of a family are prefixes of each other
        made = request(id=name, prompt=prompt, max_tokens=max_tokens, n=n, priority=priority, salt=salt)
        self.sequences += self.host.add(made)

    @rule()
    def step(self):
        EXECUTED["rules"] += 1
        self.host.step()

    @rule(count=st.integers(2, 12))
    def several_steps(self, count):
        EXECUTED["rules"] += 1
        for _ in range(count):
            self.host.step()

    @precondition(lambda self: self.live)
    @rule(pick=st.randoms(use_true_random=False))
    def abort(self, pick: random.Random):
        EXECUTED["rules"] += 1
        name = pick.choice(self.live).request.id
        ended = self.host.scheduler.abort(name)
        assert ended
        assert all(s.finish_reason is FinishReason.ABORT for s in ended)
        assert not any(s.request.id == name for s in self.live)

    @precondition(lambda self: self.live)
    @rule(pick=st.randoms(use_true_random=False), reason=st.sampled_from([FinishReason.STOP, FinishReason.ERROR]))
    def finish(self, pick: random.Random, reason):
        EXECUTED["rules"] += 1
        sequence = pick.choice(self.live)
        self.host.scheduler.finish(sequence, reason, "text")
        assert sequence.finish_reason is reason

    @invariant()
    def books_balance(self):
        if hasattr(self, "host"):
            self.host.scheduler.check()
            pool = self.host.pool
            assert pool.num_free + pool.num_cached + pool.num_held == pool.num_pages

    @invariant()
    def what_ended_holds_nothing(self):
        for sequence in getattr(self, "sequences", []):
            assert not sequence.finished or (not sequence.pages and sequence.row is None)

    def teardown(self):
        if not hasattr(self, "host"):
            return
        self.host.run(max_steps=5_000)
        for sequence in self.sequences:
            made = sequence.request
            expected = expected_tokens(made.prompt_token_ids, sequence.num_output, index=sequence.index)
            assert sequence.output_token_ids == expected
            assert self.host.emitted(sequence) == expected
            if sequence.finish_reason is FinishReason.LENGTH:
                assert len(sequence.tokens) == min(30, sequence.num_prompt + made.params.max_tokens)
        metrics = self.host.scheduler.metrics
        EXECUTED["preemptions"] += metrics.preemptions
        EXECUTED["hits"] += metrics.prefix_hit_tokens
        EXECUTED["evictions"] += metrics.evicted_pages
        EXECUTED["saved dispatches"] += metrics.steps - metrics.dispatches

    @property
    def live(self):
        return [sequence for sequence in self.sequences if not sequence.finished]


def test_ten_thousand_random_operations_keep_the_books_and_the_tokens_right():
    EXECUTED.update(dict.fromkeys(EXECUTED, 0))
    plan = settings(
        max_examples=145,
        stateful_step_count=100,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(EngineMachine, settings=plan)
    assert EXECUTED["rules"] >= 10_000
    assert min(EXECUTED.values()) > 0  # and the paths that are hard to reach were reached
