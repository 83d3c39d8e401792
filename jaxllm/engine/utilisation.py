"""How well steps use the device: their work by the roofline's count and their time, added up by phase; and from both,
how long a step will take at the least.

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
WORTH_S = 0.04  # a step as long as that is worth waiting for
AHEAD, AHEAD_S, LONGEST_WAIT_S = 0.15, 0.01, 0.5  # how long before its end the next is launched: a share, and seconds
FADES = 0.995  # a step, so that one reading that was too good is forgotten


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

    _flops_per_s: float = 0.0  # the best of late

    def collected(self, plan: StepPlan, launched_s: float, now: float) -> None:
        """Called once a dispatch, in their order."""
        seconds, self._ended_s = now - max(launched_s, self._ended_s), now
        work, decode, metrics = *self._work(plan), self.metrics
        if decode:
            metrics.decode_step_s += seconds
            metrics.decode_flops += work.flops
            metrics.decode_bytes += work.bytes
            return
        metrics.prefill_step_s += seconds
        metrics.prefill_flops += work.flops
        metrics.prefill_bytes += work.bytes
        if seconds >= WORTH_S:
            self._flops_per_s = max(work.flops / seconds, self._flops_per_s * FADES)

    def launch_by(self, plan: StepPlan, launched_s: float) -> float:
        """When the step behind this one, which runs next, is to be launched so that the device need not wait for it.

        0.0, or in the past: at once, as behind any step of decodes. No step is faster than the best so far.
        """
        if plan.decode_only or not self._flops_per_s:
            return 0.0
        least = self._work(plan)[0].flops / self._flops_per_s
        if least < WORTH_S:
            return 0.0
        return max(launched_s, self._ended_s) + min(least * (1 - AHEAD) - AHEAD_S, LONGEST_WAIT_S)

    def _work(self, plan: StepPlan) -> tuple[Work, bool]:
        """And whether every row computes one token."""
        rows = plan.rows
        starts, counts = [row[1] for row in rows], [row[2] for row in rows]  # by place: names take half as long again
        tokens = sum(counts)
        decode = tokens == len(rows)
        sampled = len(rows) if decode else sum([row[3] for row in rows])
        work = Work(0, 0)
        for later in range(plan.steps):
            at = [start + later for start in starts] if later else starts
            seen = [seen_by(at, counts, window, decode=decode) for window, _ in self.cost.windows]
            work += self.cost(tokens, sampled, seen, decode=decode)
        return work, decode
