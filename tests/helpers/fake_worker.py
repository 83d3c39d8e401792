"""Fake OpenAI servers and a real gateway in one event loop: each worker behaves as its `behave` says."""

import asyncio
import contextlib
import json

import httpx

from serve.gateway.listener import Listener
from serve.gateway.probes import watch
from serve.gateway.service import Gateway
from serve.gateway.settings import GatewaySettings

EVENT = 'data: {"choices":[{"index":0,"text":"%s"}]}\n\n'
DIED = 'data: {"error":{"message":"the engine died","type":"server_error","param":null,"code":"engine_died"}}\n\n'


class FakeWorker:
    """`behave(worker, request) -> bytes or async generator of bytes`; what it yields is written as it is."""

    def __init__(self, name, behave=None):
        self.name, self.behave = name, behave or say_hello
        self.seen, self.ready, self.silent = [], True, False
        self.tokens, self.running, self.restarts, self.aborted = 0, 0, 0, 0
        self.writers, self.tasks = set(), set()

    async def start(self, port=0):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = self.server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def die(self):
        """As kill -9 does: every connection is reset, nobody listens."""
        for listening in self.server.sockets:  # one accepted in this turn would find its server closed, and stay open
            asyncio.get_running_loop().remove_reader(listening.fileno())
        for _ in range(3):
            await asyncio.sleep(0)
        self.server.close()
        for writer in list(self.writers):
            writer.transport.abort()

    async def close(self):
        """At the end of a test: nothing of it is left."""
        await self.die()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _serve(self, reader, writer):
        self.writers.add(writer)
        task = asyncio.current_task()
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                method, path, _ = head.split("\r\n")[0].split(" ")
                headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await self._answer(writer, method, path, headers, body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()

    async def _answer(self, writer, method, path, headers, body):
        if path in ("/ready", "/metrics"):
            while self.silent:
                await asyncio.sleep(0.01)
            if path == "/ready":
                writer.write(plain(200 if self.ready else 503, {"status": "ready" if self.ready else "starting"}))
            else:
                text = f"jaxllm_engine_generated_tokens_total {self.tokens}\njaxllm_engine_running {self.running}\n"
                text += f"jaxllm_engine_restarts_total {self.restarts}\n"
                writer.write(raw(200, text.encode(), "text/plain"))
            return
        request = {"method": method, "path": path, "headers": headers, "body": json.loads(body) if body else None}
        self.seen.append(request)
        answer = self.behave(self, request)
        if isinstance(answer, bytes):
            writer.write(answer)
            return
        try:
            async for part in answer:
                writer.write(part)
                await writer.drain()
                if writer.transport.is_closing():
                    raise ConnectionResetError
        except ConnectionError:
            self.aborted += 1
            raise


def raw(status, body, kind="application/json"):
    return f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def plain(status, value):
    return raw(status, json.dumps(value).encode())


def error(status, code):
    return plain(status, {"error": {"message": code, "type": "server_error", "param": None, "code": code}})


def chunk(text):
    return b"%x\r\n%b\r\n" % (len(text), text.encode())


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def say_hello(worker, request):
    if not (request["body"] or {}).get("stream"):
        return plain(200, {"from": worker.name})
    parts = [chunk(EVENT % f"{worker.name}{i} ") for i in range(4)] + [chunk("data: [DONE]\n\n"), b"0\r\n\r\n"]
    return STREAM_HEAD + b"".join(parts)


def refuse(status, code):
    return lambda worker, request: error(status, code)


class Running:
    """What a test holds: the gateway, its workers, a client."""

    def __init__(self, gateway, listener, workers, http):
        self.gateway, self.listener, self.workers, self.http = gateway, listener, workers, http

    async def complete(self, prompt="hello", headers=None, **fields):
        return await self.http.post("/v1/completions", json={"prompt": prompt, **fields}, headers=headers)

    async def stream(self, prompt="hello", path="/v1/completions", **fields):
        """(status, data of the events or the body)."""
        body = {"prompt": prompt, "stream": True, **fields}
        async with self.http.stream("POST", path, json=body) as answer:
            if not answer.headers["content-type"].startswith("text/event-stream"):
                return answer.status_code, json.loads(await answer.aread())
            return answer.status_code, [line[6:] async for line in answer.aiter_lines() if line.startswith("data: ")]

    async def until(self, condition, seconds=5.0):
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)

    def worker(self, index):
        return self.gateway.workers[index]


@contextlib.asynccontextmanager
async def running(*behaviours, wait=True, **settings):
    """A gateway in front of one worker for each behaviour (None: says hello)."""
    workers = [FakeWorker("abcdefgh"[i], behave) for i, behave in enumerate(behaviours)]
    for worker in workers:
        await worker.start()
    given = {"probe_s": 0.05, "probe_timeout_s": 3.0, "break_s": 0.1, "wait_s": 1.0, **settings}
    gateway = Gateway(GatewaySettings(workers=tuple(worker.url for worker in workers), **given))
    listener = Listener(gateway.settings, gateway.handle)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(listener.make, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    tasks = [loop.create_task(watch(gateway, worker)) for worker in gateway.workers]
    tasks.append(loop.create_task(listener.sweep()))
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10, trust_env=False) as http:
            found = Running(gateway, listener, workers, http)
            found.port = port
            if wait:
                await found.until(lambda: all(worker.ready for worker in gateway.workers))
            yield found
    finally:
        for task in tasks:
            task.cancel()
        server.close()
        gateway.close()
        listener.finish()
        for client in list(listener.clients):
            client.cut()
        for worker in workers:
            await worker.close()
        async with asyncio.timeout(10):  # every socket is closed before the loop is
            while listener.clients or any(worker.writers for worker in workers):
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
