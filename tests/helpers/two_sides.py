"""A prefill side and a decode side without devices: real schedulers, and runners whose tokens show every wrong page.

Blocks and steps become ready when the test's dice say so, as they would on devices that are busy.
"""

import random
from dataclasses import dataclass

from helpers.fake_runner import FakeRunner

from jaxllm.config import load, resolve
from jaxllm.core import FinishReason
from jaxllm.engine.cache.hashed import PrefixCache
from jaxllm.engine.cache.pages import PagePool
from jaxllm.engine.disagg.engine import DisaggregatedEngine
from jaxllm.engine.disagg.prefill import PrefillSide
from jaxllm.engine.engine import Engine
from jaxllm.engine.policy import POLICIES
from jaxllm.engine.scheduler import Limits, Scheduler
from jaxllm.graph.models.config import ModelConfig

GROUPS = (range(1), range(1, 2))  # two "layers": the even and the odd slots of a page
VOCAB = 1000


@dataclass
class Later:
    """A block, or a step, that is ready when the dice say so; whoever waits for it has it."""

    value: object
    dice: random.Random
    chance: float
    nbytes: int = 0
    waits = False
    done: bool = False

    @property
    def ready(self):
        self.done = self.done or self.dice.random() < self.chance
        return self.done

    def is_ready(self):
        return self.ready

    def block_until_ready(self):
        self.done = True
        return self


class Broken(RuntimeError):
    pass


class SlowRunner(FakeRunner):
    """Launches that raise when told to; steps that take their time."""

    def __init__(self, *args, dice, chance):
        super().__init__(*args)
        self.dice, self.chance, self.broken = dice, chance, 0

    def launch(self, plan):
        if self.broken:
            self.broken -= 1
            raise Broken("this launch was to fail")
        return Later(super().launch(plan), self.dice, self.chance)

    def collect(self, launched):
        return launched.value.results


def _scheduler(pages, page_size, seqs, budget, context, policy, chunk=None):
    pool = PagePool(pages, page_size)
    limits = Limits(
        token_budget=budget,
        max_num_seqs=seqs,
        page_size=page_size,
        max_model_len=context,
        max_prefill_chunk=chunk,
    )
    return Scheduler(limits, pool, PrefixCache(pool), POLICIES[policy])


def two_sides(
    *,
    seed=0,
    chance=0.5,
    decode_pages=64,
    prefill_pages=64,
    page_size=4,
    decode_seqs=6,
    prefill_seqs=4,
    budget=16,
    chunk=None,
    context=120,
    policy="fcfs",
    limit_bytes=6,
):
    """A DisaggregatedEngine; a page of a block counts as one byte."""
    dice = random.Random(seed)
    config = resolve(load(environ={}, page_size=page_size), context, "cpu")
    model = ModelConfig(
        vocab_size=VOCAB,
        num_layers=2,
        d_model=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        d_ff=8,
        context_length=context,
        eos_token_ids=(),
        bos_token_id=None,
    )
    target = SlowRunner(decode_pages, page_size, decode_seqs, VOCAB, dice=dice, chance=1.0)
    source = SlowRunner(prefill_pages, page_size, prefill_seqs, VOCAB, dice=dice, chance=chance)
    decode = Engine(config, model, _scheduler(decode_pages, page_size, decode_seqs, budget, context, policy), target)
    scheduler = _scheduler(prefill_pages, page_size, prefill_seqs, budget, context, policy, chunk)

    def slots(group, page):
        return range(page * page_size + group.start, (page + 1) * page_size, len(GROUPS))

    def take(group, pages):
        values = [[source.memory[slot] for slot in slots(group, page)] for page in pages]
        return Later(values, dice, chance, nbytes=len(pages))

    def put(group, block, places):
        for values, page in zip(block.value, places):
            if page is not None:
                for slot, value in zip(slots(group, page), values):
                    target.memory[slot] = value

    side = PrefillSide(scheduler, source, take, GROUPS, 4, lambda block: block, limit_bytes)
    return DisaggregatedEngine(decode, side, put, len(GROUPS))


def whole(engine):
    """Nothing is left on either side."""
    engine.check()
    assert not engine.has_work
    assert not engine._handoffs
    for pool in (engine.decode.scheduler.pool, engine.prefill.scheduler.pool):
        assert pool.num_held == 0
        assert pool.num_free + pool.num_cached == pool.num_pages


def recover(engine, sequences):
    """What the engine's loop does after a step that raised."""
    for sequence in sequences:
        if not sequence.finished:
            engine.scheduler.finish(sequence, FinishReason.ERROR)
    engine.scheduler.cache.evict(engine.scheduler.pool.num_cached)
    engine.check()
