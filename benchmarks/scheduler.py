"""Host time of a step: microseconds per schedule() + commit() with every row decoding. No JAX, no device.

    python -m benchmarks.scheduler [--rows 256] [--context 1024] [--steps 500]

The rows start with `context` tokens computed; each step adds one token to each, so that pages are asked for and full
ones are hashed as in a real run. Reports the median, the mean and the worst step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

from jaxllm.core import Request, RowResult, SampledToken, SamplingParams, Sequence
from jaxllm.engine.cache.hashed import NoPrefixCache, PrefixCache
from jaxllm.engine.cache.pages import PagePool
from jaxllm.engine.limits import Limits
from jaxllm.engine.scheduler import Scheduler

VOCAB = 151_936


def running_scheduler(rows: int, context: int, steps: int, page_size: int, *, caching: bool) -> Scheduler:
    """A scheduler with `rows` sequences that have computed their prompts of `context` tokens."""
    limit = context + steps + 2
    pool = PagePool(rows * -(-limit // page_size), page_size)
    config = Limits(token_budget=rows * context, max_num_seqs=rows, page_size=page_size, max_model_len=limit + 1)
    scheduler = Scheduler(config, pool, PrefixCache(pool) if caching else NoPrefixCache())
    params = SamplingParams(max_tokens=None, stop_token_ids=(VOCAB + 1,))
    for row in range(rows):
        prompt = tuple((row * context + place) % VOCAB for place in range(context))
        scheduler.add(Sequence(Request(id=str(row), prompt_token_ids=prompt, params=params, eos_token_ids=(VOCAB,))))
    step(scheduler, 0)
    return scheduler


def step(scheduler: Scheduler, token: int) -> tuple[float, float]:
    """One step with an instant runner; seconds of schedule and of commit."""
    start = time.perf_counter()
    plan = scheduler.schedule()
    scheduled = time.perf_counter()
    assert plan is not None
    results = [RowResult(SampledToken((token + place) % VOCAB)) for place in range(len(plan.rows))]
    ran = time.perf_counter()
    scheduler.commit(plan, results)
    return scheduled - start, time.perf_counter() - ran


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--page-size", type=int, default=16)
    args = parser.parse_args()
    gc.freeze()
    for caching in (False, True):
        scheduler = running_scheduler(args.rows, args.context, args.steps, args.page_size, caching=caching)
        times = [step(scheduler, number) for number in range(args.steps)]
        assert scheduler.num_running == args.rows
        assert scheduler.metrics.preemptions == 0
        totals = [1e6 * (schedule + commit) for schedule, commit in times]
        schedule_us = 1e6 * statistics.median(schedule for schedule, _ in times)
        commit_us = 1e6 * statistics.median(commit for _, commit in times)
        print(
            f"prefix cache {'on ' if caching else 'off'}: {args.rows} decode rows: "
            f"median {statistics.median(totals):.0f} us (schedule {schedule_us:.0f}, commit {commit_us:.0f}), "
            f"mean {statistics.mean(totals):.0f}, worst {max(totals):.0f}"
        )


if __name__ == "__main__":
    main()
