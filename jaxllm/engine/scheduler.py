"""Decides what every step computes, and is the one place where a sequence's state advances.

In: sequences (`add`), step results (`commit`), endings (`abort`, `finish`). Out: StepPlans and TokenOutputs. Knows
nothing of models, devices, text or clocks.

There are no phases. A sequence has tokens computed and tokens wanted; a step spends a token budget moving the first
toward the second, and where they meet one more token is sampled. Rules:
  order      running sequences that need one token (decodes) come first, then longer ones (prefills) by policy, then
             waiting ones by policy; the first waiting one that does not fit blocks those behind it. A step takes
             less than its budget where the rest would be padding (jaxllm.engine.buckets).
  pages      a sequence gets the pages of all its tokens when admitted, so only decodes ask for more. Admission leaves
             one spare page for every running sequence that can still grow: what is admitted is not preempted before
             every running sequence has got another page.
  preemption when a decode finds no page, the last running sequence by policy gives up its pages and waits again. Its
             tokens stay, and recomputing them emits nothing. The first by policy is never preempted for another, so
             something always finishes.
  overlap    a step may be scheduled while the one before it is still on the device: a sequence then counts as having
             what that step computes and samples. A sequence that turns out to have ended is ignored at commit, and
             one that was preempted keeps its token and nothing else.
  several    decode steps go in one dispatch while nothing can change between them; see _steps_at_once. A sequence that
             ends in the midst is ignored from there on, as above.
  arrivals   a sequence whose prompt another engine computes is admitted like any other and then not scheduled until
             it has arrived. Preempted before that, it is awaited anew; after it, it is computed here.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection

from jaxllm.core import (
    FinishReason,
    Request,
    RequestError,
    RowResult,
    SampledToken,
    ScheduledRow,
    Sequence,
    StepPlan,
    TokenLogprobs,
    TokenOutput,
)
from jaxllm.engine.cache.pages import PagePool
from jaxllm.engine.cache.prefix import PrefixIndex
from jaxllm.engine.entry import Entry
from jaxllm.engine.limits import Limits
from jaxllm.engine.metrics import Metrics
from jaxllm.engine.policy import Policy, SequenceQueue, fcfs, longest_prefix

LOOK_AHEAD, PATIENCE = 16, 32  # of admission by longest prefix: see Scheduler._next_waiting


class Scheduler:
    def __init__(
        self,
        config: Limits,
        pool: PagePool,
        cache: PrefixIndex,
        policy: Policy = fcfs,
        metrics: Metrics | None = None,
    ) -> None:
        if config.page_size != pool.page_size:
            raise ValueError(f"page_size = {config.page_size}: the page pool has pages of {pool.page_size} tokens")
        self.config, self.pool, self.cache = config, pool, cache
        self.metrics = metrics or Metrics()
        self._policy = policy
        self._max_chunk = config.max_prefill_chunk or config.token_budget
        self._num_added = 0
        self._passed_over = 0  # admissions since the first in line was the one admitted
        self._entries: dict[Sequence, Entry] = {}  # every unfinished sequence
        self._requests: dict[str, list[Sequence]] = {}
        self._running, self._waiting = SequenceQueue(), SequenceQueue()
        self._held: dict[str, list[Sequence]] = {}  # siblings waiting for the first of them to compute the prompt
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self.arriving: dict[Sequence, None] = {}  # running, in the order of admission; their pages are being filled
        self._arrived: list[Sequence] = []  # since the last step was scheduled
        self._failed: list[TokenOutput] = []  # news that no row of the current plan will carry

    @property
    def has_work(self) -> bool:
        return bool(self._entries or self._failed)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._entries) - len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence in line. Raises RequestError when it could never run."""
        request, live = sequence.request, self._requests.get(sequence.request.id, [])
        if any(other.index == sequence.index for other in live):
            raise RequestError("id", request.id, f"already in use by a running request (index {sequence.index})")
        self.check_fits(request)
        key = self._policy(sequence, self._num_added)
        self._num_added += 1
        # The last token's page is never needed.
        self._entries[sequence] = Entry.of(sequence, key, min(self.config.max_model_len, self._capacity + 1))
        if live and self._worth_holding(live[0]):
            self._held.setdefault(request.id, []).append(sequence)
        else:
            self._waiting.push(key, sequence)
        self._requests.setdefault(request.id, live).append(sequence)

    def abort(self, request_id: str) -> list[Sequence]:
        """Ends every unfinished sequence of a request, wherever it is; returns them. Unknown ids end nothing."""
        sequences = list(self._requests.get(request_id, ()))
        for sequence in sequences:
            self.finish(sequence, FinishReason.ABORT)
        return sequences

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends a sequence and returns all it has. Does nothing when it has ended already."""
        entry = self._entries.pop(sequence, None)
        if entry is None:
            return
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        if reason is FinishReason.ERROR:
            self.cache.discard(sequence)
        held = self._held.get(sequence.request.id, [])
        if sequence.row is not None:
            self._running.remove(entry.key)
            self._vacate(sequence)
        elif sequence in held:
            held.remove(sequence)
        else:
            self._waiting.remove(entry.key)
        self.cache.release(sequence)
        self.metrics.finished[reason] += 1
        live = self._requests[sequence.request.id]
        live.remove(sequence)
        if not live:
            del self._requests[sequence.request.id]
        if held and len(held) == len(live):  # nobody is left to compute the prompt for them
            first = held.pop(0)
            self._waiting.push(self._entries[first].key, first)
        if not held:
            self._held.pop(sequence.request.id, None)

    def schedule(self) -> StepPlan | None:
        """The next step, or None when there is nothing to compute."""
        rows: list[ScheduledRow] = []
        preempted: list[Sequence] = []
        steps = self._steps_at_once()
        prefills = self._schedule_decodes(rows, preempted, steps)
        budget = self._step_budget(len(rows), prefills) - len(rows)
        for sequence in prefills:
            if budget:
                budget -= self._schedule_chunk(rows, sequence, budget)
        # Pages are short after a preemption, and a row given up is not taken again within one plan.
        admitted = [] if preempted else self._admit(rows, budget)
        if self._arrived:
            admitted += [sequence for sequence in self._arrived if sequence.row is not None]
            self._arrived = []
        if not rows:
            return None
        return StepPlan(tuple(rows), tuple(admitted), tuple(preempted), steps)

    def commit(self, plan: StepPlan | None, results: list[RowResult]) -> list[TokenOutput]:
        """Applies a step's results, in plan order. Rows whose sequence has ended meanwhile are ignored."""
        outputs, self._failed = self._failed, []
        rows, steps = (plan.rows, plan.steps) if plan is not None else ((), 0)
        if len(rows) != len(results):
            raise ValueError(f"{len(results)} results for {len(rows)} scheduled rows")
        metrics, page_size = self.metrics, self.config.page_size
        for later, row, result in ((later, *pair) for later in range(steps) for pair in zip(rows, results)):
            sequence = row.sequence
            entry = self._entries.get(sequence)
            if entry is None:
                continue
            sampled = result.later[later - 1] if later else result.sampled
            if sampled is not None and sampled.error is not None:
                self.finish(sequence, FinishReason.ERROR)
                outputs.append(TokenOutput(sequence, None, finish_reason=FinishReason.ERROR, error=sampled.error))
                continue
            if row.turn == sequence.num_preempted:  # else its pages are gone, and it will compute this again
                sequence.num_computed = row.start + row.count + later
                if sequence.num_computed % page_size < row.count:
                    self.cache.insert(sequence)
            prompt_logprobs = self._new_prompt_logprobs(row, entry, result) if result.prompt_logprobs else ()
            if row.sample:
                if sampled is None:
                    raise ValueError(f"no sampled token for sequence {sequence.id}, which has computed all its tokens")
                sequence.num_pending -= 1
                outputs.append(self._append(sequence, entry, sampled, prompt_logprobs))
            elif prompt_logprobs:
                outputs.append(TokenOutput(sequence, None, prompt_logprobs=prompt_logprobs))
        if plan is not None:
            metrics.dispatches += 1
            metrics.steps += steps
            metrics.scheduled_tokens += plan.num_tokens * steps
        self._measure()
        return outputs

    def arrive(self, sequence: Sequence, result: RowResult, num_cached: int) -> TokenOutput | None:
        """An arriving sequence's pages hold its prompt, and this is its first token; None when it was taken back.

        `num_cached` prompt tokens were cached where the rest was computed.
        """
        entry, sampled = self._entries.get(sequence), result.sampled
        if entry is None or sequence not in self.arriving:
            return None
        if sampled is None or sampled.error is not None:
            raise ValueError(f"sequence {sequence.id} arrives without a token")
        del self.arriving[sequence]
        sequence.remote = False
        sequence.num_cached = max(sequence.num_cached, num_cached)
        sequence.num_computed = sequence.num_scheduled = sequence.num_prompt
        self.cache.insert(sequence)
        entry.num_prompt_logprobs = len(result.prompt_logprobs)
        self._arrived.append(sequence)
        return self._append(sequence, entry, sampled, result.prompt_logprobs)

    def check(self, others: Collection[int] = ()) -> None:
        """Raises AssertionError when the books do not balance. `others`: pages that somebody else holds."""
        self.pool.check()
        self.cache.check()
        self._running.check()
        self._waiting.check()
        holders: dict[int, int] = dict(Counter(others))
        rows = list(self._free_rows)
        for sequence in self._running:
            assert sequence.row is not None
            rows.append(sequence.row)
            assert len(set(sequence.pages)) == len(sequence.pages), f"{sequence.id} holds a page twice"
            for page in sequence.pages:
                holders[page] = holders.get(page, 0) + 1
            length = len(sequence.tokens)
            assert 0 <= sequence.num_computed < length < self._entries[sequence].max_len
            assert sequence.num_computed <= sequence.num_scheduled < length + sequence.num_pending + 1
            assert sequence.num_scheduled <= len(sequence.pages) * self.config.page_size, "computed tokens lack a page"
        assert {*self.arriving} <= {*self._running}, "a sequence arrives and does not run"
        held = [sequence for siblings in self._held.values() for sequence in siblings]
        for sequence in [*self._waiting, *held]:
            idle = sequence.row is None and not sequence.pages and not sequence.num_computed + sequence.num_scheduled
            assert idle, f"{sequence.id} waits and holds something"
        assert sorted(rows) == list(range(self.config.max_num_seqs)), "rows are lost or used twice"
        assert len(holders) == self.pool.num_held, f"{self.pool.num_held - len(holders)} pages leaked"
        for page, count in holders.items():
            assert self.pool.holders(page) == count, f"page {page}: {count} users, {self.pool.holders(page)} holders"
        known = {*self._running, *self._waiting, *held}
        assert known == set(self._entries)
        assert len(known) == len(self._running) + len(self._waiting) + len(held), "a sequence is in two places"
        assert known == {sequence for live in self._requests.values() for sequence in live}
        assert not any(sequence.finished for sequence in known)
        assert all(len(siblings) < len(self._requests[key]) for key, siblings in self._held.items()), "all are held"

    # What a step computes.

    def _steps_at_once(self) -> int:
        """Decode steps in the next dispatch: one, or `decode_steps` where nothing can change between them.

        Then every sequence runs and lacks one token, samples without the host, has so many tokens before its end, and
        gets the pages of all of them here.
        """
        steps, running, pool = self.config.decode_steps, self._running, self.pool
        if steps == 1 or len(running) > self.config.decode_steps_rows:
            return 1
        if self.arriving or len(self._entries) > len(running):
            return 1
        lacking: list[tuple[Sequence, int]] = []
        for sequence in running:
            entry, length = self._entries[sequence], len(sequence.tokens) + sequence.num_pending
            if sequence.num_pending and length >= entry.max_len:
                continue  # the token in flight is its last
            if length - sequence.num_scheduled > 1 or length + steps > entry.max_len:
                return 1
            if not entry.steady or len(sequence.tokens) < entry.min_len:
                return 1
            lacking.append((sequence, pool.pages_for(length + steps - 1) - len(sequence.pages)))
        if sum(max(0, count) for _, count in lacking) > pool.num_free + pool.num_cached:
            return 1
        for sequence, count in lacking:
            if count > 0:
                sequence.pages += self._take(count)
        return steps

    def _schedule_decodes(self, rows: list[ScheduledRow], preempted: list[Sequence], steps: int) -> list[Sequence]:
        """Schedules every running sequence that lacks one token, by policy; returns those that lack more.

        Preemption takes the last of them, which is never one that was looked at before.
        """
        page_size, running, entries, prefills = self.config.page_size, self._running, self._entries, []
        arriving, place = self.arriving, 0
        while place < len(running):
            sequence = running[place]
            place += 1
            if arriving and sequence in arriving:
                continue
            length, start = len(sequence.tokens) + sequence.num_pending, sequence.num_scheduled
            if length - start > 1:
                prefills.append(sequence)
            elif sequence.num_pending and length >= entries[sequence].max_len:
                continue  # the token in flight is its last
            elif length <= len(sequence.pages) * page_size or self._grow(sequence, preempted):
                rows.append(ScheduledRow(sequence, start, 1, True, sequence.num_preempted))
                sequence.num_scheduled = length + steps - 1
                sequence.num_pending += steps
        return prefills

    def _step_budget(self, decodes: int, prefills: list[Sequence]) -> int:
        running = (len(one.tokens) + one.num_pending - one.num_scheduled for one in prefills)
        waiting = (len(one.tokens) for one in itertools.islice(self._waiting, len(self._free_rows)))  # cached or not
        lengths = (min(length, self._max_chunk) for length in itertools.chain(running, waiting))
        return self.config.padding.budget(self.config.token_budget, decodes, lengths)

    def _schedule_chunk(self, rows: list[ScheduledRow], sequence: Sequence, budget: int) -> int:
        length, start = len(sequence.tokens) + sequence.num_pending, sequence.num_scheduled
        count = min(length - start, budget, self._max_chunk)
        samples = start + count == length
        rows.append(ScheduledRow(sequence, start, count, samples, sequence.num_preempted))
        sequence.num_scheduled = start + count
        sequence.num_pending += samples
        return count

    def _admit(self, rows: list[ScheduledRow], budget: int) -> list[Sequence]:
        admitted: list[Sequence] = []
        if not (budget and self._waiting and self._free_rows):
            return admitted
        spare = sum(map(self._can_grow, self._running))
        while budget and self._waiting and self._free_rows:
            sequence = self._next_waiting()
            if sequence.num_pending:  # just preempted: what it waits with is not known yet
                break
            entry = self._entries[sequence]
            pages = self._match(sequence, entry)
            wanted = self.pool.pages_for(len(sequence.tokens))
            grows = wanted * self.config.page_size < entry.max_len - 1
            left = self.pool.num_free + self.pool.num_cached - self.pool.num_unheld(pages) - (wanted - len(pages))
            if left < (spare + grows if self._running else 0):
                if self._running:
                    break
                self._fail(sequence, f"its {len(sequence.tokens)} tokens need {wanted} pages, {left + wanted} are left")
                continue
            self._passed_over = 0 if sequence is self._waiting[0] else self._passed_over + 1
            self._waiting.remove(entry.key)
            self._running.push(entry.key, sequence)
            self.cache.acquire(sequence, pages)
            sequence.pages = pages + self._take(wanted - len(pages))
            sequence.num_computed = sequence.num_scheduled = len(pages) * self.config.page_size
            sequence.row = self._free_rows.pop()
            if not entry.admitted:
                entry.admitted = True
                sequence.num_cached = sequence.num_computed
                self.metrics.prompt_tokens += sequence.num_prompt
            spare += grows
            if sequence.remote:
                self.arriving[sequence] = None
                continue
            budget -= self._schedule_chunk(rows, sequence, budget)
            admitted.append(sequence)
        return admitted

    def _next_waiting(self) -> Sequence:
        """The first by policy; under longest_prefix, of the first LOOK_AHEAD the one that finds the most of itself.

        The first in line is passed over at most PATIENCE times.
        """
        first = self._waiting[0]
        if self._policy is not longest_prefix or self._passed_over >= PATIENCE:
            return first
        candidates = itertools.islice(self._waiting, LOOK_AHEAD)
        return max(candidates, key=lambda one: len(self._match(one, self._entries[one])))  # the first of the best

    def _match(self, sequence: Sequence, entry: Entry) -> list[int]:
        # Log-probabilities of prompt tokens come from computing them: what is cached has none.
        wants = sequence.request.params.prompt_logprobs is not None and sequence.index == 0
        if wants and entry.num_prompt_logprobs < sequence.num_prompt - 1:
            return []
        return self.cache.match(sequence)

    # Pages and rows.

    @property
    def _capacity(self) -> int:
        return self.pool.num_pages * self.config.page_size

    def check_fits(self, request: Request) -> None:
        """Raises RequestError for a prompt that could never run here."""
        length, room = len(request.prompt_token_ids), self.config.max_model_len - 1
        if not 1 <= length <= room:
            raise RequestError(
                "prompt_token_ids", f"{length} tokens", f"must have 1 to {room} (the context is {room + 1} tokens)"
            )
        if length + 1 > self._capacity:
            allowed = f"must have at most {self._capacity - 1}: the cache has {self.pool.num_pages} pages of "
            raise RequestError("prompt_token_ids", f"{length} tokens", f"{allowed}{self.config.page_size} tokens")

    def _can_grow(self, sequence: Sequence) -> bool:
        return len(sequence.pages) * self.config.page_size < self._entries[sequence].max_len - 1

    def _take(self, count: int) -> list[int]:
        """`count` pages, evicting what is only cached as needed; the caller knows that there are as many."""
        if count > self.pool.num_free:
            self.cache.evict(count - self.pool.num_free)
        return self.pool.allocate(count)

    def _grow(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """One more page for a running sequence, at the cost of the last by policy; False when it was the cost."""
        while not (self.pool.num_free or self.pool.num_cached):
            victim = self._running[-1]
            if victim is sequence and len(self._running) == 1:
                self._fail(sequence, f"no page is left for token {len(sequence.tokens) + sequence.num_pending}")
                return False
            self._preempt(victim)
            preempted.append(victim)
            if victim is sequence:
                return False
        sequence.pages += self._take(1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        key = self._entries[sequence].key
        self._running.remove(key)
        self._vacate(sequence)
        sequence.num_computed = sequence.num_scheduled = 0
        sequence.num_preempted += 1
        self._waiting.push(key, sequence)
        self.metrics.preemptions += 1

    def _vacate(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.arriving.pop(sequence, None)
        self._free_rows.append(sequence.row)
        self.pool.free(reversed(sequence.pages))  # the last page first: a prefix outlives its continuations
        sequence.row, sequence.pages = None, []

    def _fail(self, sequence: Sequence, why: str) -> None:
        """Ends a sequence that runs alone and still lacks pages: somebody outside the scheduler holds them."""
        why = f"KV pages exhausted: {why} ({self.pool.num_held} of {self.pool.num_pages} held)"
        self.finish(sequence, FinishReason.ERROR)
        self._failed.append(TokenOutput(sequence, None, finish_reason=FinishReason.ERROR, error=why))

    # Siblings (n > 1).

    def _worth_holding(self, first: Sequence) -> bool:
        """Whether a new sibling should wait for the prompt's pages instead of computing them again."""
        shareable = first.num_prompt > self.config.page_size  # a match leaves one token to compute
        return self.cache.enabled and shareable and first.num_output == 0

    def _release_siblings(self, request_id: str) -> None:
        for sequence in self._held.pop(request_id, ()):
            self._waiting.push(self._entries[sequence].key, sequence)

    # What a result means.

    def _append(
        self, sequence: Sequence, entry: Entry, sampled: SampledToken, prompt_logprobs: tuple[TokenLogprobs, ...]
    ) -> TokenOutput:
        sequence.tokens.append(sampled.token_id)
        self.metrics.generated_tokens += 1
        if self._held:
            self._release_siblings(sequence.request.id)
        reason = self._ending(sequence, entry, sampled.token_id)
        return TokenOutput(sequence, sampled.token_id, sampled.logprobs, prompt_logprobs, reason)

    def _ending(self, sequence: Sequence, entry: Entry, token: int) -> FinishReason | None:
        """Ends the sequence if its newest token does; returns why."""
        length = len(sequence.tokens)
        if token in entry.endings and length > entry.min_len:
            request = sequence.request
            is_eos = token in request.eos_token_ids and not request.params.ignore_eos
            self.finish(sequence, FinishReason.STOP, None if is_eos else token)
        elif length >= entry.max_len:
            self.finish(sequence, FinishReason.LENGTH)
        return sequence.finish_reason

    def _new_prompt_logprobs(self, row: ScheduledRow, entry: Entry, result: RowResult) -> tuple[TokenLogprobs, ...]:
        """The part that was not emitted before a preemption. The first sibling speaks for all: the prompt is one."""
        if row.sequence.index != 0:
            return ()
        end = row.start + len(result.prompt_logprobs)
        new = result.prompt_logprobs[max(0, entry.num_prompt_logprobs - row.start) :]
        entry.num_prompt_logprobs = max(entry.num_prompt_logprobs, end)
        return new

    def _measure(self) -> None:
        metrics, stats = self.metrics, self.cache.stats
        metrics.prefix_hit_tokens = stats.hit_tokens
        metrics.prefix_query_tokens = stats.hit_tokens + stats.miss_tokens
        metrics.evicted_pages = stats.evicted_pages
        metrics.running, metrics.waiting = self.num_running, self.num_waiting
        metrics.free_pages, metrics.cached_pages = self.pool.num_free, self.pool.num_cached
        metrics.held_pages = self.pool.num_held
