"""What a schedule must keep to. In: numbers. Out: the same, checked. Knows nothing of sequences or pages."""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.engine.buckets import UNPADDED, Padding


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a step and a sequence may use at most."""

    token_budget: int  # most tokens computed in a step
    max_num_seqs: int  # rows: most sequences running at once
    page_size: int
    max_model_len: int  # most tokens in a sequence, prompt and output together
    max_prefill_chunk: int | None = None  # most tokens of one sequence in a step
    padding: Padding = UNPADDED  # of steps with prefills
    decode_steps: int = 1  # in one dispatch, while nothing can change between them
    decode_steps_rows: int = 0  # most rows of such a dispatch

    def __post_init__(self) -> None:
        for name in ("token_budget", "max_num_seqs", "page_size", "max_model_len", "max_prefill_chunk", "decode_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be >= 1")
        if self.token_budget < self.max_num_seqs:
            raise ValueError(
                f"token_budget = {self.token_budget}: must be >= max_num_seqs ({self.max_num_seqs}), "
                "so that every running sequence can decode in every step"
            )
        if self.padding.sizes and self.padding.sizes[-1] < self.token_budget:
            raise ValueError(f"padding.sizes = {self.padding.sizes}: the last must be >= {self.token_budget}")
