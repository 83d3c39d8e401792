"""Tokens of one sequence to pieces of text: detokenised without half characters, cut at stop strings.

In: token ids in order. Out: text that is final, and the stop string that ended it. Knows nothing of sequences, logprobs
or HTTP.
"""

from __future__ import annotations

from jaxllm.core import Request
from jaxllm.engine.decoding.stop import IncrementalDetokenizer, StopChecker, TokenPieces


class TextAssembler:
    def __init__(self, tokenizer: TokenPieces | None, request: Request) -> None:
        params = request.params
        self._stop = StopChecker(params.stop, include_stop_str=params.include_stop_str_in_output)
        self._detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None and params.detokenize:
            prompt, skip = request.prompt_token_ids, params.skip_special_tokens
            self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt, skip_special_tokens=skip)
        self._min_tokens, self._count = params.min_tokens, 0

    @property
    def stopped_by(self) -> str | None:
        return self._stop.matched

    def push(self, token_id: int) -> str:
        """The text that became final with this token; "" once a stop string was found."""
        self._count += 1
        if self._detokenizer is None:
            return ""
        return self._stop.push(self._detokenizer.push(token_id), may_stop=self._count > self._min_tokens)

    def finish(self) -> str:
        """What was held back; the sequence has ended."""
        if self._detokenizer is None or self._stop.matched is not None:
            return ""
        return self._stop.push(self._detokenizer.flush(), may_stop=False) + self._stop.flush()
