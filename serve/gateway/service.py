"""The gateway itself: whole requests in; each goes to a worker, and to another when that one fails before it spoke.

Owns the workers, their pools, the balancer and the counters. Its own routes (/health, /ready, /metrics, /gateway/...)
are answered here; the workers' admin routes are not passed on. Knows nothing of bytes on sockets.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

import orjson

from serve.errors import ApiError
from serve.gateway.affinity import Hasher, prompt_bytes
from serve.gateway.answer import Answer, Held, tell
from serve.gateway.balance import Balancer
from serve.gateway.counters import Counters
from serve.gateway.listener import Incoming
from serve.gateway.settings import GatewaySettings
from serve.gateway.upstream import Pool, fetch, request_bytes
from serve.gateway.worker import Worker
from serve.settings import hash_key

log = logging.getLogger(__name__)

PROXIED = frozenset(
    (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
        "/generate",
    )
)
JSON = [(b"content-type", b"application/json")]
BYTES_A_REQUEST = 4096.0  # of prompt: as much load as one request more
WORKER_GONE = "the worker could not be reached"


class Gateway:
    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.workers = [Worker(url, settings) for url in settings.workers]
        self.pools = {url: Pool(url, settings.connect_timeout_s) for url in settings.workers}
        self.balancer = Balancer(settings, self.workers)
        self.counters = Counters(self.workers, self.balancer)
        self.draining = False
        self._hasher = Hasher(settings.salt, settings.block_bytes, settings.max_blocks)
        self._changed = asyncio.Event()  # set when a worker may have become usable

    # ---- one request ----

    async def handle(self, request: Incoming) -> None:
        """Every request of every client; never raises but for the client's leaving."""
        try:
            await self._route(request)
        except ApiError as error:
            if not request.client.began:
                tell(request.client, error)
        except asyncio.CancelledError:
            self.counters.outcome("client_gone")
            raise
        except Exception:
            log.exception("a request failed in the gateway")
            if request.client.began:
                request.client.cut()
            else:
                tell(request.client, ApiError(500, "internal error", code="internal_error"))

    async def _route(self, request: Incoming) -> None:
        path = request.path
        own: dict[str, Callable[[Incoming], tuple[int, Any]]] = {"/health": self._health, "/ready": self._ready}
        if path in own and request.method in ("GET", "HEAD"):
            status, value = own[path](request)
            self._say(request, status, value)
        elif path == "/metrics":
            head = [(b"content-type", b"text/plain; version=1.0.0; charset=utf-8")]
            request.client.whole(200, head, self.counters.text())
        elif path.startswith("/gateway/"):
            self._say(request, 200, self._administer(request))
        elif request.method == "POST" and path in PROXIED:
            await self._generate(request)
        elif path.startswith("/v1/responses/") and request.method in ("GET", "POST", "DELETE"):
            await self._find(request)
        elif request.method in ("GET", "HEAD") and self._may_be_read(path):
            await self._proxy(request, [], 1.0)
        else:
            raise ApiError(404, f"the gateway has no route {request.method} {path[:80]!a}", code="route_not_found")

    @staticmethod
    def _may_be_read(path: str) -> bool:
        open_paths = ("/", "/docs", "/openapi.json", "/version", "/v1/models")
        return path in open_paths or path.startswith(("/ui/", "/v1/models/"))

    async def _generate(self, request: Incoming) -> None:
        if self.draining:
            raise ApiError(503, "the gateway is shutting down", code="shutting_down", retry_after_s=5, close=True)
        chain: list[int] = []
        prompt = b""
        try:
            body = orjson.loads(request.body)
        except orjson.JSONDecodeError:
            body = None  # the worker says what is wrong with it
        if isinstance(body, dict):
            prompt = prompt_bytes(body)
            if body.get("previous_response_id"):
                await self._find(request, f"/v1/responses/{body['previous_response_id']}")
                return
            chain = self._chain(request, body, prompt)
        await self._proxy(request, chain, 1.0 + len(prompt) / BYTES_A_REQUEST)

    def _chain(self, request: Incoming, body: dict[str, Any], prompt: bytes) -> list[int]:
        """Callers with other keys or salts share no page, and no block's name either."""
        if not prompt:
            return []
        key = request.header(b"authorization") or request.header(b"x-api-key")
        owner = b"\0".join((key, str(body.get("model", "")).encode(), str(body.get("cache_salt") or "").encode()))
        return self._hasher.chain(prompt, owner)

    async def _proxy(self, request: Incoming, chain: list[int], cost: float) -> None:
        """Attempts until one answer is with the client. A worker is asked once, unless all have been."""
        deadline = time.monotonic() + self.settings.wait_s
        tried: set[str] = set()
        held: Held | None = None
        answer: Answer | None = None
        for number in range(self.settings.attempts):
            worker = self.balancer.choose(chain, cost, tried)
            if worker is None and held is not None and held.status == 429:
                break  # every queue is full: the client is told when to come back
            if worker is None:
                tried.clear()
                worker = await self._wait(chain, cost, deadline)
            if worker is None:
                break
            if number:
                self.counters.retry()
            answer = Answer(request, self.settings.buffer_bytes)
            held = await self._attempt(request, worker, cost, answer)
            if held is None:
                self.counters.outcome("broken" if answer.broke else "answered")
                return
            tried.add(worker.name)
        self._give_up(request, answer, held)

    async def _wait(self, chain: list[int], cost: float, deadline_s: float) -> Worker | None:
        """The first worker that may be asked again, until the deadline."""
        while (left := deadline_s - time.monotonic()) > 0:
            worker = self.balancer.choose(chain, cost)
            if worker is not None:
                return worker
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), min(left, 0.25))
            except TimeoutError:
                continue
        return None

    async def _attempt(self, request: Incoming, worker: Worker, cost: float, answer: Answer) -> Held | None:
        """None when the client has its answer."""
        pool, client = self.pools[worker.name], request.client
        method = "GET" if request.method == "HEAD" else request.method
        body = request.body if request.method in ("POST", "DELETE") else None
        outgoing = request_bytes(method, request.target, pool.host, request.headers, body)
        worker.enter(answer, cost, answer.lost)
        connection = None
        timer = None
        try:
            for fresh in (False, True):
                connection = await pool.connection(fresh=fresh)
                client.on_pause = lambda paused, it=connection: it.pause() if paused else it.resume()
                connection.send(outgoing, answer)
                if timer is None:
                    late = self.settings.first_byte_timeout_s
                    timer = asyncio.get_running_loop().call_later(late, self._late, answer)
                held = await answer.done
                stale = held is not None and held.lost and connection.used and not connection.heard
                if not stale or not worker.ready:
                    break
                answer.done = asyncio.get_running_loop().create_future()  # it was closed while it lay idle
        except (OSError, TimeoutError) as error:
            held = Held(0, [], f"{WORKER_GONE}: {error or type(error).__name__}".encode())
        finally:
            if timer is not None:
                timer.cancel()
            client.on_pause = None
            if connection is not None and connection.serves(answer):
                connection.give_up()  # the client left, or the worker is stuck
            worker.leave(answer, cost)
        self._judge(worker, answer, held)
        return held

    @staticmethod
    def _late(answer: Answer) -> None:
        if not answer.first_byte:
            answer.lost("no answer came in time")

    def _judge(self, worker: Worker, answer: Answer, held: Held | None) -> None:
        now = time.monotonic()
        if answer.broke or (held is not None and held.lost):
            why = answer.broke or ("" if held is None else held.body.decode(errors="replace"))
            log.warning("%s: %s", worker.name, why)
            worker.circuit.failed(now)
            self.counters.failure(worker.name)
        elif held is not None and held.status != 429:
            worker.circuit.trying = False
            worker.unready(f"it answered {held.status}", lost=False)
        else:
            worker.circuit.succeeded()

    def _give_up(self, request: Incoming, answer: Answer | None, held: Held | None) -> None:
        self.counters.outcome("refused")
        if held is not None and not held.lost and answer is not None:
            answer.give(held)
            return
        why = "no worker is ready" if held is None else "the workers that were asked were lost"
        error = ApiError(503, f"{why}; try again", code="no_worker", retry_after_s=5)
        if answer is not None:
            answer.fail(error)
        else:
            tell(request.client, error)

    async def _find(self, request: Incoming, lookup: str | None = None) -> None:
        """What is stored is with one worker: the first that knows it."""
        headers = [pair for pair in request.headers if pair[0] in (b"authorization", b"x-api-key")]
        where = lookup or request.path.removesuffix("/cancel")
        for worker in self.balancer.usable():
            try:
                status, _ = await fetch(self.pools[worker.name], where, self.settings.probe_timeout_s, headers)
            except (OSError, TimeoutError):
                continue
            if status != 404:
                answer = Answer(request, self.settings.buffer_bytes)
                held = await self._attempt(request, worker, 1.0, answer)
                if held is not None:
                    self._give_up(request, answer, held)
                return
        raise ApiError(404, "no worker knows this response", code="response_not_found")

    # ---- what probes found ----

    def changed(self) -> None:
        self._changed.set()

    def move(self, old: str, new: str) -> Worker:
        """A worker came back at another address; the one at the old address is lost. Returns the new one."""
        gone, worker = self.balancer.workers[old], Worker(new, self.settings)
        gone.retired = True
        gone.unready("it moved", lost=True)
        self.workers[self.workers.index(gone)] = worker
        self.pools[new] = Pool(new, self.settings.connect_timeout_s)
        self.balancer.set_workers(self.workers)
        self.changed()
        return worker

    # ---- routes of its own ----

    def _say(self, request: Incoming, status: int, value: Any) -> None:
        request.client.whole(status, JSON, orjson.dumps(value), without_body=request.method == "HEAD")

    def _health(self, request: Incoming) -> tuple[int, Any]:
        return 200, {"status": "ok"}

    def _ready(self, request: Incoming) -> tuple[int, Any]:
        usable = len(self.balancer.usable())
        if self.draining or not usable:
            return 503, {"status": "shutting down" if self.draining else "no worker is ready"}
        return 200, {"status": "ready", "workers": usable}

    def _administer(self, request: Incoming) -> Any:
        """GET /gateway/workers; POST /gateway/drain?worker=URL and /gateway/undrain?worker=URL."""
        self._authorize(request)
        path, _, query = request.target.decode("ascii", "replace").partition("?")
        if path == "/gateway/workers" and request.method == "GET":
            return {"workers": [self.describe(worker) for worker in self.workers]}
        name = query.removeprefix("worker=").replace("%3A", ":").replace("%2F", "/")
        if request.method != "POST" or path not in ("/gateway/drain", "/gateway/undrain"):
            raise ApiError(404, "no such route of the gateway", code="route_not_found")
        worker = self.balancer.workers.get(name)
        if worker is None:
            known = ", ".join(self.balancer.workers)
            raise ApiError(404, f"no worker {name[:80]!r}; the gateway has {known}", param="worker", code="not_found")
        worker.drained = path == "/gateway/drain"
        self.changed()
        return self.describe(worker)

    def _authorize(self, request: Incoming) -> None:
        keys = self.settings.admin_keys
        if not keys:
            raise ApiError(403, "admin routes are off: the gateway has no admin key", code="admin_disabled")
        given = request.header(b"authorization")
        given = given[7:] if given[:7].lower() == b"bearer " else request.header(b"x-api-key")
        digest = hash_key(given.strip().decode("utf-8", "surrogateescape"))
        matches = [secrets.compare_digest(digest, key) for key in keys]  # all of them: no time tells which
        if True not in matches:
            raise ApiError(401, "missing or wrong API key", code="invalid_api_key")

    def describe(self, worker: Worker) -> dict[str, Any]:
        return {
            "url": worker.name,
            "ready": worker.ready,
            "why": worker.why,
            "drained": worker.drained,
            "circuit": worker.circuit.state,
            "in_flight": worker.in_flight,
            "load": round(worker.burden, 2),
            "remembered_blocks": self.balancer.memory.blocks[worker.name],
        }

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()
