"""Embeddings between steps: a prompt's hidden states, computed in chunks on pages lent by the pool, then pooled.

In: token ids and a kind of pooling. Out: a generator the loop advances once a turn, whose value is the vector. The
executables are those of prefill, so nothing new is compiled. Knows nothing of queues, texts or HTTP.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jaxllm.engine.scheduler import Scheduler

POOLINGS = ("mean", "last")


class HiddenRunner(Protocol):
    """What embedding needs of a runner."""

    def hidden_states(self, token_ids: Sequence[int], start: int, pages: Sequence[int]) -> NDArray[np.float32]: ...


def embed(
    runner: HiddenRunner, scheduler: Scheduler, borrowed: set[int], token_ids: Sequence[int], pooling: str
) -> Generator[None, None, list[float]]:
    """The L2-normalised vector. `borrowed` holds the pages while they are not the scheduler's.

    It waits for pages rather than preempt. Where one sequence could come to need them, it does not let go of the turn.
    """
    pool = scheduler.pool
    need, longest = pool.pages_for(len(token_ids)), pool.pages_for(scheduler.config.max_model_len)
    while pool.num_free + pool.num_cached < need:
        yield
    if pool.num_free < need:
        scheduler.cache.evict(need - pool.num_free)
    tight = pool.num_free + pool.num_cached - need < longest
    pages = pool.allocate(need)
    borrowed.update(pages)
    try:
        chunk = scheduler.config.max_prefill_chunk or scheduler.config.token_budget
        total, last = 0.0, np.zeros(0, np.float32)
        for start in range(0, len(token_ids), chunk):
            hidden = runner.hidden_states(token_ids[start : start + chunk], start, pages)
            total, last = total + hidden.sum(axis=0, dtype=np.float64), hidden[-1]
            if not tight:
                yield
    finally:
        borrowed.difference_update(pages)
        pool.free(pages)
    vector = np.asarray(last if pooling == "last" else total / len(token_ids), np.float64)
    if not np.isfinite(vector).all():
        raise FloatingPointError("the hidden states of this text are not finite")
    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).tolist()
