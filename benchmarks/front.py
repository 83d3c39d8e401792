"""What the HTTP front costs: many streams of an engine that computes nothing, over real sockets on one machine.

    python benchmarks/front.py --streams 500 --tokens 200 --rate 40 --out benchmarks/results/front.json

Three processes: the server (front), the fake engine it starts, and this one, which is all the clients. Every token's id
is the microsecond at which the engine gave it away, and its text is that number, so the added latency of a token is the
time it reached a client's socket minus the number it says. The engine gives every stream one token each 1/rate seconds.
Then idle connections are opened and the server's resident memory is read.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import uvloop

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from jaxllm.core import SamplingParams  # noqa: E402
from jaxllm.engine.messages import Abort, Add, Beat, Control, News, Ready, Reply, Step, Stop  # noqa: E402
from jaxllm.engine.process.main import Channel, follow_parent, read_config  # noqa: E402

CONTEXT = 1 << 20


class NumberTokens:
    """A tokenizer whose token 123 says "123 "."""

    special_ids: frozenset[int] = frozenset()
    templates: dict[str, str] = {}  # noqa: RUF012

    def token_bytes(self, token_id: int) -> bytes:
        return b"%d " % token_id

    leading_bytes = token_bytes

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


def engine_main() -> None:
    """The engine: a token for every stream at every tick."""
    gc.disable()  # its pauses are not the front's
    told = read_config()
    base, vocab_size = told["base_s"], told.get("vocab_size", 2**31)
    rate = float(os.path.basename(sys.argv[-3]))
    follow_parent()
    channel = Channel(*sys.argv[-2:])
    send = channel.sender()
    send(Ready(CONTEXT, 4096, CONTEXT, vocab_size, (), None, SamplingParams()))
    left: dict[str, int] = {}
    due = time.monotonic()
    while True:
        for command in channel.receive(max(0.0, due - time.monotonic()) if left else 0.2):
            match command:
                case Add():
                    if not left:
                        due = time.monotonic()
                    left[command.request.id] = command.request.params.max_tokens or 16
                case Abort():
                    left.pop(command.request_id, None)
                case Control():
                    send(Reply(command.id, {}))
                case Stop():
                    return
        if not left:
            send(Beat(0.0, False, False, {}))
            continue
        if time.monotonic() < due:
            continue
        due = max(due + 1 / rate, time.monotonic() - 1)
        token = int((time.monotonic() - base) * 1e6) % vocab_size
        send(Step([News(name, 0, token, "length" if n == 1 else None) for name, n in left.items()]))
        left = {name: n - 1 for name, n in left.items() if n > 1}


def server_main(rate: float, base: float) -> None:
    from jaxllm.engine.process.links import ProcessLink
    from serve.client import EngineClient
    from serve.front import Front
    from serve.metrics import FrontMetrics
    from serve.run import bind, serve
    from serve.settings import FrontSettings

    settings = FrontSettings(port=0, max_queue=8192, max_connections=16384, drain_timeout_s=1)
    bound = bind(settings)
    command = [sys.executable, __file__, "engine", str(rate)]
    tokenizer: Any = NumberTokens()
    client = EngineClient(ProcessLink(command, json.dumps({"base_s": base}).encode()), tokenizer)
    front = Front(settings, client, FrontMetrics(), tokenizer)
    sys.exit(serve(front, bound, lambda url: print(url.rpartition(":")[2], flush=True)))


class Client(asyncio.Protocol):
    """One stream: keeps what came and when; everything is read after the run."""

    def __init__(self, body: bytes, done: asyncio.Future[None]) -> None:
        self.body, self.done = body, done
        self.pieces: list[tuple[float, bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        self.transport.write(head + b"content-length: %d\r\n\r\n" % len(self.body) + self.body)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.monotonic(), data))
        if data.endswith(b"0\r\n\r\n"):
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def tokens(self, base: float) -> list[tuple[float, float]]:
        """(given away by the engine, arrived here) of every token; a token that is cut in two counts at its end."""
        found, rest = [], b""
        for at, data in self.pieces:
            rest += data
            while (start := rest.find(b'"text":"')) >= 0 and (end := rest.find(b'"', start + 8)) >= 0:
                found += [(base + int(number) / 1e6, at) for number in rest[start + 8 : end].split()]
                rest = rest[end:]
        return found


async def run_streams(port: int, streams: int, tokens: int, ramp_s: float = 0.0) -> tuple[list[Client], float]:
    loop = asyncio.get_running_loop()
    body = json.dumps({"prompt": "x", "max_tokens": tokens, "stream": True}).encode()
    clients = [Client(body, loop.create_future()) for _ in range(streams)]
    began = time.monotonic()
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
        await asyncio.sleep(ramp_s / streams)
    await asyncio.gather(*(client.done for client in clients))
    return clients, time.monotonic() - began


def resident_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in fields if line.startswith("VmRSS"))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def idle_cost(port: int, pid: int, count: int) -> float:
    loop = asyncio.get_running_loop()
    before = resident_bytes(pid)
    opened = [await loop.create_connection(asyncio.Protocol, "127.0.0.1", port) for _ in range(count)]
    await asyncio.sleep(1.0)
    after = resident_bytes(pid)
    for transport, _ in opened:
        transport.close()
    return (after - before) / count


def percentile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))]


def measure(given: argparse.Namespace) -> dict[str, Any]:
    gc.disable()  # the clients' own pauses are not the server's
    base = time.monotonic()
    server = subprocess.Popen(
        [sys.executable, __file__, "server", str(given.rate), str(base)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    watchdog = threading.Timer(given.limit, server.kill)
    watchdog.start()
    try:
        port = int(server.stdout.readline())

        async def body() -> dict[str, Any]:
            await run_streams(port, 20, 20)  # what the first use of anything costs
            idle = await idle_cost(port, server.pid, given.idle)
            before = cpu_s(server.pid)
            clients, seconds = await run_streams(port, given.streams, given.tokens, given.ramp)
            spent = cpu_s(server.pid) - before
            streams = [client.tokens(base) for client in clients]
            whole = given.streams * given.tokens
            assert sum(map(len, streams)) == whole, "tokens are missing"
            # Steady: every stream has begun, none has ended.
            begin = max(tokens[0][1] for tokens in streams) + 0.2
            end = min(tokens[-1][0] for tokens in streams)
            steady = [(sent, at) for tokens in streams for sent, at in tokens if begin <= sent <= end]
            found = sorted(at - sent for sent, at in steady)
            return {
                "steady_tokens_per_s": round(len(steady) / (end - begin)),
                "steady_s": round(end - begin, 2),
                "asked_tokens_per_s": round(given.streams * given.rate),
                "added_latency_ms": {
                    name: round(percentile(found, share) * 1e3, 2)
                    for name, share in {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}.items()
                },
                "front_cpu_us_per_token": round(spent / whole * 1e6, 1),
                "front_cpu_share": round(spent / seconds, 2),
                "idle_connection_bytes": round(idle),
                "tokens_per_read": round(whole / sum(len(client.pieces) for client in clients), 2),
                "seconds": round(seconds, 2),
            }

        return asyncio.run(body(), loop_factory=uvloop.new_event_loop)
    finally:
        watchdog.cancel()
        server.terminate()
        server.wait()
        server.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rate", type=float, default=42.0, help="tokens a second of each stream")
    parser.add_argument("--ramp", type=float, default=2.0, help="seconds over which the streams are opened")
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which the server is ended")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "command": "python benchmarks/front.py "
        + f"--streams {given.streams} --tokens {given.tokens} --rate {given.rate:g} --ramp {given.ramp:g}",
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f} at the start",
        "python": platform.python_version(),
        "runs": [measure(given) for _ in range(given.runs)],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["server"]:
        server_main(float(sys.argv[2]), float(sys.argv[3]))
    elif sys.argv[1:2] == ["engine"]:
        engine_main()
    else:
        main()
