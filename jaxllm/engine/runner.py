"""The device half of a step: a StepPlan goes in, one RowResult a row comes out.

Owns the parameters, the KV pages and the per-row sampling state; picks the bucket, packs the inputs, calls the compiled
step and reads the answers back. Knows nothing of policy, queues, stop conditions or text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import jax
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
from jaxllm.graph.compile import COUNTS_CHUNK, Executables, Ladder
from jaxllm.graph.inputs import SampleRow, StepShape, pack, pack_samples
from jaxllm.graph.kv_cache import KVCache
from jaxllm.graph.steps import Sampled, SampleMode

NUMERICAL_ERROR = "numerical_error: the model's logits for this sequence are not finite"


def has_penalties(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1


def sample_mode(params: SamplingParams, masked: bool) -> SampleMode:
    """The least the sampler must compute for one sequence."""
    if params.logprobs is not None:
        return SampleMode.LOGPROBS
    plain = params.greedy and not masked and not params.logit_bias and not has_penalties(params)
    return SampleMode.GREEDY if plain else SampleMode.SAMPLE


MODE_ORDER = list(SampleMode)  # from least to most work


@dataclass
class Runner:
    params: Any
    kv: KVCache
    counts: jax.Array  # u16[S+1, V]; row S takes the writes of padding rows
    executables: Executables
    ladder: Ladder
    vocab_size: int
    steps: int = 0
    _masks: dict[int, TokenMask] = field(default_factory=dict)  # by row
    _keys: dict[int, tuple[int, int]] = field(default_factory=dict)  # by row
    _neutral: dict[int, tuple[Any, Any, Any, Any]] = field(default_factory=dict)  # by bucket

    def run(self, plan: StepPlan) -> list[RowResult]:
        """One step on the device. Raises only for faults of the whole step; a sick row carries its own error."""
        self.steps += 1
        for sequence in plan.admitted:
            self._admit(sequence)
        rows = plan.rows
        shape = self.ladder.decode(len(rows)) if plan.decode_only else self.ladder.mixed(plan.num_tokens)
        packed = pack(
            shape,
            [token for row in rows for token in row.sequence.tokens[row.start : row.start + row.count]],
            [row.count for row in rows],
            [row.start + row.count for row in rows],
            [row.sequence.pages for row in rows],
        )
        hidden, last, self.kv = self.executables.forward(shape)(self.params, self.kv, packed)
        sampled = self._sample(rows, last, shape.rows) if any(row.sample for row in rows) else [None] * len(rows)
        prompts = self._prompt_logprobs(rows, hidden, shape)
        return [RowResult(token, prompt) for token, prompt in zip(sampled, prompts, strict=True)]

    def hidden_states(self, token_ids: SequenceOf[int], start: int, pages: SequenceOf[int]) -> np.ndarray:
        """The model's last hidden states of one sequence's tokens from `start` on, f32[count, D], through prefill."""
        shape = self.ladder.mixed(len(token_ids))
        packed = pack(shape, token_ids, [len(token_ids)], [start + len(token_ids)], [pages])
        hidden, _, self.kv = self.executables.forward(shape)(self.params, self.kv, packed)
        return np.asarray(jax.device_get(hidden)[: len(token_ids)], np.float32)

    def warm_up(self) -> None:
        """Run every executable once on padding, so that no request pays for a first launch."""
        for shape in self.ladder.shapes():
            packed = pack(shape, [], [], [], [])
            hidden, last, self.kv = self.executables.forward(shape)(self.params, self.kv, packed)
            if shape.decode:
                for mode in SampleMode:
                    self._call_sampler(mode, shape.rows, last, [])
            else:
                targets = np.zeros(shape.tokens, np.int32)
                self.executables.prompt_logprobs(shape.tokens)(self.params, hidden, targets)
        self._set_counts(self.counts.shape[0] - 1, [], in_prompt=True, fresh=True)
        jax.block_until_ready((self.kv, self.counts))

    # ---- per-row state ----

    def _admit(self, sequence: Sequence) -> None:
        """A sequence takes (or retakes, after preemption) its row: rebuild what the device and the masks know of it."""
        assert sequence.row is not None
        row, prompt, output = sequence.row, sequence.request.prompt_token_ids, sequence.output_token_ids
        self._keys[row] = stream_seed(sequence.request.seed, sequence.index)
        self._masks[row] = TokenMask(sequence, self.vocab_size)
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

    def _sample(self, rows: SequenceOf[ScheduledRow], last: jax.Array, bucket: int) -> list[SampledToken | None]:
        masks = [self._mask(row) for row in rows]
        wanted = [sample_mode(r.sequence.request.params, m is not None) for r, m in zip(rows, masks) if r.sample]
        mode = max(wanted, key=MODE_ORDER.index)
        sampled = self._call_sampler(mode, bucket, last, list(zip(rows, masks)))
        host = jax.device_get(sampled)
        return [self._token(row, i, host, masks[i]) if row.sample else None for i, row in enumerate(rows)]

    def _mask(self, row: ScheduledRow) -> np.ndarray | None:
        assert row.sequence.row is not None
        return self._masks[row.sequence.row].bits() if row.sample else None

    def _call_sampler(
        self, mode: SampleMode, bucket: int, last: jax.Array, rows: list[tuple[ScheduledRow, np.ndarray | None]]
    ) -> Sampled:
        packed, bias_ids, bias, mask = self._neutral_arrays(bucket)
        if mode is not SampleMode.GREEDY:
            scratch = self.counts.shape[0] - 1
            packed = pack_samples(bucket, [self._sample_row(row, scratch) for row, _ in rows], scratch)
        if any(row.sequence.request.params.logit_bias for row, _ in rows if row.sample):
            bias_ids, bias = self._bias_arrays(bucket, [row for row, _ in rows])
        if any(bits is not None for _, bits in rows):
            mask = np.full(mask.shape, 0xFFFFFFFF, np.uint32)
            for i, (_, bits) in enumerate(rows):
                mask[i] = mask[i] if bits is None else bits
        call = self.executables.sample(bucket, mode)
        sampled, self.counts = call(self.params, self.counts, last, packed, bias_ids, bias, mask)
        return sampled

    def _sample_row(self, row: ScheduledRow, scratch: int) -> SampleRow:
        sequence, params = row.sequence, row.sequence.request.params
        assert sequence.row is not None
        if not row.sample:
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

    def _token(self, row: ScheduledRow, i: int, host: Sampled, mask: np.ndarray | None) -> SampledToken:
        if mask is not None and not mask.any():
            assert row.sequence.row is not None
            return SampledToken(token_id=-1, error=self._masks[row.sequence.row].why_nothing)
        if host.bad[i]:
            return SampledToken(token_id=-1, error=NUMERICAL_ERROR)
        token, wanted = int(host.token_ids[i]), row.sequence.request.params.logprobs
        if wanted is None or host.logprobs is None:
            return SampledToken(token)
        found = host.logprobs, host.ranks, host.top_ids, host.top_logprobs
        return SampledToken(token, _logprobs(token, i, found, wanted))

    # ---- prompt log-probabilities ----

    def _prompt_logprobs(
        self, rows: SequenceOf[ScheduledRow], hidden: jax.Array, shape: StepShape
    ) -> list[tuple[TokenLogprobs, ...]]:
        """Of prompt tokens start+1 .. start+count of each row that asks for them."""
        wanted = [row.sequence.request.params.prompt_logprobs for row in rows]
        spans = [range(row.start + 1, min(row.start + row.count + 1, row.sequence.num_prompt)) for row in rows]
        if not any(n is not None and span for n, span in zip(wanted, spans)):
            return [()] * len(rows)
        tokens = self.ladder.mixed(shape.tokens).tokens
        rows_of_hidden: Any = hidden
        if tokens != shape.tokens:  # a decode bucket: its few rows take the smallest prompt bucket
            rows_of_hidden = np.pad(jax.device_get(hidden), ((0, tokens - shape.tokens), (0, 0)))
        targets = np.zeros(tokens, np.int32)
        starts = list(itertools.accumulate((row.count for row in rows), initial=0))
        for row, span, at in zip(rows, spans, starts):
            targets[at : at + len(span)] = row.sequence.tokens[span.start : span.stop]
        found = jax.device_get(self.executables.prompt_logprobs(tokens)(self.params, rows_of_hidden, targets))
        return [
            () if n is None else tuple(_logprobs(int(targets[at + i]), at + i, found, n) for i in range(len(span)))
            for n, span, at in zip(wanted, spans, starts)
        ]


def _logprobs(token: int, i: int, found: tuple[Any, Any, Any, Any], wanted: int) -> TokenLogprobs:
    """Entry i of (logprob, rank, top ids, top logprobs) with the best `wanted` alternatives."""
    logprob, rank, ids, values = found
    top = tuple((int(t), float(v)) for t, v in zip(ids[i, :wanted], values[i, :wanted]))
    return TokenLogprobs(token, float(logprob[i]), int(rank[i]), top)
