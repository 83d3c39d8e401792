"""Log-probabilities in the two shapes OpenAI gives them. No JAX, no HTTP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from jaxllm.core import TokenLogprobs

LOWEST = -9999.0  # JSON has no minus infinity


class TokenNames(Protocol):
    def token_bytes(self, token_id: int) -> bytes: ...


def _value(logprob: float) -> float:
    return max(logprob, LOWEST) if logprob == logprob else LOWEST


class Namer:
    """How a token is written in an answer."""

    def __init__(self, tokenizer: TokenNames | None) -> None:
        self._tokenizer = tokenizer

    def raw(self, token_id: int) -> bytes:
        return b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)

    def text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._tokenizer is None else self.raw(token_id).decode("utf-8", "replace")


def chat_logprobs(found: Iterable[TokenLogprobs], namer: Namer) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": namer.text(token_id), "logprob": _value(logprob), "bytes": list(namer.raw(token_id))}

    content = [
        {**entry(one.token_id, one.logprob), "top_logprobs": [entry(token, value) for token, value in one.top]}
        for one in found
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(found: Sequence[TokenLogprobs | None], texts: list[str], offset: int) -> dict[str, Any]:
    """`texts` are the tokens' own, where they begin at `offset` of the choice's text; None = nothing precedes it."""
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "text_offset": offsets,
        "tokens": texts,
        "token_logprobs": [None if one is None else _value(one.logprob) for one in found],
        "top_logprobs": [],
    }


def completion_tops(found: Sequence[TokenLogprobs | None], namer: Namer) -> list[dict[str, float] | None]:
    """The alternatives of each position with the chosen token among them."""
    tops: list[dict[str, float] | None] = []
    for one in found:
        if one is None:
            tops.append(None)
            continue
        top = {namer.text(token): _value(value) for token, value in one.top}
        top.setdefault(namer.text(one.token_id), _value(one.logprob))
        tops.append(top)
    return tops


def prompt_logprobs(found: Sequence[TokenLogprobs], namer: Namer) -> list[dict[str, Any] | None]:
    """vLLM's shape: a dict from token id to logprob, rank and text for each prompt token but the first."""
    entries: list[dict[str, Any] | None] = [None]
    for one in found:
        ranked = {token: (value, rank) for rank, (token, value) in enumerate(one.top, 1)}
        ranked[one.token_id] = (one.logprob, one.rank)
        entries.append(
            {
                str(token): {"logprob": _value(value), "rank": rank, "decoded_token": namer.text(token)}
                for token, (value, rank) in ranked.items()
            }
        )
    return entries
