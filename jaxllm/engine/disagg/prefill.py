"""The prefill side: prompts in; their pages, chunk by chunk and some layers at a time, and one token each out.

Owns a scheduler and a runner like an engine's, but never waits for a step while somebody else has work: two steps are
on the device, and are read when they are done. While somebody does, a turn launches one step, takes out one block and
hands over one: what a turn costs the host, and a block the other device, is the wait of every token there. A step's
pages are taken out right behind it in the device's own order, so that a prompt's pages travel while its next chunk is
computed; as a step is one executable, no layer leaves before the step ends. Pages that wait to be taken are held here;
blocks under way are bounded in bytes. Knows nothing of who wants the pages: `send` brings a block there.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxllm.core import FinishReason, Request, RowResult, SampledToken, Sequence, StepPlan, TokenLogprobs, TokenOutput
from jaxllm.engine.disagg.feeder import Feeder
from jaxllm.engine.disagg.handoff import FirstToken, Item, Key, PageBlock, Pages, PrefillFailed, twin
from jaxllm.engine.engine import StepOnDevice, StepRunner
from jaxllm.engine.retry import is_device_lost
from jaxllm.engine.scheduler import Scheduler

log = logging.getLogger(__name__)
STEPS_AHEAD = 2
BLOCKS = 1 << 30  # of a turn in which nobody else has work: all there are
STEP_FAILED = "engine_error: a prefill step failed; this request was ended by it"


@dataclass(eq=False)
class _Job:
    """A prompt that is being computed."""

    key: Key
    twin: Sequence
    next_page: int  # the first that is not queued yet
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True)
class _Wanted:
    """One page that waits to be taken out; it is held until then."""

    key: Key
    number: int  # among its sequence's pages
    page: int


@dataclass
class PrefillSide:
    """Satisfies Prefills where `send` ends in this process."""

    scheduler: Scheduler
    runner: StepRunner | Feeder
    send: Callable[[range, list[int]], Pages]  # takes pages of some layers out and begins to bring them over
    groups: tuple[range, ...]
    block_pages: int  # most pages of a block
    limit_bytes: int  # of blocks under way
    feeder: Feeder | None = None  # that is `runner`, and whose is `send`
    moved_bytes: int = 0
    moved_pages: int = 0
    _jobs: dict[Key, _Job] = field(default_factory=dict)
    _keys: dict[Sequence, Key] = field(default_factory=dict)
    _steps: deque[tuple[StepPlan, StepOnDevice]] = field(default_factory=deque)
    _wanted: deque[_Wanted] = field(default_factory=deque)
    _batch: tuple[_Wanted, ...] = ()  # whose layers are being taken, group by group
    _next_group: int = 0
    _under_way: deque[PageBlock] = field(default_factory=deque)
    _bytes: int = 0  # of blocks that have not landed
    _failed_in_a_row: int = 0

    # ---- requests ----

    def check_fits(self, request: Request) -> None:
        self.scheduler.check_fits(request)

    def begin(self, key: Key, sequence: Sequence, first_page: int) -> None:
        own = twin(sequence)
        self.scheduler.add(own)
        self._jobs[key], self._keys[own] = _Job(key, own, first_page), key

    def cancel(self, key: Key) -> None:
        """Takes a prompt back, wherever it is; what is under way of it goes on and is ignored."""
        job = self._jobs.pop(key, None)
        if job is not None:
            self._settle()
            del self._keys[job.twin]
            self.scheduler.finish(job.twin, FinishReason.ABORT)
        self._drop(lambda wanted: wanted.key == key)

    def _drop(self, unwanted: Callable[[_Wanted], bool]) -> None:
        gone = [wanted for wanted in self._wanted if unwanted(wanted)]
        if gone:
            self._wanted = deque(wanted for wanted in self._wanted if not unwanted(wanted))
            self.scheduler.pool.free([wanted.page for wanted in gone])

    # ---- a turn ----

    def turn(self, wait: bool) -> list[Item]:
        found: list[Item] = []
        most = BLOCKS if wait else 1
        try:
            if wait:
                self._settle()
            while not self._launching and len(self._steps) < STEPS_AHEAD and self._may_schedule and self._launch():
                if wait:
                    self._settle()
            taken = self._take(most)
            self._deliver(found, wait, most)
            if not self._launching:
                self._collect(found, wait and not found and not self._under_way)
            self._take(most - taken)
        except Exception as error:
            log.exception("a prefill step failed; %d prompts end with an error", len(self._jobs))
            again = self._failed_in_a_row
            found += self._fail_all()  # first: a step launched behind one that failed in its thread is void too
            if is_device_lost(error) or again:
                lost = (item.pages.nbytes for item in found if isinstance(item, PageBlock))  # nobody gets them
                self.release(sum(lost))
                raise
        return found

    @property
    def moving(self) -> bool:
        return bool(self._wanted or self._batch)

    @property
    def _launching(self) -> bool:
        """What a step is made of must stay as it is."""
        return self.feeder is not None and self.feeder.launching

    def _settle(self) -> None:
        if self.feeder is not None:
            self.feeder.settle()

    @property
    def _may_schedule(self) -> bool:
        """The scheduler fails a sequence that is alone and lacks pages; here it may have to wait for blocks."""
        pool, scheduler = self.scheduler.pool, self.scheduler
        if scheduler.num_running or not (self._wanted or self._batch):
            return scheduler.has_work
        return pool.num_free + pool.num_cached >= pool.pages_for(scheduler.config.max_model_len)

    def _launch(self) -> bool:
        plan = self.scheduler.schedule()
        if plan is None:
            return False
        self._steps.append((plan, self.runner.launch(plan)))
        size = self.scheduler.pool.page_size
        for row in plan.rows:
            end = row.start + row.count
            self._want(self._jobs[self._keys[row.sequence]], -(-end // size) if row.sample else end // size)
        return True

    def _want(self, job: _Job, end: int) -> None:
        """Pages up to `end` are as they will be once the device has done what it was given."""
        numbers = range(job.next_page, end)
        pages = [job.twin.pages[number] for number in numbers]
        self.scheduler.pool.share(pages)
        self._wanted += [_Wanted(job.key, number, page) for number, page in zip(numbers, pages)]
        job.next_page = max(job.next_page, end)

    def _collect(self, found: list[Item], wait: bool) -> None:
        if not self._steps and self.scheduler.has_work:
            found += self._tell(self.scheduler.commit(None, []))
        while self._steps and (wait or self._steps[0][1].ready):
            plan, launched = self._steps.popleft()
            found += self._tell(self.scheduler.commit(plan, self.runner.collect(launched)))
            self._failed_in_a_row, wait = 0, False

    def _tell(self, outputs: list[TokenOutput]) -> list[Item]:
        found: list[Item] = []
        for output in outputs:
            key = self._keys.get(output.sequence)
            if key is None:
                continue
            job = self._jobs[key]
            job.prompt_logprobs += output.prompt_logprobs
            if output.finish_reason is None:
                continue
            del self._jobs[key], self._keys[output.sequence]
            if output.token_id is None:
                self._drop(lambda wanted, key=key: wanted.key == key)
                found.append(PrefillFailed(key, output.error or STEP_FAILED))
            else:
                token = SampledToken(output.token_id, output.logprobs)
                result = RowResult(token, tuple(job.prompt_logprobs))
                found.append(FirstToken(key, result, output.sequence.num_cached))
        return found

    def _fail_all(self) -> list[Item]:
        """A step raised: every prompt here ends, and so does every one whose pages have not all left."""
        self._failed_in_a_row += 1
        self._settle()
        keys = dict.fromkeys([*self._jobs, *(wanted.key for wanted in (*self._wanted, *self._batch))])
        keys |= dict.fromkeys(key for block in self._under_way for key, _ in block.entries)
        self._steps.clear()
        for key in keys:
            self.cancel(key)
        self._drop(lambda wanted: True)
        self.scheduler.pool.free([wanted.page for wanted in self._batch])
        self._batch, self._next_group = (), 0
        self._bytes -= sum(block.pages.nbytes for block in self._under_way)
        self._under_way.clear()
        self.forget_cached()
        return [PrefillFailed(key, STEP_FAILED) for key in keys]

    # ---- pages on their way ----

    def _take(self, most: int) -> int:
        """Takes out `most` blocks of what is wanted, as far as the limit goes; one always may be under way."""
        taken = 0
        while self._bytes < self.limit_bytes and taken < most:
            if not self._batch:
                count = min(len(self._wanted), self.block_pages)
                self._batch = tuple(self._wanted.popleft() for _ in range(count))
                if not self._batch:
                    break
            layers = self.groups[self._next_group]
            pages = self.send(layers, [wanted.page for wanted in self._batch])
            entries = [(wanted.key, wanted.number) for wanted in self._batch]
            self._under_way.append(PageBlock(layers, entries, pages))
            self._bytes += pages.nbytes
            self.moved_bytes += pages.nbytes
            self._next_group += 1
            taken += 1
            if self._next_group == len(self.groups):
                self.scheduler.pool.free([wanted.page for wanted in self._batch])
                self.moved_pages += len(self._batch)
                self._batch, self._next_group = (), 0
        return taken

    def _deliver(self, found: list[Item], wait: bool, most: int) -> None:
        """`most` blocks that are where they are wanted, in the order in which they were taken."""
        while self._under_way and len(found) < most and (wait or self._under_way[0].pages.is_ready()):
            self._under_way[0].pages.block_until_ready()  # raises when the step before it failed: nothing bad is put
            found.append(self._under_way.popleft())
            wait = False

    def landed(self, block: PageBlock) -> None:
        self.release(block.pages.nbytes)

    def release(self, num_bytes: int) -> None:
        """So many bytes of blocks are under way no more."""
        self._bytes -= num_bytes

    @property
    def busy(self) -> bool:
        """The device has work of this side's: waiting for an item makes sense."""
        return bool(self._steps or self._under_way)

    # ---- accounts ----

    def stats(self) -> dict[str, float]:
        pool = self.scheduler.pool
        return {
            "prefill_running": self.scheduler.num_running,
            "prefill_waiting": self.scheduler.num_waiting,
            "prefill_held_pages": pool.num_held,
            "prefill_cached_pages": pool.num_cached,
            "prefill_total_pages": pool.num_pages,
            "transferred_pages": self.moved_pages,
            "transferred_bytes": self.moved_bytes,
        }

    def forget_cached(self) -> None:
        self.scheduler.cache.evict(self.scheduler.pool.num_cached)

    def check(self) -> None:
        self.scheduler.check([wanted.page for wanted in (*self._wanted, *self._batch)])
        assert set(self._keys.values()) == set(self._jobs)
        assert self._bytes >= 0
