"""The decode server's end: prompts to prefill workers, their pages and first tokens back. Satisfies Prefills.

Each prompt goes to the worker with the fewest prompt tokens before it. A worker that is gone or silent loses its
prompts to the others, or to itself when it comes back: no token of theirs was told, so none is told twice. A prompt
that no worker takes in time, or whose workers died too often, fails. Knows nothing of schedules or HTTP.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

from jaxllm.config import ConfigError, DisaggregationConfig, EngineConfig, model_directory
from jaxllm.core import Request, RequestError, RowResult, SampledToken, Sequence
from jaxllm.engine.disagg.engine import DisaggregatedEngine
from jaxllm.engine.disagg.handoff import FirstToken, Item, Key, PageBlock, PrefillFailed, PrefillRestarted
from jaxllm.engine.disagg.messages import (
    VERSION,
    Begin,
    Block,
    Cancel,
    Failure,
    First,
    Forget,
    Hello,
    Landed,
    Told,
    Unlike,
    Welcome,
)
from jaxllm.engine.engine import Engine

if TYPE_CHECKING:
    from jaxllm.engine.startup import StartReport

log = logging.getLogger(__name__)
SIGN_S = 1.0
WAIT_S = 0.02
UNAVAILABLE = "prefill_unavailable: no prefill worker was there for this request in time"
DIED = "prefill_died: the prefill workers that computed this request's prompt died; try again"


@dataclass(frozen=True)
class Form:
    """What a block looks like: every number but its layers and pages."""

    num_kv_heads: int
    page_size: int
    head_dim: int
    dtype: Any
    carry: Callable[[np.ndarray], Any]  # begins to bring a block to where it can be put


@dataclass(eq=False)
class _Prompt:
    """One that is asked for."""

    key: Key
    request: Request
    first_page: int
    waits_since_s: float
    job: int = -1  # of this attempt; -1: no worker has it
    deaths: int = 0

    @property
    def tokens(self) -> int:
        return len(self.request.prompt_token_ids)


@dataclass(eq=False)
class _Peer:
    """One worker, dead or alive."""

    address: str
    socket: zmq.Socket[bytes] | None = None
    monitor: zmq.Socket[bytes] | None = None
    welcome: Welcome | None = None  # None: it may not be given prompts
    said_s: float = 0.0  # the last Hello
    unanswered_s: float | None = None  # the first Hello that nothing has followed
    why_not: str = ""  # as it was last logged
    prompts: dict[int, _Prompt] = field(default_factory=dict)  # by job

    @property
    def session(self) -> int:
        return -1 if self.welcome is None else self.welcome.session

    @property
    def load_tokens(self) -> int:
        return sum(prompt.tokens for prompt in self.prompts.values())


@dataclass
class PrefillPeers:
    settings: DisaggregationConfig
    hello: Hello
    form: Form
    restarts: int = 0  # prompts that lost their worker
    _context: zmq.Context[Any] = field(default_factory=zmq.Context)
    _peers: list[_Peer] = field(default_factory=list)
    _prompts: dict[Key, _Prompt] = field(default_factory=dict)
    _waiting: deque[_Prompt] = field(default_factory=deque)
    _landing: deque[tuple[_Peer, PageBlock]] = field(default_factory=deque)  # on their way to the device
    _given: dict[int, tuple[_Peer, int]] = field(default_factory=dict)  # by id of a block: from whom, in which session
    _numbers: itertools.count = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Told).decode
        self._peers = [_Peer(address) for address in self.settings.workers]
        for peer in self._peers:
            self._connect(peer)

    # ---- requests ----

    def check_fits(self, request: Request) -> None:
        known = [peer.welcome.max_prompt_tokens for peer in self._peers if peer.welcome is not None]
        length = len(request.prompt_token_ids)
        if known and length > max(known):
            raise RequestError(
                "prompt_token_ids", f"{length} tokens", f"must have at most {max(known)}: no prefill worker holds more"
            )

    def begin(self, key: Key, sequence: Sequence, first_page: int) -> None:
        prompt = self._prompts[key] = _Prompt(key, sequence.request, first_page, time.monotonic())
        self._waiting.append(prompt)

    @property
    def moving(self) -> bool:
        return False  # their pages are theirs to let go

    def cancel(self, key: Key) -> None:
        prompt = self._prompts.pop(key, None)
        if prompt is None:
            return
        if prompt.job < 0:
            self._waiting.remove(prompt)
        for peer in self._peers:
            if peer.prompts.pop(prompt.job, None) is not None:
                self._say(peer, Cancel(prompt.job))

    def landed(self, block: PageBlock) -> None:
        peer, session = self._given.pop(id(block))
        if peer.session == session:
            self._say(peer, Landed(session, block.pages.nbytes))

    # ---- a turn ----

    def turn(self, wait: bool) -> list[Item]:
        found: list[Item] = []
        now = time.monotonic()
        if wait and not self._landing:
            self._await()
        for peer in self._peers:
            self._listen(peer, found)
            if peer.unanswered_s is not None and now - peer.unanswered_s > self.settings.silent_s:
                self._lose(peer, found, f"it has been silent for {self.settings.silent_s:g} s")
            if now - peer.said_s > SIGN_S and self._say(peer, self.hello):
                peer.said_s = now
                peer.unanswered_s = peer.unanswered_s or now
        self._assign(now, found)
        self._deliver(found, wait and not found)
        return found

    def _await(self) -> None:
        poller = zmq.Poller()
        for peer in self._peers:
            for socket in (peer.socket, peer.monitor):
                if socket is not None:
                    poller.register(socket, zmq.POLLIN)
        poller.poll(int(WAIT_S * 1000))

    def _listen(self, peer: _Peer, found: list[Item]) -> None:
        while peer.monitor is not None and peer.monitor.poll(0):
            if recv_monitor_message(peer.monitor)["event"] == zmq.EVENT_DISCONNECTED:
                self._lose(peer, found, "its connection broke")
                return
        while peer.socket is not None and peer.socket.poll(0):
            head, *pages = peer.socket.recv_multipart(copy=False)
            peer.unanswered_s = None
            try:
                self._hear(peer, self._decode(head.buffer), pages, found)
            except (msgspec.DecodeError, ValueError, IndexError) as error:
                self._lose(peer, found, f"what it says is no prefill worker's ({error})")
                return

    def _hear(self, peer: _Peer, message: Any, pages: list[Any], found: list[Item]) -> None:
        match message:
            case Welcome():
                if peer.welcome is None:
                    log.warning("prefill worker %s is there", peer.address)
                elif peer.session != message.session:
                    self._lose(peer, found, "it had given this server up")
                    return
                peer.welcome, peer.why_not = message, ""
            case Unlike():
                if peer.why_not != message.why:
                    log.error("prefill worker %s is not used: %s", peer.address, message.why)
                peer.why_not = message.why
                if peer.welcome is not None:
                    self._lose(peer, found, message.why)
            case Block():
                self._receive(peer, message, pages[0])
            case First() if message.job in peer.prompts:
                token = SampledToken(message.token_id, message.logprobs)
                result = RowResult(token, message.prompt_logprobs)
                found.append(FirstToken(peer.prompts[message.job].key, result, message.num_cached))
            case Failure() if message.job in peer.prompts:
                prompt = peer.prompts.pop(message.job)
                del self._prompts[prompt.key]
                found.append(PrefillFailed(prompt.key, message.error))

    def _receive(self, peer: _Peer, head: Block, frame: Any) -> None:
        form, layers = self.form, range(head.first, head.last)
        pages = np.frombuffer(frame.buffer, form.dtype)  # it stays in the message's memory
        pages = pages.reshape(len(layers), 2, -1, form.num_kv_heads, form.page_size, form.head_dim)
        nobody = Key("", 0, -1)
        owners = ((peer.prompts.get(job), number) for job, number in head.entries)
        entries = [(nobody if owner is None else owner.key, number) for owner, number in owners]
        self._landing.append((peer, PageBlock(layers, entries, form.carry(pages))))

    def _deliver(self, found: list[Item], wait: bool) -> None:
        """Blocks that the device has: putting one that is still on its way would make the next step wait for it."""
        while self._landing and (wait or self._landing[0][1].pages.is_ready()):
            peer, block = self._landing.popleft()
            block.pages.block_until_ready()
            self._given[id(block)] = peer, peer.session
            found.append(block)
            wait = False

    def _assign(self, now: float, found: list[Item]) -> None:
        for prompt in list(self._waiting):
            able = [peer for peer in self._peers if peer.welcome and peer.welcome.max_prompt_tokens >= prompt.tokens]
            if able:
                peer = min(able, key=lambda peer: peer.load_tokens)
                prompt.job = next(self._numbers)
                peer.prompts[prompt.job] = prompt
                self._waiting.remove(prompt)
                self._say(peer, Begin(prompt.job, prompt.request, prompt.key.index, prompt.first_page))
            elif now - prompt.waits_since_s > self.settings.wait_s:
                self._waiting.remove(prompt)
                del self._prompts[prompt.key]
                found.append(PrefillFailed(prompt.key, UNAVAILABLE))

    # ---- connections ----

    def _connect(self, peer: _Peer) -> None:
        socket = peer.socket = self._context.socket(zmq.DEALER)
        socket.set_hwm(0)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.IMMEDIATE, 1)  # nothing waits for a worker that is not there
        socket.set(zmq.RECONNECT_IVL, 100)
        peer.monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.connect(f"tcp://{peer.address}")
        peer.said_s, peer.unanswered_s = 0.0, None

    def _lose(self, peer: _Peer, found: list[Item], why: str) -> None:
        """Its prompts wait for a worker again. The socket goes: nothing that was meant for it reaches its successor."""
        if peer.welcome is not None:
            log.warning("prefill worker %s is lost: %s; %d prompts wait", peer.address, why, len(peer.prompts))
        assert peer.socket is not None
        peer.socket.disable_monitor()
        peer.socket.close(linger=0)
        if peer.monitor is not None:
            peer.monitor.close(linger=0)
        peer.welcome = None
        self._landing = deque(one for one in self._landing if one[0] is not peer)
        prompts, peer.prompts = list(peer.prompts.values()), {}
        for prompt in prompts:
            prompt.deaths += 1
            self.restarts += 1
            if prompt.deaths > self.settings.retries:
                del self._prompts[prompt.key]
                found.append(PrefillFailed(prompt.key, DIED))
            else:
                prompt.job, prompt.waits_since_s = -1, time.monotonic()
                self._waiting.append(prompt)
                found.append(PrefillRestarted(prompt.key))
        self._connect(peer)

    def _say(self, peer: _Peer, message: Any) -> bool:
        """False: nobody is connected."""
        assert peer.socket is not None
        try:
            peer.socket.send(self._encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    # ---- accounts ----

    def stats(self) -> dict[str, float]:
        """The workers' own, as they were last heard, summed."""
        there = [peer.welcome.stats for peer in self._peers if peer.welcome is not None]
        total = {name: sum(stats.get(name, 0) for stats in there) for stats in there for name in stats}
        return total | {"prefill_workers": len(there), "prefill_restarts": self.restarts}

    def forget_cached(self) -> None:
        for peer in self._peers:
            if peer.welcome is not None:
                self._say(peer, Forget())

    def check(self) -> None:
        given = {prompt.key for peer in self._peers for prompt in peer.prompts.values()}
        assert given | {prompt.key for prompt in self._waiting} == set(self._prompts), "a prompt is lost"

    def close(self) -> None:
        for peer in self._peers:
            for socket in (peer.monitor, peer.socket):
                if socket is not None:
                    socket.close(linger=0)
        self._context.destroy(linger=0)


def digest_of(engine: Engine) -> str:
    """Of everything that must be alike for one engine's pages to be another's: the model, its weights, their dtype."""
    model = engine.config.model
    parts = [repr(engine.model_config), model.dtype, model.quantization, str(model.quantization_group)]
    if model.load_format == "dummy":
        parts.append(f"dummy {engine.config.seed}")
    else:
        files = sorted(model_directory(model.path).glob("*.safetensors"))
        parts += [f"{file.name} {file.stat().st_size}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def start_decoding(config: EngineConfig) -> tuple[DisaggregatedEngine, StartReport]:
    """The decode server's engine; its workers may come later."""
    import jax

    from jaxllm.engine.disagg.startup import start_decode

    if not config.disaggregation.workers:
        raise ConfigError("disaggregation.role = 'decode': name its prefill workers in disaggregation.workers")

    def connect(engine: Engine, putter: Any) -> PrefillPeers:
        model, page_size = engine.model_config, engine.scheduler.config.page_size
        hello = Hello(VERSION, digest_of(engine), page_size)
        dtype = np.dtype(jax.numpy.dtype(engine.config.model.dtype))
        carry = lambda block: jax.device_put(block, putter.block)  # noqa: E731
        return PrefillPeers(
            config.disaggregation, hello, Form(model.num_kv_heads, page_size, model.head_dim, dtype, carry)
        )

    return start_decode(config, connect)
