"""A step that the device has no memory for is launched again as two halves: smaller buckets need less workspace.

In: a runner and a plan. Out: the same results. Rows know nothing of each other, so halves say what the whole would have
said. Only a refusal at launch can be retried: later the pages have been given away. Knows nothing of policy.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxllm.core import RowResult, StepPlan
from jaxllm.engine.engine import StepOnDevice, StepRunner

log = logging.getLogger(__name__)

NO_MEMORY = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
DEVICE_LOST = ("DEVICE_LOST", "CUDA_ERROR_", "CUDNN_STATUS_EXECUTION_FAILED", "device is lost", "Xid")


def is_no_memory(error: BaseException) -> bool:
    return any(word in str(error) for word in NO_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """Nothing more will come of this process: it must start again."""
    return not is_no_memory(error) and any(word in str(error) for word in DEVICE_LOST)


@dataclass
class Halves:
    """Steps launched one after the other in place of one."""

    parts: list[Any]

    @property
    def waits(self) -> bool:
        return any(part.waits for part in self.parts)

    @property
    def ready(self) -> bool:
        return all(part.ready for part in self.parts)


@dataclass
class ShrinkingRunner:
    """A runner that gets by with less memory once; satisfies StepRunner."""

    inner: StepRunner
    retries: int = field(default=0, init=False)

    def launch(self, plan: StepPlan) -> StepOnDevice:
        try:
            return self.inner.launch(plan)
        except Exception as error:
            if not is_no_memory(error) or len(plan.rows) < 2:
                raise
            log.warning("no device memory for a step of %d sequences: again as two halves", len(plan.rows))
            self.retries += 1
        middle = len(plan.rows) // 2
        return Halves([self.inner.launch(_part(plan, rows)) for rows in (plan.rows[:middle], plan.rows[middle:])])

    def choose(self, launched: Any) -> None:
        for part in launched.parts if isinstance(launched, Halves) else (launched,):
            if part.waits:
                self.inner.choose(part)

    def collect(self, launched: Any) -> list[RowResult]:
        parts = launched.parts if isinstance(launched, Halves) else (launched,)
        return [result for part in parts for result in self.inner.collect(part)]

    def hidden_states(self, token_ids: Sequence[int], start: int, pages: Sequence[int]) -> NDArray[np.float32]:
        return self.inner.hidden_states(token_ids, start, pages)


def _part(plan: StepPlan, rows: tuple[Any, ...]) -> StepPlan:
    here = {id(row.sequence) for row in rows}
    admitted = tuple(one for one in plan.admitted if id(one) in here)
    return dataclasses.replace(plan, rows=rows, admitted=admitted)
