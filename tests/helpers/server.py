"""A real server on a loopback port for tests: uvicorn in a thread, the engine in another thread or in a process.

`Server.call` is a plain HTTP client; `Server.raw` gives a socket for what no client would send. `settle` and `check_a`
are faults.md's check A.
"""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import uvloop
from helpers.byte_model import build_engine, byte_tokenizer

from jaxllm.config import model_directory
from jaxllm.engine.process.fleet import FleetLink
from jaxllm.engine.process.links import ProcessLink, ThreadLink
from jaxllm.tokenizer import Tokenizer
from serve.client import EngineClient, Supervision
from serve.commands.serve import link_of
from serve.front import Front
from serve.metrics import FrontMetrics
from serve.run import bind, make_server
from serve.settings import FrontSettings, hash_key

ADMIN = "admin-key"
DRAFT = "first-light-draft"  # the smaller of the bundled models: a third of the layers to compile, faster steps
REAL = {"model": DRAFT, "max_num_seqs": 8, "max_num_batched_tokens": 64, "num_pages": 256, "max_model_len": 512}
HEAD = {"authorization": f"Bearer {ADMIN}"}


def settings(**changes):
    return replace(FrontSettings(port=0, model_names=("byte",), admin_keys=(hash_key(ADMIN),)), **changes)


class Server:
    """`bundled`: settings of the real engine, which then runs a bundled model in a process of its own, or in several.
    `fleet`: so many engines without a device, each in a process."""

    def __init__(
        self,
        front_settings=None,
        *,
        process=False,
        fleet=0,
        wait=True,
        supervision=None,
        env_settings=None,
        bundled=None,
        tokenizer=None,
        **engine,
    ):
        self._wait = wait
        self.settings = front_settings or settings()
        if bundled is not None:
            overrides = {**REAL, **bundled}
            model = model_directory(overrides["model"])
            tokenizer = tokenizer or Tokenizer.from_directory(model)
            self.link = link_of(self.settings, {"config_file": None, "overrides": overrides}, in_process=False)
        elif process or fleet:
            command = [sys.executable, str(Path(__file__).with_name("engine_main.py"))]
            told = json.dumps({"engine": engine, **(env_settings or {})}).encode()
            links = [ProcessLink(command, told, subprocess.DEVNULL) for _ in range(fleet or 1)]
            self.link = FleetLink(links) if fleet else links[0]
        else:
            self.link = ThreadLink(partial(build_engine, **engine))
        self.tokenizer = tokenizer or byte_tokenizer()
        client = EngineClient(
            self.link,
            self.tokenizer,
            supervision or Supervision(),
            stream_limit_tokens=self.settings.stream_limit_tokens,
            queue_timeout_s=self.settings.queue_timeout_s,
        )
        self.front = Front(self.settings, client, FrontMetrics(), self.tokenizer)
        self.lost = None
        client.on_lost = lambda why: setattr(self, "lost", why)
        self._bound = bind(self.settings)
        self.port = self._bound.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = make_server(self.front)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        asyncio.run(self._server.serve(sockets=[self._bound]), loop_factory=uvloop.new_event_loop)

    def __enter__(self):
        self._thread.start()
        self.until(lambda: self._server.started)
        self.http = httpx.Client(base_url=self.url, timeout=20, trust_env=False)
        if self._wait:
            self.wait_ready(280)  # compiling from nothing takes minutes on a busy machine
        return self

    def __exit__(self, *_):
        self.http.close()
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def wait_ready(self, seconds=60.0):
        self.until(lambda: self.status("/ready") == 200 or self.lost, seconds)
        assert self.lost is None, self.lost

    def status(self, path):
        try:
            return self.http.get(path).status_code
        except httpx.HTTPError:
            return 0

    def narrow(self):
        """Of connections from now on the kernel keeps little that nobody reads: else 4 MB, more than a test sends."""
        self._bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)

    def until(self, condition, seconds=10.0):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.02)

    # ---- clients ----

    def post(self, path, body, **options):
        return self.http.post(path, json=body, **options)

    def send(self, path, content, content_type="application/json", **headers):
        return self.http.post(path, content=content, headers={"content-type": content_type, **headers})

    def complete(self, prompt="hello", **fields):
        return self.post("/v1/completions", {"prompt": prompt, "max_tokens": 8, "temperature": 0, **fields})

    def chat(self, text="hello", **fields):
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **fields}
        return self.post("/v1/chat/completions", body)

    def events(self, path, body, **options):
        """The data of each event; parsed, [DONE] as text."""
        with self.http.stream("POST", path, json={**body, "stream": True}, **options) as answer:
            assert answer.status_code == 200, answer.read()
            lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    def streamed_text(self, prompt="hello", **fields):
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, **fields}
        events = self.events("/v1/completions", body)
        assert events[-1] == "[DONE]", events[-1]
        return "".join(choice["text"] for event in events[:-1] for choice in event["choices"])

    @contextlib.contextmanager
    def raw(self, timeout=15.0):
        with socket.create_connection(("127.0.0.1", self.port), timeout) as connection:
            yield connection

    def exchange(self, data, timeout=15.0):
        """Everything the server says to these bytes until it closes or is silent."""
        with self.raw(timeout) as connection:
            connection.sendall(data)
            return drain(connection)

    # ---- check A ----

    def info(self):
        return self.http.get("/server_info", headers=HEAD).json()

    def idle(self):
        info = self.info()
        stats = info["engine"]["stats"]
        quiet = stats["running"] == 0 and stats["waiting"] == 0 and stats["held_pages"] == 0
        return quiet and info["in_flight"] == {"slots": 0, "streams": 0} and self.front.admission.waiting_tokens == 0

    def settle(self):
        self.until(self.idle, 10)

    def check_a(self, tasks=None, descriptors=None):
        """Nothing leaked, and the server is well."""
        self.settle()
        info = self.info()
        stats = info["engine"]["stats"]
        assert stats["free_pages"] == stats["total_pages"] - stats["cached_pages"]
        assert self.status("/ready") == 200
        if tasks is not None:
            self.until(lambda: self.tasks() <= tasks, 10)
        if descriptors is not None:
            self.until(lambda: open_descriptors() <= descriptors, 10)

    def tasks(self):
        return len(self._server.server_state.tasks)


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def drain(connection):
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except (TimeoutError, ConnectionError):
        pass
    return found
