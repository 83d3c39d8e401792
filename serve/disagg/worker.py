"""A prefill worker: listens for one decode server, computes its prompts, sends their pages through this host's memory.

In: a PrefillSide and messages over ZeroMQ. Out: the same socket. A decode server that is silent too long is forgotten
with all it asked for; another one is told to wait until then. Knows nothing of HTTP or of where pages go.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import signal
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import typer
import zmq

from jaxllm.config import ConfigError, EngineConfig
from jaxllm.core import Grammar, RequestError, Sequence
from jaxllm.engine.decoding.structured import GrammarCompiler
from jaxllm.engine.disagg.handoff import FirstToken, Item, Key, PageBlock, PrefillFailed
from jaxllm.engine.disagg.messages import (
    VERSION,
    Asked,
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
from jaxllm.engine.disagg.prefill import PrefillSide

log = logging.getLogger(__name__)
IDLE_WAIT_S, PREPARE_WAIT_S = 0.1, 0.005
GONE_S = 3.0  # a server that says nothing for so long makes room for another one
BROKEN = 71  # exit code: its state cannot be trusted any more


@dataclass
class PrefillWorker:
    side: PrefillSide
    grammars: GrammarCompiler | None
    socket: zmq.Socket[bytes]  # ROUTER
    model: str  # digest: see peers.digest_of
    silent_s: float
    stopped: bool = False
    _client: bytes | None = None
    _session: int = 0
    _heard_s: float = 0.0
    _owed_bytes: int = 0  # of blocks that the client has not said it landed
    _keys: dict[int, Key] = field(default_factory=dict)  # by job
    _jobs: dict[Key, int] = field(default_factory=dict)
    _preparing: dict[int, tuple[Begin, Future[Any]]] = field(default_factory=dict)  # their grammars compile

    def __post_init__(self) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Asked).decode

    def run(self) -> None:
        """Until `stopped`. Raises when a step failed twice in a row."""
        while not self.stopped:
            for client, message in self._receive():
                self._hear(client, message)
            self._admit_prepared()
            owes = self._keys or self._preparing or self._owed_bytes  # a server at rest says nothing
            if owes and time.monotonic() - self._heard_s > self.silent_s:
                log.warning("the decode server is silent: its prompts are dropped")
                self._leave()
            for item in self.side.turn(wait=self.side.busy):
                self._say(item)

    def _receive(self) -> list[tuple[bytes, Any]]:
        patience = PREPARE_WAIT_S if self._preparing else IDLE_WAIT_S
        if not self.socket.poll(0 if self.side.busy else int(patience * 1000)):
            return []
        found = []
        while True:
            try:
                client, data = self.socket.recv_multipart(zmq.NOBLOCK)
                found.append((client, self._decode(data)))
            except zmq.Again:
                return found
            except (msgspec.DecodeError, ValueError):
                log.warning("a message that no decode server sends was dropped")

    # ---- what the decode server says ----

    def _hear(self, client: bytes, message: Any) -> None:
        if isinstance(message, Hello):
            self._greet(client, message)
        if client != self._client:
            return
        self._heard_s = time.monotonic()
        match message:
            case Begin():
                self._begin(message)
            case Cancel():
                self._preparing.pop(message.job, None)
                key = self._forget(message.job)
                if key is not None:
                    self.side.cancel(key)
            case Landed() if message.session == self._session:
                self._owed_bytes -= message.num_bytes
                self.side.release(message.num_bytes)
            case Forget():
                self.side.forget_cached()

    def _greet(self, client: bytes, hello: Hello) -> None:
        own = Hello(VERSION, self.model, self.side.scheduler.config.page_size)
        if hello != own:
            self._send(client, Unlike(f"the decode server has {_shown(hello)}, this prefill worker {_shown(own)}"))
            return
        if self._client not in (None, client):
            if time.monotonic() - self._heard_s < GONE_S:
                self._send(client, Unlike("this prefill worker serves another decode server"))
                return
            self._leave()
        if self._client is None:
            self._client, self._session = client, secrets.randbits(48)
        pool, limits = self.side.scheduler.pool, self.side.scheduler.config
        most = min(limits.max_model_len, pool.num_pages * pool.page_size) - 1
        self._send(client, Welcome(self._session, most, self.side.stats()))

    def _begin(self, begin: Begin) -> None:
        spec = begin.request.params.grammar
        if spec is None:
            self._admit(begin, None)
        elif self.grammars is None:
            self._send_home(Failure(begin.job, f"invalid_request/{spec.field}: the prefill worker has no tokenizer"))
        else:
            self._preparing[begin.job] = begin, self.grammars.submit(spec)

    def _admit_prepared(self) -> None:
        for job, (begin, future) in list(self._preparing.items()):
            if future.done():
                del self._preparing[job]
                error = future.exception()
                if error is None:
                    self._admit(begin, future.result())
                else:
                    log.error("a grammar could not be compiled here", exc_info=error)
                    self._send_home(Failure(job, "internal_error: compiling this request's grammar failed"))

    def _admit(self, begin: Begin, grammar: Grammar | None) -> None:
        key = Key(str(begin.job), begin.index, 0)
        request = dataclasses.replace(begin.request, id=key.request_id)
        try:
            self.side.begin(key, Sequence(request, begin.index, grammar=grammar), begin.first_page)
        except RequestError as error:
            self._send_home(Failure(begin.job, f"invalid_request/{error.field}: {error}"))
            return
        self._keys[begin.job], self._jobs[key] = key, begin.job

    def _forget(self, job: int) -> Key | None:
        key = self._keys.pop(job, None)
        if key is not None:
            self._jobs.pop(key)
        return key

    def _leave(self) -> None:
        """The client is gone: nothing is computed for it any more, and nothing is owed."""
        for job in list(self._keys):
            key = self._forget(job)
            if key is not None:
                self.side.cancel(key)
        self._preparing.clear()
        self.side.release(self._owed_bytes)
        self._client, self._owed_bytes = None, 0

    # ---- what it is told ----

    def _say(self, item: Item) -> None:
        match item:
            case PageBlock():
                self._send_block(item)
            case FirstToken(key, result, num_cached) if key in self._jobs and result.sampled is not None:
                token = result.sampled
                job = self._jobs[key]
                self._send_home(First(job, token.token_id, token.logprobs, result.prompt_logprobs, num_cached))
            case PrefillFailed(key, error) if key in self._jobs:
                job = self._jobs[key]
                self._forget(job)
                self._send_home(Failure(job, error))

    def _send_block(self, block: PageBlock) -> None:
        """A job is known until it is cancelled: its last pages follow its first token."""
        entries = [(self._jobs.get(key, -1), number) for key, number in block.entries]
        if self._client is None or all(job < 0 for job, _ in entries):
            self.side.landed(block)
            return
        head = self._encode(Block(block.layers.start, block.layers.stop, entries))
        pages = np.asarray(block.pages)
        self._owed_bytes += pages.nbytes
        self._send_frames(self._client, head, pages.view(np.uint8).reshape(-1).data)

    def _send_home(self, message: Told) -> None:
        if self._client is not None:
            self._send(self._client, message)

    def _send(self, client: bytes, message: Told) -> None:
        self._send_frames(client, self._encode(message))

    def _send_frames(self, client: bytes, *frames: Any) -> None:
        try:
            self.socket.send_multipart([client, *frames], copy=False)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            if client == self._client:
                log.warning("the decode server is gone: its prompts are dropped")
                self._leave()


def _shown(hello: Hello) -> str:
    return f"version {hello.version}, model {hello.model}, pages of {hello.page_size} tokens"


def bind(address: str) -> zmq.Socket[bytes]:
    """ConfigError when the address cannot be listened on."""
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    socket.set(zmq.ROUTER_MANDATORY, 1)  # what has left is an error, not silence
    socket.set_hwm(0)  # bytes under way are bounded by what has landed
    socket.set(zmq.LINGER, 0)
    try:
        socket.bind(f"tcp://{address}")
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(f"disaggregation.listen = {address!r}: cannot listen there: {error.strerror}") from None
    return socket


def run_worker(config: EngineConfig) -> int:
    """Loads, listens, works until a signal comes; returns the exit code."""
    from jaxllm.engine.disagg.startup import start_prefill
    from serve.disagg.peers import digest_of

    socket = bind(config.disaggregation.listen)  # what is wrong with it is said before anything slow starts
    engine, side, report = start_prefill(config)
    worker = PrefillWorker(side, engine.grammars, socket, digest_of(engine), config.disaggregation.silent_s)

    def stop(*_: object) -> None:
        worker.stopped = True

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    log.info("%s", report)
    typer.echo(f"Prefill worker at {config.disaggregation.listen}")
    try:
        worker.run()
    except Exception:
        log.exception("the prefill worker cannot go on")
        os._exit(BROKEN)  # the device's calls may not let go
    return 0
