"""How well steps use the device: their work by the roofline's count and their time, added up by phase.

In: plans whose results have come, and when. Out: counters of Metrics; shares of a device's peak are made where the peak
is known. A step in which every row computes one token is decode; any other is prefill, the decode rows in it included.
A step lasts from its launch, or from the end of the step before it if that came later, until its results are on the
host: the time that the host keeps the device waiting between steps in a row is in it, idle time is not.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from jaxllm.core import StepPlan
from jaxllm.engine.metrics import Metrics
from pallas_kernels.roofline import StepCost, Work, visible

Ints = SequenceOf[int]


def seen_by(starts: Ints, counts: Ints, window: int | None, *, decode: bool) -> tuple[int, int]:
    """(keys read, pairs of query and key). Rows of one token, which are most, cost one sum together."""
    if window is not None:
        return visible([(count, start + count) for start, count in zip(starts, counts)], window)[:2]
    chunks = [] if decode else [(count, start + count) for start, count in zip(starts, counts) if count != 1]
    keys, pairs, _ = visible(chunks)
    singles = sum(starts) + sum(count - end for count, end in chunks) + len(starts) - len(chunks)
    return singles + keys, singles + pairs


@dataclass
class StepMeter:
    cost: StepCost
    metrics: Metrics
    _ended_s: float = 0.0

    def collected(self, plan: StepPlan, launched_s: float, now: float) -> None:
        """Called once a dispatch, in their order."""
        seconds, self._ended_s = now - max(launched_s, self._ended_s), now
        rows, metrics = plan.rows, self.metrics
        starts, counts = [row[1] for row in rows], [row[2] for row in rows]  # by place: names take half as long again
        tokens = sum(counts)
        decode = tokens == len(rows)
        sampled = len(rows) if decode else sum([row[3] for row in rows])
        work = Work(0, 0)
        for later in range(plan.steps):
            at = [start + later for start in starts] if later else starts
            seen = [seen_by(at, counts, window, decode=decode) for window, _ in self.cost.windows]
            work += self.cost(tokens, sampled, seen, decode=decode)
        if decode:
            metrics.decode_step_s += seconds
            metrics.decode_flops += work.flops
            metrics.decode_bytes += work.bytes
        else:
            metrics.prefill_step_s += seconds
            metrics.prefill_flops += work.flops
            metrics.prefill_bytes += work.bytes
