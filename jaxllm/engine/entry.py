"""What the scheduler works out about a sequence once, and remembers of it between steps. Knows nothing of pages."""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.core import Sequence
from jaxllm.engine.policy import Key


@dataclass(slots=True, eq=False)
class Entry:
    key: Key
    min_len: int  # an ending token counts only beyond this many tokens
    max_len: int  # the sequence ends when it has this many
    endings: frozenset[int]  # eos and stop token ids
    steady: bool  # from min_len on the host need not see a token before the next is sampled
    admitted: bool = False
    num_prompt_logprobs: int = 0  # prompt tokens whose log-probabilities have been emitted

    @staticmethod
    def of(sequence: Sequence, key: Key, most: int) -> Entry:
        """`most`: tokens that any sequence may have."""
        request, params = sequence.request, sequence.request.params
        if params.max_tokens is not None:
            most = min(most, sequence.num_prompt + params.max_tokens)
        endings = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            endings |= frozenset(request.eos_token_ids)
        told = params.logprobs is not None or params.prompt_logprobs is not None  # more than a token comes back
        grammar = params.grammar is not None or sequence.grammar is not None
        masked = grammar or any(len(word) > 1 for word in request.bad_word_ids)
        return Entry(key, sequence.num_prompt + params.min_tokens, most, endings, not (told or masked))
