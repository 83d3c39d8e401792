"""A runner without a device, whose tokens are a pure function of the token history read back from the pages.

In: StepPlans. Out: RowResults. Its memory holds, at each slot, a digest of the token written there and of everything
before it, as keys and values would; the next token is a digest of all slots of the sequence, found through its page
table. So a wrong page, a page overwritten by another sequence, a false prefix hit or a lost recomputation changes the
tokens, and nothing else does: not the row, the step, the chunk nor what else is in the batch.
"""

import hashlib
from array import array
from dataclasses import dataclass

from jaxllm.core import RowResult, SampledToken, ScheduledRow, Sequence, StepPlan, TokenLogprobs, TokenOutput
from jaxllm.engine.buckets import UNPADDED, Padding
from jaxllm.engine.cache.hashed import NoPrefixCache, PrefixCache
from jaxllm.engine.cache.pages import PagePool
from jaxllm.engine.cache.radix import RadixCache
from jaxllm.engine.limits import Limits
from jaxllm.engine.policy import POLICIES
from jaxllm.engine.scheduler import Scheduler

UNWRITTEN = 0


def digest(*parts: bytes) -> int:
    return int.from_bytes(hashlib.sha256(b"/".join(parts)).digest()[:8], "little") | 1


def next_token(values: array, index: int, vocab: int) -> int:
    """The token that follows slots holding `values`; siblings differ by index, as seeds would make them."""
    return digest(values.tobytes(), str(index).encode()) % vocab


def written(token: int, previous: int) -> int:
    return digest(str(token).encode(), str(previous).encode())


def expected_tokens(prompt, count: int, *, index: int = 0, vocab: int = 1000) -> list[int]:
    """What a sequence generates in the first `count` steps, worked out without pages, steps or batches."""
    values, previous, output = array("Q"), UNWRITTEN, []
    tokens = list(prompt)
    for _ in range(count):
        for token in tokens[len(values) :]:
            previous = written(token, previous)
            values.append(previous)
        output.append(next_token(values, index, vocab))
        tokens.append(output[-1])
    return output


@dataclass
class FakeStep:
    results: list[RowResult]
    waits = False
    ready = True


class FakeRunner:
    """`scripts` maps a request id to the tokens its sequences emit instead of the computed ones (None = computed);
    `errors` holds (request id, number of the output token) pairs that fail."""

    def __init__(self, num_pages: int, page_size: int, max_num_seqs: int, vocab: int = 1000) -> None:
        self.memory = array("Q", [UNWRITTEN] * (num_pages * page_size))
        self.page_size, self.vocab, self.max_num_seqs = page_size, vocab, max_num_seqs
        self.scripts: dict[str, list[int | None]] = {}
        self.errors: set[tuple[str, int]] = set()
        self.rows: dict[int, Sequence] = {}  # per-row device state: whose it is
        self.last: dict[int | None, int] = {}  # per-row device state: what it sampled last
        self.num_computed_tokens = 0
        self.dispatches: list[int] = []  # how many steps each had

    def launch(self, plan: StepPlan) -> "FakeStep":
        """Like a device, it has computed the step before anybody asks, with what the host knew at launch."""
        for sequence in plan.admitted:
            assert sequence.row is not None
            assert 0 <= sequence.row < self.max_num_seqs
            self.rows[sequence.row] = sequence
        assert len({row.sequence.row for row in plan.rows}) == len(plan.rows)
        self.dispatches.append(plan.steps)
        return FakeStep([self._row(row, plan.steps) for row in plan.rows])

    def choose(self, launched: "FakeStep") -> None:
        raise AssertionError("no step of this runner waits")

    def collect(self, launched: "FakeStep") -> list[RowResult]:
        return launched.results

    def run(self, plan: StepPlan) -> list[RowResult]:
        return self.collect(self.launch(plan))

    def _row(self, row: ScheduledRow, steps: int) -> RowResult:
        sequence = row.sequence
        assert row.count > 0
        assert steps == 1 or (row.count == 1 and row.sample)
        assert row.start + row.count + steps - 1 == sequence.num_scheduled
        first = self._one(row, steps)
        later = [self._one(row._replace(start=row.start + number), steps - number) for number in range(1, steps)]
        return first._replace(later=tuple(result.sampled for result in later))

    def _one(self, row: ScheduledRow, ahead: int) -> RowResult:
        """`ahead`: tokens of this row that the steps from this one on sample."""
        sequence, end = row.sequence, row.start + row.count
        tokens = sequence.tokens[row.start : end]
        if len(tokens) < row.count:  # the host does not know yet what this row sampled last
            tokens.append(self.last[sequence.row])
        assert len(tokens) == row.count
        assert row.sample == (end == len(sequence.tokens) + sequence.num_pending - row.sample * ahead)
        assert self.rows[sequence.row] is sequence, "row state was never initialised for this sequence"
        slots = [sequence.pages[p // self.page_size] * self.page_size + p % self.page_size for p in range(end)]
        previous = self.memory[slots[row.start - 1]] if row.start else UNWRITTEN
        for position, token in enumerate(tokens, row.start):
            previous = self.memory[slots[position]] = written(token, previous)
        self.num_computed_tokens += row.count
        values = array("Q", (self.memory[slot] for slot in slots))
        assert UNWRITTEN not in values, "the sequence reads a slot that was never written"
        return RowResult(self._sample(row, values, ahead) if row.sample else None, self._prompt_logprobs(row))

    def _sample(self, row: ScheduledRow, values: array, ahead: int) -> SampledToken:
        sequence = row.sequence
        place = sequence.num_output + sequence.num_pending - ahead
        self.last[sequence.row] = 0
        if (sequence.request.id, place) in self.errors:
            return SampledToken(-1, error="injected fault")
        script = self.scripts.get(sequence.request.id, [])
        scripted = script[place] if place < len(script) else None
        token = next_token(values, sequence.index, self.vocab) if scripted is None else scripted
        self.last[sequence.row] = token
        return SampledToken(token)

    def _prompt_logprobs(self, row: ScheduledRow) -> tuple[TokenLogprobs, ...]:
        if row.sequence.request.params.prompt_logprobs is None:
            return ()
        places = range(row.start + 1, min(row.start + row.count + 1, row.sequence.num_prompt))
        return tuple(TokenLogprobs(row.sequence.tokens[place], -float(place), 1) for place in places)


class Host:
    """A scheduler, its pages and a fake runner: the engine's loop without a device."""

    def __init__(
        self,
        *,
        num_pages: int = 64,
        page_size: int = 4,
        token_budget: int = 64,
        max_num_seqs: int = 8,
        max_model_len: int = 200,
        max_prefill_chunk: int | None = None,
        caching: bool = True,
        radix: bool = False,
        policy: str = "fcfs",
        overlap: bool = False,
        padding: Padding = UNPADDED,
        decode_steps: int = 1,
    ) -> None:
        self.overlap = overlap
        self.in_flight: tuple[StepPlan, FakeStep] | None = None
        self.pool = PagePool(num_pages, page_size)
        self.cache = (RadixCache if radix else PrefixCache)(self.pool) if caching else NoPrefixCache()
        limits = Limits(
            token_budget=token_budget,
            max_num_seqs=max_num_seqs,
            page_size=page_size,
            max_model_len=max_model_len,
            max_prefill_chunk=max_prefill_chunk,
            padding=padding,
            decode_steps=decode_steps,
            decode_steps_rows=max_num_seqs,
        )
        self.scheduler = Scheduler(limits, self.pool, self.cache, POLICIES[policy])
        self.runner = FakeRunner(num_pages, page_size, max_num_seqs)
        self.plans: list[StepPlan | None] = []
        self.outputs: list[TokenOutput] = []
        self.finished: list[Sequence] = []  # in the order of their ends

    def add(self, request) -> list[Sequence]:
        sequences = [Sequence(request, index) for index in range(request.params.n)]
        for sequence in sequences:
            self.scheduler.add(sequence)
        return sequences

    def step(self) -> list[TokenOutput]:
        """With `overlap`, the step before is read after this one was launched, as the engine does."""
        plan = self.scheduler.schedule()
        self.scheduler.check()
        launched = (plan, self.runner.launch(plan)) if plan else None
        due, self.in_flight = (self.in_flight, launched) if self.overlap else (launched, None)
        outputs = self.scheduler.commit(*((due[0], self.runner.collect(due[1])) if due else (None, [])))
        self.scheduler.check()
        self.plans.append(plan)
        self.outputs += outputs
        self.finished += [output.sequence for output in outputs if output.finish_reason]
        return outputs

    def run(self, max_steps: int = 10_000) -> None:
        """Steps until nothing is left to do; more than `max_steps` is a livelock."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, f"still work after {max_steps} steps"
        assert self.pool.num_held == 0
        assert self.pool.num_free == self.pool.num_pages - self.pool.num_cached

    def emitted(self, sequence: Sequence) -> list[int]:
        """The sequence's tokens as a listener heard them."""
        return [out.token_id for out in self.outputs if out.sequence is sequence and out.token_id is not None]
