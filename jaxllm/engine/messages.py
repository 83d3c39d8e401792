"""What crosses between a front and the engine's thread or process: commands in, events out, typed and tagged.

Plain msgspec structs (core's dataclasses inside), so that the same values go through a queue or, as msgpack, through a
socket; nothing is ever unpickled. Knows nothing of sockets, threads or HTTP.
"""

from __future__ import annotations

from typing import Any

import msgspec

from jaxllm.core import Request, SamplingParams, TokenLogprobs

# ---- commands: front -> engine ----


class Add(msgspec.Struct, tag="add", frozen=True):
    request: Request
    queue_timeout_s: float | None = None  # give up when not admitted to the batch within this time


class Abort(msgspec.Struct, tag="abort", frozen=True):
    request_id: str
    index: int | None = None  # None: every sequence of the request


class Control(msgspec.Struct, tag="control", frozen=True):
    """One of operations.OPERATIONS; answered by a Reply of the same id."""

    id: int
    operation: str
    arguments: dict[str, Any] = {}


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """End the loop; what still runs is dropped."""


Command = Add | Abort | Control | Stop

# ---- events: engine -> front ----


class News(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What one sequence learned in a step."""

    request_id: str
    index: int
    token_id: int | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached: int = 0
    error: str | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    began_s: float | None = None  # once, by this machine's monotonic clock: when the request came into the batch


class Step(msgspec.Struct, tag="step", frozen=True):
    news: list[News]
    weights_version: str = ""  # of the weights that this step was computed with


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The engine is warm: what a front needs to make requests, and facts for people."""

    max_model_len: int
    max_num_seqs: int
    capacity_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    default_params: SamplingParams
    facts: dict[str, Any] = {}


class Beat(msgspec.Struct, tag="beat", frozen=True):
    """Sent about every second from beside the loop, so that it also comes when the loop hangs."""

    stalled_s: float  # how long the current turn has been running; 0 between turns
    paused: bool
    sick: bool  # numerical errors in several steps in a row
    stats: dict[str, float]
    asleep: bool = False


class Reply(msgspec.Struct, tag="reply", frozen=True):
    id: int
    value: Any = None
    error: str | None = None


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The engine cannot start or go on: the message is for people."""

    message: str
    exit_code: int = 1


Event = Step | Ready | Beat | Reply | Failed
