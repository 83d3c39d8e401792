"""What a call consumed, as OpenAI counts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.streams import Stream


def weights_of(stream: Stream) -> dict[str, Any]:
    """Which weights answered: as OpenAI says it, and by name; for rollouts that change them on the way."""
    version = stream.weights_version
    return {"system_fingerprint": f"weights-{version}" if version else None, "weights_version": version or None}


def usage_of(streams: Sequence[Stream], tokens: int | None = None) -> dict[str, Any]:
    """`tokens`: what to show for the generated ones, when not their number."""
    prompt = sum(len(stream.request.prompt_token_ids) for stream in streams)
    completion = sum(stream.num_tokens for stream in streams) if tokens is None else tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(stream.num_cached for stream in streams)},
    }
