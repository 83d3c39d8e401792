"""The device half of a step: a StepPlan goes in, one RowResult a row comes out, asynchronously.

`launch` puts a step on the device and returns at once, `collect` waits for what it says. A step may be launched before
the one before it is collected: sampled tokens pass from one to the next on the device. Where a row's token mask follows
from a token that is not known yet, `launch` leaves the sampling to `choose`.

Owns the parameters, the KV pages and the per-row state, of which the page table is part; picks the bucket, packs the
inputs, calls the compiled step and reads the answers back. With several shards (attention data) one step computes the
rows of all, each on its own pages; what there is of each row lies shard after shard. Knows nothing of policy, queues,
stop conditions or text.
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
    ShardedPlan,
    StepPlan,
    TokenLogprobs,
    stream_seed,
)
from jaxllm.engine.decoding.mask import TokenMask
from jaxllm.engine.metrics import Metrics
from jaxllm.graph.compile import COUNTS_CHUNK, Executables, Ladder, compile_counter
from jaxllm.graph.inputs import SampleRow, StepShape, pack, pack_samples
from jaxllm.graph.kv_cache import KVCache
from jaxllm.graph.multi_step import MODES, MultiStepped
from jaxllm.graph.spread import put, zeros
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


def _most(wanted: list[SampleMode]) -> SampleMode:
    """What the most demanding of some sequences asks for."""
    return max(wanted, key=MODE_ORDER.index, default=SampleMode.GREEDY)


@dataclass(eq=False)
class Launched:
    """A step on its way through the device."""

    rows: tuple[ScheduledRow, ...]
    at: list[int]  # where in the step's arrays each row is
    greedy: jax.Array  # the step's own tokens
    sampled: Sampled | None  # None: not chosen yet
    masks: list[TokenMask | None]  # by row of the plan
    bucket: int
    prompts: tuple[Any, Any, Any] | None = None  # where rows start, targets, their log-probabilities on the device
    bits: list[np.ndarray | None] = field(default_factory=list)  # what the masks allowed
    waits: bool = False  # for `choose`
    steps: int = 1  # of several, `sampled` has a line each

    @property
    def ready(self) -> bool:
        """Whether the device has finished it."""
        tokens: Any = self.sampled.token_ids if self.sampled is not None else None  # jax's type leaves is_ready out
        return tokens is not None and tokens.is_ready()


@dataclass
class Runner:
    params: Any
    kv: KVCache | list[KVCache]  # a list of them: of each pipeline stage
    page_table: Any  # i32[S+1, W] a shard: each row's pages; a list of them likewise
    counts: jax.Array  # u16[S+1, V] a shard; row S takes the writes of padding rows
    executables: Executables
    ladder: Ladder
    vocab_size: int
    logits_sharding: jax.sharding.Sharding
    metrics: Metrics = field(default_factory=Metrics)
    steps: int = 0
    shards: int = 1
    load: jax.Array | None = None  # what the last step counted of its experts
    stay: list[jax.Array] = field(default_factory=list)  # nobody reads them: see apart.py
    last_tokens: jax.Array = field(init=False)  # i32[S+1] a shard: what each row sampled last
    _logits: dict[int, jax.Array] = field(default_factory=dict)  # by rows of the bucket: every step's go to one place
    _masks: dict[int, TokenMask | None] = field(default_factory=dict)  # by place: row of all shards
    _keys: dict[int, tuple[int, int]] = field(default_factory=dict)  # by place
    _neutral: dict[int, tuple[Any, Any, Any, Any]] = field(default_factory=dict)  # by bucket
    _num_pages: list[int] = field(init=False)  # by place: how many of the row's pages its line of the table has
    _compiles_when_ready: int = 0

    def __post_init__(self) -> None:
        rows = self.counts.shape[0]
        self.last_tokens = put(np.zeros(rows, np.int32), self.counts.sharding)
        for bucket in self.ladder.decode_rows:
            shape = bucket * self.shards, self.vocab_size
            self._logits[bucket] = zeros(shape, jnp.float32, self.logits_sharding)
        self._num_pages = [0] * rows

    @property
    def scratch(self) -> int:
        """The row of a shard that nothing is read from."""
        return self.counts.shape[0] // self.shards - 1

    # ---- a step ----

    def launch(self, plan: StepPlan | ShardedPlan) -> Launched:
        """Put one step on the device. Raises only for faults of the whole step; a sick row carries its own error."""
        try:
            return self._launch(plan)
        except Exception:
            self._num_pages = [0] * len(self._num_pages)  # what it was to bring may not have come
            raise

    def _launch(self, plan: StepPlan | ShardedPlan) -> Launched:
        self.steps += 1
        for shard, part in enumerate(plan.parts):
            for sequence in part.admitted:
                self._admit(shard, sequence)
        rows = plan.rows
        wants_prompt = any(row.sequence.request.params.prompt_logprobs is not None for row in rows)
        decode = plan.decode_only and not wants_prompt  # a decode step gives no hidden states
        most_rows, most_tokens = (max(size) for size in zip(*((len(p.rows), p.num_tokens) for p in plan.parts)))
        parts = [[(self._place(shard, row.sequence), row) for row in p.rows] for shard, p in enumerate(plan.parts)]
        if plan.steps > 1:
            return self._launch_several(plan.steps, parts[0])
        shape = self.ladder.of(most_rows, most_tokens, decode=decode)
        stepped = self._step(shape, self._pack(shape, parts))
        places = [place for part in parts for place, _ in part]
        at = [shard * shape.rows + i for shard, part in enumerate(parts) for i in range(len(part))]
        masks = [self._masks[place] if row.sample else None for row, place in zip(rows, places)]
        launched = Launched(rows, at, stepped.token_ids, None, masks, shape.rows)
        if wants_prompt:
            launched.prompts = self._prompt_logprobs(parts, stepped.hidden, shape)
        # num_pending counts this step's token; another one is the step before's, still unknown.
        launched.waits = any(
            mask is not None and row.sequence.num_pending > 1 and mask.follows_tokens for row, mask in zip(rows, masks)
        )
        if not launched.waits:
            self.choose(launched)
        return launched

    def _launch_several(self, steps: int, part: list[tuple[int, ScheduledRow]]) -> Launched:
        """Decode steps in one dispatch. No mask follows their tokens, so what is allowed now holds for all of them."""
        shape, rows = self.ladder.multi_step(len(part)), tuple(row for _, row in part)
        masks = [self._masks[place] for place, _ in part]
        bits = [None if mask is None else mask.bits() for mask in masks]
        mode = _most([sample_mode(row.sequence.request.params, bit is not None) for row, bit in zip(rows, bits)])
        at = [*range(len(rows))]
        tokens = self._several(shape, mode, self._pack(shape, [part]), list(zip(at, rows, bits)))
        tokens.copy_to_host_async()
        return Launched(rows, at, tokens, Sampled(tokens), masks, shape.rows, bits=bits, steps=steps)

    def choose(self, launched: Launched) -> None:
        """Sample with the token masks as they are now. Its executable is small: the step before it still computes."""
        launched.waits = False
        rows = launched.rows
        launched.bits = [
            None if mask is None or row.sequence.finished else mask.bits() for row, mask in zip(rows, launched.masks)
        ]
        asked = zip(rows, launched.bits)
        mode = _most([sample_mode(row.sequence.request.params, bits is not None) for row, bits in asked if row.sample])
        if mode is SampleMode.GREEDY:
            launched.sampled = Sampled(launched.greedy)
        else:
            launched.sampled = self._sample(mode, launched.bucket, list(zip(launched.at, rows, launched.bits)))
        for leaf in launched.sampled:
            if leaf is not None:
                leaf.copy_to_host_async()

    def collect(self, launched: Launched) -> list[RowResult]:
        """Wait for a step and read what it says."""
        assert launched.sampled is not None
        # Field by field: a map over the tree takes longer than the step's own accounting.
        host = Sampled._make(None if leaf is None else np.asarray(leaf) for leaf in launched.sampled)
        self.metrics.compiles_after_ready = compile_counter().compiles - self._compiles_when_ready
        rows = launched.rows
        if launched.steps > 1:
            by_step = [Sampled(token_ids) for token_ids in host.token_ids.tolist()]
            tokens = ([self._token(launched, i, one) for one in by_step] for i in range(len(rows)))
            return [RowResult(first, later=tuple(later)) for first, *later in tokens]
        sampled = [self._token(launched, i, host) if row.sample else None for i, row in enumerate(rows)]
        if launched.prompts is None:
            return [RowResult(token) for token in sampled]
        prompts = _read_prompts(rows, *launched.prompts)
        return [RowResult(token, prompt) for token, prompt in zip(sampled, prompts, strict=True)]

    def hidden_states(self, token_ids: SequenceOf[int], start: int, pages: SequenceOf[int]) -> np.ndarray:
        """The model's last hidden states of one sequence's tokens from `start` on, f32[count, D], through prefill.

        On the first shard.
        """
        shape = self.ladder.mixed(len(token_ids))
        length, scratch = len(token_ids), self.scratch
        self._set_pages(scratch, pages)
        packed = pack(shape, token_ids, [length], [start + length], [scratch], [scratch], [], scratch)
        idle = self._pack(shape, [[]] * self.shards)[packed.size :]
        hidden = self._step(shape, np.concatenate([packed, idle])).hidden
        return np.asarray(jax.device_get(hidden)[:length], np.float32)

    def warm_up(self) -> None:
        """Run every executable once on padding, so that no request pays for a first launch."""
        for shape in self.ladder.shapes():
            stepped = self._step(shape, self._pack(shape, [[]] * self.shards))
            if not shape.decode:
                targets = np.zeros(shape.tokens * self.shards, np.int32)
                self.executables.prompt_logprobs(shape.tokens)(self.params, stepped.hidden, targets)
        for rows in self.ladder.decode_rows:
            for mode in SAMPLER_MODES:
                self._sample(mode, rows, [])
        for shape in self.ladder.multi_steps():
            for mode in MODES:
                self._several(shape, mode, self._pack(shape, [[]]), [])
        self._set_counts(self.scratch, [], in_prompt=True, fresh=True)
        self._set_pages(self.scratch, [])
        jax.block_until_ready((self.kv, self.counts))

    def all_compiled(self) -> None:
        """From here on nothing may be compiled; other runners of this process have warmed up too."""
        self._compiles_when_ready = compile_counter().compiles

    def _step(self, shape: StepShape, packed: np.ndarray) -> Stepped:
        inputs = self._put(packed)
        state = self.kv, self.page_table, self.last_tokens, self._logits[shape.rows]
        stepped: Stepped = self.executables.step(shape)(self.params, *state, inputs)
        self.kv, self.page_table, self.last_tokens = stepped.kv, stepped.page_table, stepped.last_tokens
        self._logits[shape.rows] = stepped.logits
        self.load = stepped.load
        return stepped

    def _several(
        self, shape: StepShape, mode: SampleMode, packed: np.ndarray, rows: list[tuple[int, ScheduledRow, Any]]
    ) -> jax.Array:
        """The tokens of each of the ladder's decode steps, on their way."""
        sampler = () if mode is SampleMode.GREEDY else (self.counts, *self._asked(shape.rows, rows))
        call = self.executables.multi_step(self.ladder.decode_steps, shape, mode)
        state = self.kv, self.page_table, self.last_tokens
        done: MultiStepped = call(self.params, *state, self._put(packed), *sampler)
        self.kv, self.page_table, self.last_tokens = done.kv, done.page_table, done.last_tokens
        self.counts = self.counts if done.counts is None else done.counts
        return done.token_ids

    def _put(self, packed: np.ndarray) -> Any:
        """Put first: an array that the call itself must bring over costs 0.1 ms more. Told to other processes instead.

        By parts, of which there is one where there are no shards: a third of the Python that device_put runs.
        """
        if jax.process_count() > 1:
            return packed
        return jax.make_array_from_callback(packed.shape, self.counts.sharding, packed.__getitem__)

    def _pack(self, shape: StepShape, parts: SequenceOf[SequenceOf[tuple[int, ScheduledRow]]]) -> np.ndarray:
        """The rows of each shard, with their places."""
        packed = [self._pack_shard(shape, part) for part in parts]
        return packed[0] if len(packed) == 1 else np.concatenate(packed)

    def _pack_shard(self, shape: StepShape, part: SequenceOf[tuple[int, ScheduledRow]]) -> np.ndarray:
        token_ids: list[int] = []
        scratch = self.scratch
        new_pages = self._new_pages(shape, part)
        for place, row in part:
            known = row.sequence.tokens[row.start : row.start + row.count]
            token_ids += known
            if len(known) < row.count:
                token_ids.append(-1 - place % (scratch + 1))
        return pack(
            shape,
            token_ids,
            [row.count for _, row in part],
            [row.start + row.count for _, row in part],
            [place % (scratch + 1) if row.sample else scratch for place, row in part],
            [place % (scratch + 1) for place, _ in part],
            new_pages,
            scratch,
        )

    def _new_pages(self, shape: StepShape, part: SequenceOf[tuple[int, ScheduledRow]]) -> list[tuple[int, int]]:
        """What the page table lacks of these rows' pages. More than the step takes along goes ahead of it by rows."""
        found: list[tuple[int, int]] = []
        for place, row in part:
            have, pages = self._num_pages[place], row.sequence.pages
            if have >= len(pages):
                continue
            self._num_pages[place] = len(pages)
            if len(found) + len(pages) - have > shape.new_pages:
                self._set_pages(place, pages)
            else:
                begin = place % (self.scratch + 1) * self.ladder.width
                found += [(begin + number, pages[number]) for number in range(have, len(pages))]
        return found

    def _set_pages(self, place: int, pages: SequenceOf[int]) -> None:
        """A row's whole line of the page table; other shards write theirs of the scratch row."""
        shard, row = divmod(place, self.scratch + 1)
        rows, lines = np.full(self.shards, self.scratch, np.int32), np.zeros((self.shards, self.ladder.width), np.int32)
        rows[shard], lines[shard, : len(pages)] = row, pages
        self.page_table = self.executables.set_pages(self.page_table, rows, lines.reshape(-1))

    def _place(self, shard: int, sequence: Sequence) -> int:
        """The sequence's row among those of all shards."""
        assert sequence.row is not None
        return shard * (self.scratch + 1) + sequence.row

    # ---- per-row state ----

    def _admit(self, shard: int, sequence: Sequence) -> None:
        """A sequence takes (or retakes, after preemption) its row: rebuild what the device and the masks know of it."""
        assert sequence.row is not None
        prompt, output = sequence.request.prompt_token_ids, sequence.output_token_ids
        place = shard * (self.scratch + 1) + sequence.row
        self._keys[place] = stream_seed(sequence.request.seed, sequence.index)
        mask = TokenMask(sequence, self.vocab_size)
        self._masks[place] = mask if mask.restricts else None
        self._num_pages[place] = 0
        if has_penalties(sequence.request.params):
            self._set_counts(place, prompt, in_prompt=True, fresh=True)
            self._set_counts(place, output, in_prompt=False, fresh=False)

    def _set_counts(self, place: int, token_ids: SequenceOf[int], *, in_prompt: bool, fresh: bool) -> None:
        """Other shards count nothing, in their scratch rows."""
        shard, row = divmod(place, self.scratch + 1)
        rows, sizes = np.full(self.shards, self.scratch, np.int32), np.zeros(self.shards, np.int32)
        rows[shard] = row
        of_prompt, anew = np.full(self.shards, in_prompt), np.zeros(self.shards, np.bool_)
        for start in range(0, max(len(token_ids), int(fresh)), COUNTS_CHUNK):
            part = token_ids[start : start + COUNTS_CHUNK]
            chunk = np.zeros((self.shards, COUNTS_CHUNK), np.int32)
            chunk[shard, : len(part)] = part
            sizes[shard], anew[shard] = len(part), fresh and start == 0
            # Copies: the device may read them after they have changed here.
            args = rows, chunk.reshape(-1), sizes.copy(), of_prompt, anew.copy()
            self.counts = self.executables.set_counts(self.counts, *args)

    # ---- sampling ----

    def _sample(self, mode: SampleMode, bucket: int, rows: list[tuple[int, ScheduledRow, Any]]) -> Sampled:
        """`rows`: where in the arrays each is, the row, and what its mask allows."""
        state = self.counts, self.last_tokens
        call = self.executables.sample(bucket, mode)
        sampled, self.counts, self.last_tokens = call(*state, self._logits[bucket], *self._asked(bucket, rows))
        return sampled

    def _asked(self, bucket: int, rows: list[tuple[int, ScheduledRow, Any]]) -> tuple[Any, Any, Any, Any]:
        """What a sampler takes of these rows."""
        packed, bias_ids, bias, mask = self._neutral_arrays(bucket)
        if rows:
            samples = [SampleRow(row=self.scratch)] * (bucket * self.shards)
            for at, row, _ in rows:
                samples[at] = self._sample_row(at // bucket, row)
            packed = pack_samples(len(samples), samples, self.scratch)
        if any(row.sequence.request.params.logit_bias for _, row, _ in rows if row.sample):
            bias_ids, bias = self._bias_arrays(bucket, rows)
        if any(bits is not None for _, _, bits in rows):
            mask = np.full(mask.shape, 0xFFFFFFFF, np.uint32)
            for at, _, bits in rows:
                mask[at] = mask[at] if bits is None else bits
        return packed, bias_ids, bias, mask

    def _sample_row(self, shard: int, row: ScheduledRow) -> SampleRow:
        sequence, params = row.sequence, row.sequence.request.params
        if not row.sample or sequence.row is None:  # ended while its last step waited for a mask
            return SampleRow(row=self.scratch)
        key0, key1 = self._keys[shard * (self.scratch + 1) + sequence.row]
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
            rows = bucket * self.shards
            ids = np.full((rows, MAX_LOGIT_BIAS), self.vocab_size, np.int32)
            mask = np.full((rows, -(-self.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
            packed = pack_samples(rows, [], self.scratch)
            arrays = packed, ids, np.zeros((rows, MAX_LOGIT_BIAS), np.float32), mask
            self._neutral[bucket] = put(arrays, self.counts.sharding)
        return self._neutral[bucket]

    def _bias_arrays(self, bucket: int, rows: list[tuple[int, ScheduledRow, Any]]) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full((bucket * self.shards, MAX_LOGIT_BIAS), self.vocab_size, np.int32)
        bias = np.zeros(ids.shape, np.float32)
        for at, row, _ in rows:
            wanted = row.sequence.request.params.logit_bias or {}
            ids[at, : len(wanted)] = list(wanted)
            bias[at, : len(wanted)] = list(wanted.values())
        return ids, bias

    def _token(self, launched: Launched, i: int, host: Sampled) -> SampledToken:
        mask, bits = launched.masks[i], launched.bits[i]
        if mask is not None and bits is not None and not bits.any():
            return SampledToken(token_id=-1, error=mask.why_nothing)
        at = launched.at[i]
        token, wanted = int(host.token_ids[at]), launched.rows[i].sequence.request.params.logprobs
        if token < 0:
            return SampledToken(token_id=-1, error=NUMERICAL_ERROR)
        if wanted is None or host.logprobs is None:
            return SampledToken(token)
        found = host.logprobs, host.ranks, host.top_ids, host.top_logprobs
        return SampledToken(token, _logprobs(token, at, found, wanted))

    # ---- prompt log-probabilities ----

    def _prompt_logprobs(
        self, parts: SequenceOf[SequenceOf[tuple[int, ScheduledRow]]], hidden: jax.Array | None, shape: StepShape
    ) -> tuple[list[int], Any, Any] | None:
        """Of prompt tokens start+1 .. start+count of each row: where each row's tokens start, the tokens, and the
        answer on its way. None: of none."""
        rows = [row for part in parts for _, row in part]
        if not any(_prompt_span(row) for row in rows):
            return None
        starts: list[int] = []
        for shard, part in enumerate(parts):
            ends = itertools.accumulate((row.count for _, row in part), initial=shard * shape.tokens)
            starts += itertools.islice(ends, len(part))
        targets = np.zeros(shape.tokens * self.shards, np.int32)
        for row, at in zip(rows, starts):
            span = _prompt_span(row)
            targets[at : at + len(span)] = row.sequence.tokens[span.start : span.stop]
        found = self.executables.prompt_logprobs(shape.tokens)(self.params, hidden, targets)
        for leaf in found:
            leaf.copy_to_host_async()
        return starts, targets, found


def _prompt_span(row: ScheduledRow) -> range:
    """The prompt tokens whose log-probabilities a row computes and its request wants."""
    if row.sequence.request.params.prompt_logprobs is None:
        return range(0)
    return range(row.start + 1, min(row.start + row.count + 1, row.sequence.num_prompt))


def _read_prompts(
    rows: SequenceOf[ScheduledRow], starts: list[int], targets: np.ndarray, found: Any
) -> list[tuple[TokenLogprobs, ...]]:
    host = jax.tree.map(np.asarray, found)
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
