"""What a decode server and its prefill workers say to each other. A block's pages are a frame of their own behind it.

Typed and tagged msgspec structs (core's dataclasses inside). A job is a number the decode side draws for each attempt
at a prompt, so that nothing late is taken for something else. Knows nothing of sockets.
"""

from __future__ import annotations

import msgspec

from jaxllm.core import Request, TokenLogprobs

VERSION = 1

# ---- decode -> prefill ----


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """The first message, and the sign of life: what both sides must have alike."""

    version: int
    model: str  # digest of the model's shape, and of what its pages hold
    page_size: int


class Begin(msgspec.Struct, tag="begin", frozen=True):
    job: int
    request: Request
    index: int
    first_page: int  # pages before it are not wanted


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    job: int


class Landed(msgspec.Struct, tag="landed", frozen=True):
    """So many bytes of blocks are needed no more."""

    session: int  # that they were sent in
    num_bytes: int


class Forget(msgspec.Struct, tag="forget", frozen=True):
    """Cached pages are not to be found again."""


Asked = Hello | Begin | Cancel | Landed | Forget

# ---- prefill -> decode ----


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    """Answers each Hello: also the worker's sign of life."""

    session: int  # another one than before: the worker has forgotten what it was asked
    max_prompt_tokens: int
    stats: dict[str, float]


class Unlike(msgspec.Struct, tag="unlike", frozen=True):
    """The two cannot work together; the message is for people."""

    why: str


class Block(msgspec.Struct, tag="block", frozen=True):
    """The next frame holds pages [L, 2, N, K, page, H] of layers first to last - 1: whose, and which of their pages."""

    first: int
    last: int
    entries: list[tuple[int, int]]  # job, number of the page


class First(msgspec.Struct, tag="first", frozen=True):
    job: int
    token_id: int
    logprobs: TokenLogprobs | None
    prompt_logprobs: tuple[TokenLogprobs, ...]
    num_cached: int


class Failure(msgspec.Struct, tag="failure", frozen=True):
    job: int
    error: str


Told = Welcome | Unlike | Block | First | Failure
