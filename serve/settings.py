"""What the front is told: where to listen, whom to let in, how much to take. Frozen; resolved once by the command line.

Knows nothing of engines (jaxllm.config does) and of sockets.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


def hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


@dataclass(frozen=True, kw_only=True)
class FrontSettings:
    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    model_names: tuple[str, ...] = ("model",)  # the first is echoed in answers
    # Who may come in. Keys are kept as SHA-256 digests; none = open, except for the admin routes.
    keys: tuple[bytes, ...] = ()
    admin_keys: tuple[bytes, ...] = ()
    public_metrics: bool = False
    allowed_origins: tuple[str, ...] = ()  # CORS; none = off
    # How much is taken.
    max_queue: int = 256  # sequences beyond those the batch holds
    max_queue_tokens: int = 1_000_000  # prompt tokens of requests that have no answer yet
    queue_timeout_s: float | None = 120.0
    max_body_bytes: int = 4 * 2**20
    max_headers: int = 128
    max_header_bytes: int = 32 * 1024
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    idle_timeout_s: float = 120.0
    max_connections: int = 4096
    requests_per_minute: int = 0  # of each key; 0 = no limit
    tokens_per_minute: int = 0
    stream_limit_tokens: int = 65536  # undelivered tokens of one stream before it is ended
    ping_s: float = 15.0
    drain_timeout_s: float = 30.0
    stall_s: float = 60.0  # a step that lasts longer ends the engine with exit code 70
    unhealthy_s: float = 10.0
    metrics_compat_vllm: bool = False
    otlp_traces_endpoint: str | None = None
    tool_parser: str = "auto"  # a name of serve.openai.parsers.output, "none", or what the chat template shows
    reasoning_parser: str = "auto"
    template_timeout_s: float = 2.0  # for rendering one conversation
    max_stored_responses: int = 256
    template_variables: frozenset[str] = field(
        default=frozenset({"enable_thinking", "thinking", "thinking_budget", "reasoning_effort", "custom_instructions"})
    )
