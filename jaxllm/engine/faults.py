"""Fault points: make a chosen step of a runner fail in a chosen way, so that tests can see the engine survive it.

In: a text such as `step:37:nan_row=2`, several joined by commas, and a runner. Out: a runner that does the same except
at those steps (counted from 1). Knows nothing of schedulers, processes or HTTP. Kinds:
  nan_row=R   row R of the step reports non-finite logits        host_row=R  sampling row R fails on the host
  raise=N     the step and the N-1 after it raise                hang=S      the step sleeps S seconds
  exit=C      the process ends at once with code C
  oom=N       the step and the N-1 launches after it find no device memory
  lost=1      the step finds the device gone
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from jaxllm.config import ConfigError
from jaxllm.core import RowResult, SampledToken, StepPlan
from jaxllm.engine.engine import StepOnDevice, StepRunner

NUMERICAL = "numerical_error: the model's logits for this sequence are not finite"
HOST = "internal_error: choosing this sequence's token failed"
KINDS = ("nan_row", "host_row", "raise", "hang", "exit", "oom", "lost")


class InjectedFault(RuntimeError):
    """Raised by a fault point."""


@dataclass(frozen=True)
class Fault:
    step: int
    kind: str
    value: float


def parse_faults(text: str) -> tuple[Fault, ...]:
    """ConfigError when a fault is not `step:N:kind=value`."""
    return tuple(_parse(part.strip()) for part in text.split(",") if part.strip())


def _parse(text: str) -> Fault:
    found = re.fullmatch(rf"step:([1-9]\d{{0,8}}):({'|'.join(KINDS)})=(\d+(?:\.\d+)?)", text)
    if found is None:
        raise ConfigError(f"fault = {text!r}: must be step:N:kind=value with a kind of {', '.join(KINDS)}")
    return Fault(int(found[1]), found[2], float(found[3]))


@dataclass
class FaultyStep:
    """A launched step and what is to go wrong with it."""

    inner: StepOnDevice
    due: list[Fault]

    @property
    def waits(self) -> bool:
        return self.inner.waits

    @property
    def ready(self) -> bool:
        return self.inner.ready


@dataclass
class FaultyRunner:
    """A runner with faults; satisfies StepRunner."""

    inner: StepRunner
    faults: tuple[Fault, ...]
    step: int = field(default=0, init=False)

    def launch(self, plan: StepPlan) -> FaultyStep:
        self.step += 1
        due = [fault for fault in self.faults if fault.step == self.step]
        for fault in self.faults:
            if fault.kind == "raise" and fault.step <= self.step < fault.step + fault.value:
                raise InjectedFault(f"fault point: step {self.step}")
            if fault.kind == "oom" and fault.step <= self.step < fault.step + fault.value:
                raise InjectedFault("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")
        for fault in due:
            if fault.kind == "lost":
                raise InjectedFault("INTERNAL: CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure")
            if fault.kind == "hang":
                time.sleep(fault.value)
            if fault.kind == "exit":
                os._exit(int(fault.value))
        return FaultyStep(self.inner.launch(plan), due)

    def choose(self, launched: FaultyStep) -> None:
        self.inner.choose(launched.inner)

    def collect(self, launched: FaultyStep) -> list[RowResult]:
        results = self.inner.collect(launched.inner)
        for fault in launched.due:
            if fault.kind in ("nan_row", "host_row") and fault.value < len(results):
                row = int(fault.value)
                error = NUMERICAL if fault.kind == "nan_row" else HOST
                results[row] = RowResult(SampledToken(token_id=-1, error=error), results[row].prompt_logprobs)
        return results

    def hidden_states(self, token_ids: Sequence[int], start: int, pages: Sequence[int]) -> NDArray[np.float32]:
        return self.inner.hidden_states(token_ids, start, pages)
