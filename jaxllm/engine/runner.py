"""The device half of a step: a StepPlan goes in, one RowResult a row comes out, asynchronously.

`launch` puts a step on the device and returns at once, `collect` waits for what it says. A step may be launched before
the one before it is collected: sampled tokens pass from one to the next on the device. Where a row's token mask follows
from a token that is not known yet, `launch` leaves the sampling to `choose`.

Owns the parameters, the KV pages and the per-row state; picks the bucket, packs the inputs, calls the compiled step
and reads the answers back. Knows nothing of policy, queues, stop conditions or text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core import (
    MAX_LOGIT_BIAS,
    RowResult,
    SampledToken,
    SamplingParams,
    ScheduledRow,
    Sequence,
    StepPlan,
    TokenLogprobs,
    stream_seed,
)
from jaxllm.engine.decoding.mask import TokenMask
from jaxllm.engine.metrics import Metrics
from jaxllm.graph.compile import COUNTS_CHUNK, Executables, Ladder, compile_counter
from jaxllm.graph.inputs import SampleRow, StepShape, pack, pack_samples
from jaxllm.graph.kv_cache import KVCache
from jaxllm.graph.steps import SAMPLER_MODES, Sampled, SampleMode, Stepped

NUMERICAL_ERROR = "numerical_error: the model's logits for this sequence are not finite"


def has_penalties(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1


def sample_mode(params: SamplingParams, masked: bool) -> SampleMode:
    """The least the sampler must compute for one sequence."""
    if params.logprobs is not None:
        return SampleMode.LOGPROBS
    if params.greedy:
        plain = not masked and not params.logit_bias and not has_penalties(params)
        return SampleMode.GREEDY if plain else SampleMode.RANDOM
    truncates = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    return SampleMode.SAMPLE if truncates else SampleMode.RANDOM


MODE_ORDER = list(SampleMode)  # from least to most work


@dataclass(eq=False)
class Launched:
    """A step on its way through the device."""

    rows: tuple[ScheduledRow, ...]
    greedy: jax.Array  # the step's own tokens
    sampled: Sampled | None  # None: not chosen yet
    masks: list[TokenMask | None]  # by row of the plan
    bucket: int
    prompts: tuple[Any, Any] | None = None  # targets, and their log-probabilities on the device
    bits: list[np.ndarray | None] = field(default_factory=list)  # what the masks allowed
    waits: bool = False  # for `choose`

    @property
    def ready(self) -> bool:
        """Whether the device has finished it."""
        tokens: Any = self.sampled.token_ids if self.sampled is not None else None  # jax's type leaves is_ready out
        return tokens is not None and tokens.is_ready()


@dataclass
class Runner:
    params: Any
    kv: KVCache | list[KVCache]  # a list of them: of each pipeline stage
    counts: jax.Array  # u16[S+1, V]; row S takes the writes of padding rows
    executables: Executables
    ladder: Ladder
    vocab_size: int
    logits_sharding: jax.sharding.Sharding
    metrics: Metrics = field(default_factory=Metrics)
    steps: int = 0
    last_tokens: jax.Array = field(init=False)  # i32[S+1]: what each row sampled last
    _logits: dict[int, jax.Array] = field(default_factory=dict)  # by rows of the bucket: every step's go to one place
    _masks: dict[int, TokenMask | None] = field(default_factory=dict)  # by row
    _keys: dict[int, tuple[int, int]] = field(default_factory=dict)  # by row
    _neutral: dict[int, tuple[Any, Any, Any, Any]] = field(default_factory=dict)  # by bucket
    _page_table: np.ndarray = field(init=False)  # i32[S, W]: each running sequence's pages
    _num_pages: np.ndarray = field(init=False)  # how many of a row's are right
    _compiles_when_ready: int = 0

    def __post_init__(self) -> None:
        rows = self.counts.shape[0] - 1
        self.last_tokens = jax.device_put(np.zeros(rows + 1, np.int32), self.counts.sharding)
        for bucket in self.ladder.decode_rows:
            empty = jnp.zeros((bucket, self.vocab_size), jnp.float32, device=self.logits_sharding)
            self._logits[bucket] = empty
        self._page_table = np.zeros((rows, self.ladder.width), np.int32)
        self._num_pages = np.zeros(rows, np.int64)

    # ---- a step ----

    def launch(self, plan: StepPlan) -> Launched:
        """Put one step on the device. Raises only for faults of the whole step; a sick row carries its own error."""
        self.steps += 1
        for sequence in plan.admitted:
            self._admit(sequence)
        rows = plan.rows
        wants_prompt = any(row.sequence.request.params.prompt_logprobs is not None for row in rows)
        decode = plan.decode_only and not wants_prompt  # a decode step gives no hidden states
        shape = self.ladder.of(len(rows), plan.num_tokens, decode=decode)
        places = [self._place(row.sequence) for row in rows]
        stepped = self._step(shape, self._pack(shape, rows, places))
        masks = [self._masks[place] if row.sample else None for row, place in zip(rows, places)]
        launched = Launched(rows, stepped.token_ids, None, masks, shape.rows)
        if wants_prompt:
            launched.prompts = self._prompt_logprobs(rows, stepped.hidden, shape)
        # num_pending counts this step's token; another one is the step before's, still unknown.
        launched.waits = any(
            mask is not None and row.sequence.num_pending > 1 and mask.follows_tokens for row, mask in zip(rows, masks)
        )
        if not launched.waits:
            self.choose(launched)
        return launched

    def choose(self, launched: Launched) -> None:
        """Sample with the token masks as they are now. Its executable is small: the step before it still computes."""
        launched.waits = False
        rows = launched.rows
        launched.bits = [
            None if mask is None or row.sequence.finished else mask.bits() for row, mask in zip(rows, launched.masks)
        ]
        asked = zip(rows, launched.bits)
        wanted = [sample_mode(row.sequence.request.params, bits is not None) for row, bits in asked if row.sample]
        mode = max(wanted, key=MODE_ORDER.index, default=SampleMode.GREEDY)
        if mode is SampleMode.GREEDY:
            launched.sampled = Sampled(launched.greedy)
        else:
            launched.sampled = self._sample(mode, launched.bucket, list(zip(rows, launched.bits)))
        for leaf in jax.tree.leaves(launched.sampled):
            leaf.copy_to_host_async()

    def collect(self, launched: Launched) -> list[RowResult]:
        """Wait for a step and read what it says."""
        host: Sampled = jax.tree.map(np.asarray, launched.sampled)
        rows = launched.rows
        sampled = [self._token(launched, i, host) if row.sample else None for i, row in enumerate(rows)]
        self.metrics.compiles_after_ready = compile_counter().compiles - self._compiles_when_ready
        if launched.prompts is None:
            return [RowResult(token) for token in sampled]
        prompts = _read_prompts(rows, *launched.prompts)
        return [RowResult(token, prompt) for token, prompt in zip(sampled, prompts, strict=True)]

    def hidden_states(self, token_ids: SequenceOf[int], start: int, pages: SequenceOf[int]) -> np.ndarray:
        """The model's last hidden states of one sequence's tokens from `start` on, f32[count, D], through prefill."""
        shape = self.ladder.mixed(len(token_ids))
        table = np.zeros((1, shape.width), np.int32)
        table[0, : len(pages)] = pages
        scratch = self.counts.shape[0] - 1
        packed = pack(shape, token_ids, [len(token_ids)], [start + len(token_ids)], [scratch], table, scratch)
        hidden = self._step(shape, packed).hidden
        return np.asarray(jax.device_get(hidden)[: len(token_ids)], np.float32)

    def warm_up(self) -> None:
        """Run every executable once on padding, so that no request pays for a first launch."""
        for shape in self.ladder.shapes():
            stepped = self._step(shape, self._pack(shape, (), ()))
            if not shape.decode:
                targets = np.zeros(shape.tokens, np.int32)
                self.executables.prompt_logprobs(shape.tokens)(self.params, stepped.hidden, targets)
        for rows in self.ladder.decode_rows:
            for mode in SAMPLER_MODES:
                self._sample(mode, rows, [])
        self._set_counts(self.counts.shape[0] - 1, [], in_prompt=True, fresh=True)
        jax.block_until_ready((self.kv, self.counts))
        self.all_compiled()

    def all_compiled(self) -> None:
        """From here on nothing may be compiled; other runners of this process have warmed up too."""
        self._compiles_when_ready = compile_counter().compiles

    def _step(self, shape: StepShape, packed: np.ndarray) -> Stepped:
        # Put first: an array that the call itself must bring over costs 0.1 ms more.
        place = self.counts.sharding
        inputs = jax.device_put(packed, place) if place.is_fully_addressable else packed  # else told to other processes
        state = self.kv, self.last_tokens, self._logits[shape.rows]
        stepped: Stepped = self.executables.step(shape)(self.params, *state, inputs)
        self.kv, self.last_tokens, self._logits[shape.rows] = stepped.kv, stepped.last_tokens, stepped.logits
        return stepped

    def _pack(self, shape: StepShape, rows: SequenceOf[ScheduledRow], places: SequenceOf[int]) -> np.ndarray:
        token_ids: list[int] = []
        for row, place in zip(rows, places):
            known = row.sequence.tokens[row.start : row.start + row.count]
            token_ids += known
            if len(known) < row.count:
                token_ids.append(-1 - place)
        scratch = self.counts.shape[0] - 1
        return pack(
            shape,
            token_ids,
            [row.count for row in rows],
            [row.start + row.count for row in rows],
            [place if row.sample else scratch for row, place in zip(rows, places)],
            self._page_table[list(places)],
            scratch,
        )

    def _place(self, sequence: Sequence) -> int:
        """The sequence's row, whose page table is made to hold its pages."""
        row = sequence.row
        assert row is not None
        have, pages = self._num_pages[row], sequence.pages
        if have < len(pages):
            self._page_table[row, have : len(pages)] = pages[have:]
            self._num_pages[row] = len(pages)
        return row

    # ---- per-row state ----

    def _admit(self, sequence: Sequence) -> None:
        """A sequence takes (or retakes, after preemption) its row: rebuild what the device and the masks know of it."""
        assert sequence.row is not None
        row, prompt, output = sequence.row, sequence.request.prompt_token_ids, sequence.output_token_ids
        self._keys[row] = stream_seed(sequence.request.seed, sequence.index)
        mask = TokenMask(sequence, self.vocab_size)
        self._masks[row] = mask if mask.restricts else None
        self._num_pages[row] = 0
        if has_penalties(sequence.request.params):
            self._set_counts(row, prompt, in_prompt=True, fresh=True)
            self._set_counts(row, output, in_prompt=False, fresh=False)

    def _set_counts(self, row: int, token_ids: SequenceOf[int], *, in_prompt: bool, fresh: bool) -> None:
        for start in range(0, max(len(token_ids), int(fresh)), COUNTS_CHUNK):
            part = token_ids[start : start + COUNTS_CHUNK]
            chunk = np.zeros(COUNTS_CHUNK, np.int32)
            chunk[: len(part)] = part
            args = np.int32(row), chunk, np.int32(len(part)), np.bool_(in_prompt), np.bool_(fresh and start == 0)
            self.counts = self.executables.set_counts(self.counts, *args)

    # ---- sampling ----

    def _sample(self, mode: SampleMode, bucket: int, rows: list[tuple[ScheduledRow, np.ndarray | None]]) -> Sampled:
        packed, bias_ids, bias, mask = self._neutral_arrays(bucket)
        if rows:
            scratch = self.counts.shape[0] - 1
            packed = pack_samples(bucket, [self._sample_row(row, scratch) for row, _ in rows], scratch)
        if any(row.sequence.request.params.logit_bias for row, _ in rows if row.sample):
            bias_ids, bias = self._bias_arrays(bucket, [row for row, _ in rows])
        if any(bits is not None for _, bits in rows):
            mask = np.full(mask.shape, 0xFFFFFFFF, np.uint32)
            for i, (_, bits) in enumerate(rows):
                mask[i] = mask[i] if bits is None else bits
        state = self.counts, self.last_tokens
        call = self.executables.sample(bucket, mode)
        sampled, self.counts, self.last_tokens = call(*state, self._logits[bucket], packed, bias_ids, bias, mask)
        return sampled

    def _sample_row(self, row: ScheduledRow, scratch: int) -> SampleRow:
        sequence, params = row.sequence, row.sequence.request.params
        if not row.sample or sequence.row is None:  # ended while its last step waited for a mask
            return SampleRow(row=scratch)
        key0, key1 = self._keys[sequence.row]
        return SampleRow(
            row=sequence.row,
            key0=key0,
            key1=key1,
            position=row.start + row.count,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=max(params.top_k, 0),
            min_p=params.min_p,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            repetition=params.repetition_penalty,
        )

    def _neutral_arrays(self, bucket: int) -> tuple[Any, Any, Any, Any]:
        """Device arrays that ask for nothing, made once a bucket: most batches send no bias and no mask."""
        if bucket not in self._neutral:
            ids = np.full((bucket, MAX_LOGIT_BIAS), self.vocab_size, np.int32)
            mask = np.full((bucket, -(-self.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
            packed = pack_samples(bucket, [], self.counts.shape[0] - 1)
            arrays = packed, ids, np.zeros((bucket, MAX_LOGIT_BIAS), np.float32), mask
            self._neutral[bucket] = jax.device_put(arrays, self.counts.sharding)
        return self._neutral[bucket]

    def _bias_arrays(self, bucket: int, rows: SequenceOf[ScheduledRow]) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full((bucket, MAX_LOGIT_BIAS), self.vocab_size, np.int32)
        bias = np.zeros((bucket, MAX_LOGIT_BIAS), np.float32)
        for i, row in enumerate(rows):
            wanted = row.sequence.request.params.logit_bias or {}
            ids[i, : len(wanted)] = list(wanted)
            bias[i, : len(wanted)] = list(wanted.values())
        return ids, bias

    def _token(self, launched: Launched, i: int, host: Sampled) -> SampledToken:
        mask, bits = launched.masks[i], launched.bits[i]
        if mask is not None and bits is not None and not bits.any():
            return SampledToken(token_id=-1, error=mask.why_nothing)
        token, wanted = int(host.token_ids[i]), launched.rows[i].sequence.request.params.logprobs
        if token < 0:
            return SampledToken(token_id=-1, error=NUMERICAL_ERROR)
        if wanted is None or host.logprobs is None:
            return SampledToken(token)
        found = host.logprobs, host.ranks, host.top_ids, host.top_logprobs
        return SampledToken(token, _logprobs(token, i, found, wanted))

    # ---- prompt log-probabilities ----

    def _prompt_logprobs(
        self, rows: SequenceOf[ScheduledRow], hidden: jax.Array | None, shape: StepShape
    ) -> tuple[Any, Any] | None:
        """Of prompt tokens start+1 .. start+count of each row: the tokens, and the answer on its way. None: of none."""
        if not any(_prompt_span(row) for row in rows):
            return None
        targets = np.zeros(shape.tokens, np.int32)
        starts = itertools.accumulate((row.count for row in rows), initial=0)
        for row, at in zip(rows, starts):
            span = _prompt_span(row)
            targets[at : at + len(span)] = row.sequence.tokens[span.start : span.stop]
        found = self.executables.prompt_logprobs(shape.tokens)(self.params, hidden, targets)
        for leaf in found:
            leaf.copy_to_host_async()
        return targets, found


def _prompt_span(row: ScheduledRow) -> range:
    """The prompt tokens whose log-probabilities a row computes and its request wants."""
    if row.sequence.request.params.prompt_logprobs is None:
        return range(0)
    return range(row.start + 1, min(row.start + row.count + 1, row.sequence.num_prompt))


def _read_prompts(rows: SequenceOf[ScheduledRow], targets: np.ndarray, found: Any) -> list[tuple[TokenLogprobs, ...]]:
    host = jax.tree.map(np.asarray, found)
    starts = itertools.accumulate((row.count for row in rows), initial=0)
    return [
        tuple(
            _logprobs(int(targets[at + i]), at + i, host, row.sequence.request.params.prompt_logprobs or 0)
            for i in range(len(_prompt_span(row)))
        )
        for row, at in zip(rows, starts)
    ]


def _logprobs(token: int, i: int, found: tuple[Any, Any, Any, Any], wanted: int) -> TokenLogprobs:
    """Entry i of (logprob, rank, top ids, top logprobs) with the best `wanted` alternatives."""
    logprob, rank, ids, values = found
    top = tuple((int(t), float(v)) for t, v in zip(ids[i, :wanted], values[i, :wanted]))
    return TokenLogprobs(token, float(logprob[i]), int(rank[i]), top)
