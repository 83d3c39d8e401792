"""A thread that gives the prefill side's device its work, so that tokens never wait for what that costs the host.

A step of a prompt takes 3 to 11 ms to launch (its CUDA graph is recorded anew for new addresses), as long as one or two
decode steps, whose next launch would be late by as much. In: a runner, and how a block is taken out and carried. Out:
the same with answers that come later, in the order of the calls: a step's pages are taken out right behind it. Whoever
launches leaves what the step is made of alone until it `settles`. Knows nothing of schedules or of who wants pages.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from jaxllm.core import RowResult
from jaxllm.engine.disagg.handoff import Pages


@dataclass(frozen=True)
class FedStep:
    """A step that is being launched, or was."""

    launched: Future[Any]

    @property
    def waits(self) -> bool:
        return False  # for a mask: a prompt's step has no token before it

    @property
    def ready(self) -> bool:
        """Done, or failed: whoever collects it is told."""
        return self.launched.done() and (self.launched.exception() is not None or self.launched.result().ready)


@dataclass(frozen=True)
class FedPages:
    """A block that will be taken out, or is on its way."""

    block: Future[Any]
    nbytes: int

    def is_ready(self) -> bool:
        return self.block.done() and (self.block.exception() is not None or self.block.result().is_ready())

    def block_until_ready(self) -> Any:
        return self.block.result().block_until_ready()


@dataclass
class Feeder:
    """Stands in for a runner, and for how blocks are carried."""

    runner: Any  # a StepRunner; only this thread calls its `launch`
    carry: Callable[[range, list[int]], Pages]  # takes a block out and sends it
    block_bytes: Callable[[range, int], int]  # of so many pages
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "prefill-feeder"))
    _launch: Future[Any] | None = None

    @property
    def launching(self) -> bool:
        return self._launch is not None and not self._launch.done()

    def settle(self) -> None:
        """Waits for the launch under way."""
        if self._launch is not None:
            wait([self._launch])

    def launch(self, plan: Any) -> FedStep:
        self._launch = self._thread.submit(self.runner.launch, plan)
        return FedStep(self._launch)

    def collect(self, launched: Any) -> list[RowResult]:
        return self.runner.collect(launched.launched.result())

    def send(self, layers: range, pages: list[int]) -> FedPages:
        return FedPages(self._thread.submit(self.carry, layers, pages), self.block_bytes(layers, len(pages)))
