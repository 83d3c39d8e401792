"""What the gateway adds to a request: an open loop of requests to fake workers, directly and through the gateway.

    python benchmarks/gateway.py --rate 2000 --seconds 10 --out benchmarks/results/gateway.json
    python benchmarks/gateway.py --clients --out benchmarks/results/gateway_clients.json

Three processes beside this one's load: the gateway, and one that is both fake workers; they answer at once with a fixed
completion. Requests are sent when their time comes, whether or not earlier ones are answered, over kept connections;
the added latency is the difference of the two runs' percentiles. `--clients` compares HTTP clients a gateway could be
made of, by CPU time a request.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

ANSWER = json.dumps(
    {
        "id": "cmpl-0123456789abcdef",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "text": "word " * 32, "finish_reason": "length", "logprobs": None}],
        "usage": {"prompt_tokens": 500, "completion_tokens": 32, "total_tokens": 532},
    }
).encode()
PLAIN = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(ANSWER) + ANSWER
EVENT = b'data: {"id":"cmpl-0","choices":[{"index":0,"text":"word","finish_reason":null}]}\n\n'
EVENTS = 16
STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    + b"%x\r\n%b\r\n" % (len(EVENT), EVENT) * EVENTS
    + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
)
MOST_CONNECTIONS = 256
READY = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
PREFIXES = [" ".join(random.Random(seed).choices(("alpha", "beta", "gamma", "delta"), k=300)) for seed in range(50)]


class FakeWorker(asyncio.Protocol):
    """Answers whole requests; knows just enough HTTP for this client and the gateway."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.rest = b""

    def data_received(self, data: bytes) -> None:
        self.rest += data
        while (end := self.rest.find(b"\r\n\r\n")) >= 0:
            head = self.rest[:end].lower()
            at = head.find(b"content-length: ")
            size = int(head[at + 16 :].partition(b"\r\n")[0]) if at >= 0 else 0
            if len(self.rest) < end + 4 + size:
                return
            body, self.rest = self.rest[end + 4 : end + 4 + size], self.rest[end + 4 + size :]
            if head.startswith(b"get"):
                self.transport.write(READY)
            else:
                self.transport.write(STREAM if b'"stream": true' in body else PLAIN)


def workers_main() -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(FakeWorker, "127.0.0.1", 0) for _ in range(2)]
        print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
        await asyncio.Event().wait()

    gc.disable()
    asyncio.run(body(), loop_factory=uvloop.new_event_loop)


class Caller(asyncio.Protocol):
    """One kept connection; `done` gets the time of each answer's end."""

    def __init__(self, free: list[Caller], found: list[float]) -> None:
        self.free, self.found, self.rest, self.due = free, found, b"", 0.0
        self.chunked = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def ask(self, request: bytes, due: float) -> None:
        self.due, self.rest = due, b""
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.rest += data
        end = self.rest.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.rest[:end]
        if b"transfer-encoding" in head:
            whole = self.rest.endswith(b"0\r\n\r\n")
        else:
            at = head.lower().find(b"content-length: ")
            whole = len(self.rest) >= end + 4 + int(head[at + 16 :].partition(b"\r\n")[0])
        if whole:
            assert head.startswith(b"HTTP/1.1 200"), self.rest[:300]
            self.found.append(time.perf_counter() - self.due)
            self.free.append(self)


def requests(count: int, stream: bool) -> list[bytes]:
    made = []
    for i in range(count):
        body = json.dumps({"model": "m", "prompt": f"{PREFIXES[i % len(PREFIXES)]} {i}", "stream": stream}).encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        )
        made.append(head % len(body) + body)
    return made


async def open_loop(port: int, rate: float, seconds: float, stream: bool) -> list[float]:
    """Latencies from each request's due time."""
    loop = asyncio.get_running_loop()
    free: list[Caller] = []
    found: list[float] = []
    count = int(rate * seconds)
    made = requests(min(count, 2000), stream)
    began = time.perf_counter() + 0.05
    gaps = random.Random(0)
    due, opened = began, 0
    for i in range(count):
        due += gaps.expovariate(rate)  # Poisson
        while (left := due - time.perf_counter()) > 0:
            await asyncio.sleep(left if left > 0.002 else 0)
        while not free and opened >= MOST_CONNECTIONS:
            await asyncio.sleep(0.001)  # the wait counts: latency is from the due time
        if not free:
            opened += 1
            _, caller = await loop.create_connection(lambda: Caller(free, found), "127.0.0.1", port)
            free.append(caller)
        free.pop().ask(made[i % len(made)], due)
    limit = time.perf_counter() + 20
    while len(found) < count:
        await asyncio.sleep(0.01)
        assert time.perf_counter() < limit, f"{count - len(found)} of {count} requests have no answer"
    for caller in free:
        caller.transport.close()
    return sorted(found)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percentiles(found: list[float]) -> dict[str, float]:
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {name: round(found[int(len(found) * share)] * 1e3, 3) for name, share in shares.items()}


def compare(given: argparse.Namespace, stream: bool) -> dict[str, Any]:
    workers = subprocess.Popen([sys.executable, __file__, "workers"], stdout=subprocess.PIPE, text=True)
    assert workers.stdout is not None
    ports = workers.stdout.readline().split()
    command = [sys.executable, "-m", "serve.cli", "gateway", "--port", "0"]
    command += ["--workers", ",".join(f"http://127.0.0.1:{port}" for port in ports)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    gateway = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
    assert gateway.stdout is not None
    try:
        port = int(gateway.stdout.readline().split()[2].rpartition(":")[2])

        async def body() -> dict[str, Any]:
            await asyncio.sleep(2.0)  # the first probes
            await open_loop(port, 200, 1.0, stream)
            direct = await open_loop(int(ports[0]), given.rate, given.seconds, stream)
            before, began = cpu_s(gateway.pid), time.perf_counter()
            through = await open_loop(port, given.rate, given.seconds, stream)
            spent, took = cpu_s(gateway.pid) - before, time.perf_counter() - began
            added = {n: round(percentiles(through)[n] - percentiles(direct)[n], 3) for n in ("p50", "p90", "p99")}
            return {
                "stream": stream,
                "asked_per_s": given.rate,
                "done_per_s": round(len(through) / took),
                "direct_ms": percentiles(direct),
                "through_ms": percentiles(through),
                "added_ms": added,
                "gateway_cpu_us_per_request": round(spent / len(through) * 1e6),
            }

        return asyncio.run(body(), loop_factory=uvloop.new_event_loop)
    finally:
        for process in (gateway, workers):
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


# ---- clients ----


async def _ours(port: int) -> tuple[Callable[[bytes], Awaitable[bytes]], Callable[[], Any]]:
    from serve.gateway.upstream import Pool, Whole, request_bytes

    pool = Pool(f"http://127.0.0.1:{port}", 2.0)
    headers = [(b"content-type", b"application/json")]

    async def ask(body: bytes) -> bytes:
        connection, sink = await pool.connection(), Whole()
        connection.send(request_bytes("POST", b"/v1/completions", pool.host, headers, body), sink)
        return await sink.done

    return ask, pool.close


async def _aiohttp(port: int) -> tuple[Callable[[bytes], Awaitable[bytes]], Callable[[], Any]]:
    import aiohttp  # pyright: ignore[reportMissingImports]  # compared with, not a dependency

    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def ask(body: bytes) -> bytes:
        url = f"http://127.0.0.1:{port}/v1/completions"
        async with session.post(url, data=body, headers={"content-type": "application/json"}) as answer:
            return await answer.read()

    return ask, session.close


async def _httpx(port: int) -> tuple[Callable[[bytes], Awaitable[bytes]], Callable[[], Any]]:
    import httpx

    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False)

    async def ask(body: bytes) -> bytes:
        answer = await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        return answer.content

    return ask, client.aclose


async def _h11(port: int) -> tuple[Callable[[bytes], Awaitable[bytes]], Callable[[], Any]]:
    import h11

    free: list[tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(body: bytes) -> bytes:
        state, reader, writer = (
            free.pop() if free else (h11.Connection(h11.CLIENT), *await asyncio.open_connection("127.0.0.1", port))
        )
        headers = [("host", "x"), ("content-type", "application/json"), ("content-length", str(len(body)))]
        writer.write(state.send(h11.Request(method="POST", target="/v1/completions", headers=headers)))
        writer.write(state.send(h11.Data(data=body)) + state.send(h11.EndOfMessage()))
        parts = []
        while True:
            event = state.next_event()
            if event is h11.NEED_DATA:
                state.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Data):
                parts.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                break
        state.start_next_cycle()
        free.append((state, reader, writer))
        return b"".join(parts)

    return ask, lambda: [writer.close() for _, _, writer in free]


CLIENTS = {"httptools, own protocol": _ours, "aiohttp": _aiohttp, "h11 on streams": _h11, "httpx": _httpx}


def clients(given: argparse.Namespace) -> list[dict[str, Any]]:
    workers = subprocess.Popen([sys.executable, __file__, "workers"], stdout=subprocess.PIPE, text=True)
    assert workers.stdout is not None
    port = int(workers.stdout.readline().split()[0])
    payload = json.dumps({"model": "m", "prompt": PREFIXES[0]}).encode()

    async def one(name: str) -> dict[str, Any]:
        ask, close = await CLIENTS[name](port)

        async def many(count: int) -> None:
            for _ in range(count):
                assert len(await ask(payload)) == len(ANSWER)

        await asyncio.gather(*(many(10) for _ in range(32)))
        before = time.process_time()
        await asyncio.gather(*(many(given.count // 32) for _ in range(32)))
        spent = (time.process_time() - before) / (given.count // 32 * 32)
        if (closing := close()) is not None and asyncio.iscoroutine(closing):
            await closing
        return {"client": name, "cpu_us_per_request": round(spent * 1e6, 1)}

    try:
        return [asyncio.run(one(name), loop_factory=uvloop.new_event_loop) for name in CLIENTS]
    finally:
        workers.kill()
        workers.wait()
        workers.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=2000.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--clients", action="store_true", help="compare HTTP clients instead")
    parser.add_argument("--count", type=int, default=6400, help="requests of each client")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    what = "--clients" if given.clients else f"--rate {given.rate:g} --seconds {given.seconds:g}"
    result: dict[str, Any] = {
        "command": f"python benchmarks/gateway.py {what}",
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f} at the start",
        "python": platform.python_version(),
    }
    if given.clients:
        result["clients"] = clients(given)
    else:
        result["runs"] = [compare(given, stream) for stream in (False, True) for _ in range(given.runs)]
    text = json.dumps(result, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["workers"]:
        workers_main()
    else:
        main()
