"""A prefill side and a decode side without devices: real schedulers, and runners whose tokens show every wrong page.

Blocks and steps become ready when the test's dice say so, as they would on devices that are busy. As a program this is
a prefill worker: `two_sides.py ADDRESS STEP_S` listens until it is ended.
"""

import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    TESTS = Path(__file__).parent.parent
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import numpy as np
from helpers.fake_runner import FakeRunner

from jaxllm.config import DisaggregationConfig, load, resolve
from jaxllm.core import FinishReason
from jaxllm.engine.cache.hashed import PrefixCache
from jaxllm.engine.cache.pages import PagePool
from jaxllm.engine.disagg.engine import DisaggregatedEngine
from jaxllm.engine.disagg.feeder import FedPages, Feeder
from jaxllm.engine.disagg.messages import VERSION, Hello
from jaxllm.engine.disagg.prefill import PrefillSide
from jaxllm.engine.engine import Engine
from jaxllm.engine.limits import Limits
from jaxllm.engine.policy import POLICIES
from jaxllm.engine.scheduler import Scheduler
from jaxllm.graph.models.config import ModelConfig
from serve.disagg.peers import Form, PrefillPeers
from serve.disagg.worker import PrefillWorker, bind

GROUPS = (range(1), range(1, 2))  # two "layers": the even and the odd slots of a page
PAGE_SIZE, VOCAB, MODEL = 4, 1000, "fake"


@dataclass
class Later:
    """A block, or a step, that is ready when the dice say so; whoever waits for it has it."""

    value: object
    dice: random.Random
    chance: float = 1.0
    waits = False
    done: bool = False

    @property
    def ready(self):
        self.done = self.done or self.dice.random() < self.chance
        return self.done

    @property
    def nbytes(self):
        return self.value.nbytes

    def is_ready(self):
        return self.ready

    def block_until_ready(self):
        self.done = True
        return self

    def __array__(self, dtype=None, copy=None):
        assert self.done
        return self.value


class Broken(RuntimeError):
    pass


class SlowRunner(FakeRunner):
    """Launches that raise when told to; steps that take their time."""

    def __init__(self, *args, dice, chance, step_s=0.0):
        super().__init__(*args)
        self.dice, self.chance, self.step_s, self.broken = dice, chance, step_s, 0

    def launch(self, plan):
        if self.broken:
            self.broken -= 1
            raise Broken("this launch was to fail")
        return Later(super().launch(plan), self.dice, self.chance)

    def collect(self, launched):
        time.sleep(self.step_s)
        return launched.value.results


def _scheduler(pages, seqs, budget, context, policy="fcfs", chunk=None, decode_steps=1):
    pool = PagePool(pages, PAGE_SIZE)
    limits = Limits(
        token_budget=budget,
        max_num_seqs=seqs,
        page_size=PAGE_SIZE,
        max_model_len=context,
        max_prefill_chunk=chunk,
        decode_steps=decode_steps,
        decode_steps_rows=seqs,
    )
    return Scheduler(limits, pool, PrefixCache(pool), POLICIES[policy])


def _slots(group, page):
    return range(page * PAGE_SIZE + group.start, (page + 1) * PAGE_SIZE, len(GROUPS))


def decode_side(prefill, *, pages=64, seqs=6, budget=16, context=120, policy="fcfs", dice=None, decode_steps=3):
    """A DisaggregatedEngine on this prefill side."""
    config = resolve(load(environ={}, page_size=PAGE_SIZE), context, "cpu")
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
    runner = SlowRunner(pages, PAGE_SIZE, seqs, VOCAB, dice=dice or random.Random(0), chance=1.0)
    decode = Engine(config, model, _scheduler(pages, seqs, budget, context, policy, decode_steps=decode_steps), runner)

    def put(group, block, places):
        values = np.asarray(block.block.result() if isinstance(block, FedPages) else block).reshape(2, -1)
        for number, page in enumerate(places):
            if page is not None:
                for slot, value in zip(_slots(group, page), values[:, number]):
                    runner.memory[slot] = int(value)

    return DisaggregatedEngine(decode, prefill, put, len(GROUPS))


def fed(side, launch_s=0.001):
    """The side with a thread that takes its time over what its device is given."""
    launch, send = side.runner.launch, side.send

    def slowly(call, *args):
        time.sleep(launch_s)
        return call(*args)

    side.runner.launch = lambda plan: slowly(launch, plan)
    size = lambda layers, count: len(layers) * 2 * 8 * count  # noqa: E731
    feeder = Feeder(side.runner, lambda layers, pages: slowly(send, layers, pages), size)
    return replace(side, runner=feeder, send=feeder.send, feeder=feeder)


def fill_side(
    *, pages=64, seqs=4, budget=16, context=120, policy="fcfs", chunk=None, limit=6, dice=None, chance=1.0, step_s=0.0
):
    """A PrefillSide, whose blocks under way hold `limit` pages of one group."""
    dice = dice or random.Random(0)
    runner = SlowRunner(pages, PAGE_SIZE, seqs, VOCAB, dice=dice, chance=chance, step_s=step_s)

    def send(group, pages):
        values = np.array([[runner.memory[slot] for slot in _slots(group, page)] for page in pages], np.uint64)
        return Later(values.T.reshape(1, 2, -1, 1, 1, 1).copy(), dice, chance)

    scheduler = _scheduler(pages, seqs, budget, context, policy, chunk)
    return PrefillSide(scheduler, runner, send, GROUPS, 4, 16 * limit)


def two_sides(*, seed=0, chance=0.5, decode_pages=64, prefill_pages=64, decode_seqs=6, prefill_seqs=4, **more):
    """Both in this process."""
    dice = random.Random(seed)
    limit, chunk, feeds = more.pop("limit", 6), more.pop("chunk", None), more.pop("feeds", False)
    side = fill_side(pages=prefill_pages, seqs=prefill_seqs, chunk=chunk, limit=limit, dice=dice, chance=chance, **more)
    return decode_side(fed(side) if feeds else side, pages=decode_pages, seqs=decode_seqs, dice=dice, **more)


def peers(addresses, **settings):
    """The decode server's end of workers at these addresses."""
    config = DisaggregationConfig(role="decode", workers=addresses, **settings)
    dice = random.Random(0)
    form = Form(1, 1, 1, np.dtype(np.uint64), lambda pages: Later(pages, dice, 0.3))
    return PrefillPeers(config, Hello(VERSION, MODEL, PAGE_SIZE), form)


def worker(address, **more):
    silent_s = more.pop("silent_s", 10.0)
    return PrefillWorker(fill_side(**more), None, bind(address), MODEL, silent_s)


def whole(engine):
    """Nothing is left on either side."""
    engine.check()
    assert not engine.has_work
    assert not engine._handoffs
    sides = [engine.decode, engine.prefill] if isinstance(engine.prefill, PrefillSide) else [engine.decode]
    for pool in (side.scheduler.pool for side in sides):
        assert pool.num_held == 0
        assert pool.num_free + pool.num_cached == pool.num_pages


def recover(engine, sequences):
    """What the engine's loop does after a step that raised."""
    for sequence in sequences:
        if not sequence.finished:
            engine.scheduler.finish(sequence, FinishReason.ERROR)
    engine.scheduler.cache.evict(engine.scheduler.pool.num_cached)
    engine.check()


if __name__ == "__main__":
    listening = worker(sys.argv[1], step_s=float(sys.argv[2]))
    print("listening", flush=True)
    listening.run()
