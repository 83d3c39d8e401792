"""From what a user sent to a Request: encoded, every token id and length checked, a seed drawn.

In: text or token ids, and SamplingParams. Out: a Request, or RequestError naming field, value and what is allowed. For
the engine and for a front in another process, so it needs no device. Knows nothing of queues, pages, HTTP or chats.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxllm.core import Request, RequestError, SamplingParams
from jaxllm.engine.decoding.mask import check_mask

if TYPE_CHECKING:
    from jaxllm.tokenizer import Tokenizer


@dataclass
class Intake:
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    tokenizer: Tokenizer | None = None  # None: token ids in, token ids out
    default_params: SamplingParams = field(default_factory=SamplingParams)
    seeds: random.Random = field(default_factory=random.Random)
    _ids: itertools.count = field(default_factory=itertools.count)

    def make_request(
        self,
        prompt: str | SequenceOf[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Request:
        """Check and encode what a user sent. Raises RequestError naming field, value and allowed range."""
        params = params or self.default_params
        ids = self.encode(prompt) if isinstance(prompt, str) else self.check_ids("prompt", prompt)
        if not ids:
            raise RequestError("prompt", prompt, "must hold at least one token (this model has no start token)")
        if len(ids) >= self.max_model_len:
            allowed = f"must have at most {self.max_model_len - 1} tokens, to leave room for one in the context of "
            raise RequestError("prompt", f"{len(ids)} tokens", f"{allowed}{self.max_model_len}")
        self.check_ids("logit_bias", list(params.logit_bias or ()))
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise RequestError("stop", (*params.stop, *params.bad_words), "needs a tokenizer; the model has none")
        request = Request(
            id=request_id if request_id is not None else f"request-{next(self._ids)}",
            prompt_token_ids=ids,
            params=params,
            eos_token_ids=self.eos_token_ids,
            bad_word_ids=self._bad_word_ids(params.bad_words),
            seed=self.seeds.getrandbits(63) if params.seed is None else params.seed,
            priority=priority,
            cache_salt=cache_salt,
        )
        check_mask(request, self.vocab_size)
        return request

    def encode(self, prompt: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """A text's ids, the model's own specials around it; of an empty text the start token, if there is one."""
        if self.tokenizer is None:
            raise RequestError("prompt", prompt, "must be token ids; the model directory has no tokenizer.json")
        ids = tuple(self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens))
        return ids if ids or self.bos_token_id is None else (self.bos_token_id,)

    def check_ids(self, name: str, ids: SequenceOf[int]) -> tuple[int, ...]:
        if ids and {*map(type, ids)} == {int} and min(ids) >= 0 and max(ids) < self.vocab_size:
            return tuple(ids)  # in a fifth of the time
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise RequestError(name, token, f"token ids must be integers in [0, {self.vocab_size - 1}]")
        return tuple(ids)

    def _bad_word_ids(self, words: SequenceOf[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as it stands and after a space: a tokenizer spells the two differently."""
        if not words or self.tokenizer is None:
            return ()
        spelled = (text for word in words for text in (word, " " + word.lstrip()))
        ids = (tuple(self.tokenizer.encode(text, add_special_tokens=False)) for text in spelled)
        return tuple(dict.fromkeys(found for found in ids if found))
