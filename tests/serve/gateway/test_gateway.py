"""The gateway over real sockets in front of fake workers: retries, streams that break, drain, limits."""

import asyncio
import json
import subprocess
import sys
from collections import Counter

import pytest
from helpers.fake_worker import DIED, EVENT, STREAM_HEAD, FakeWorker, chunk, error, plain, refuse, running, say_hello

from serve.gateway.probes import watch
from serve.gateway.upstream import Pool, Whole
from serve.settings import hash_key

DONE = "[DONE]"


def run(body):
    asyncio.run(asyncio.wait_for(body(), 20))


def texts(events):
    return [json.loads(event)["choices"][0]["text"] for event in events if "choices" in event]


def test_an_answer_comes_through_whole_and_a_stream_event_by_event():
    async def body():
        async with running(None) as it:
            answer = await it.complete()
            assert (answer.status_code, answer.json()) == (200, {"from": "a"})
            status, events = await it.stream()
            assert status == 200
            assert texts(events) == ["a0 ", "a1 ", "a2 ", "a3 "]
            assert events[-1] == DONE
            seen = it.workers[0].seen[0]
            assert seen["body"] == {"prompt": "hello"}
            assert seen["headers"]["host"] == f"127.0.0.1:{it.workers[0].port}"

    run(body)


@pytest.mark.parametrize(("status", "code"), [(503, "engine_unavailable"), (429, "queue_full"), (502, "bad")])
def test_a_refusal_is_taken_to_another_worker(status, code):
    async def body():
        async with running(refuse(status, code), None, policy="round_robin") as it:
            answers = [await it.complete() for _ in range(4)]
            assert [answer.json() for answer in answers] == [{"from": "b"}] * 4

    run(body)


def test_when_all_refuse_the_client_hears_the_last_refusal():
    async def body():
        async with running(refuse(429, "queue_full"), refuse(429, "queue_full")) as it:
            answer = await it.complete()
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
            assert len(it.workers[0].seen) == len(it.workers[1].seen) == 1

    run(body)


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_what_would_fail_anywhere_is_not_asked_again(status):
    async def body():
        async with running(refuse(status, "no"), refuse(status, "no")) as it:
            answer = await it.complete()
            assert answer.status_code == status
            assert sum(len(worker.seen) for worker in it.workers) == 1

    run(body)


async def _dies_before(worker, request):
    yield STREAM_HEAD
    yield chunk(": ping\n\n")
    await worker.die()


async def _dies_after(worker, request):
    yield STREAM_HEAD + chunk(EVENT % "one ") + chunk(EVENT % "two ") + b"20\r\ndata: half an ev"
    await asyncio.sleep(0.5)  # a reset takes with it what nobody has read yet
    await worker.die()


async def _engine_dies_before(worker, request):
    yield STREAM_HEAD + chunk(DIED) + b"0\r\n\r\n"


@pytest.mark.parametrize("behave", [_dies_before, _engine_dies_before])
def test_a_stream_that_breaks_before_its_first_event_is_told_whole_by_another(behave):
    async def body():
        async with running(behave, None, policy="round_robin") as it:
            for _ in range(2):
                status, events = await it.stream()
                assert status == 200
                assert texts(events) == ["b0 ", "b1 ", "b2 ", "b3 "]
                assert events[-1] == DONE

    run(body)


@pytest.mark.parametrize(
    ("path", "name"), [("/v1/completions", None), ("/v1/messages", "error"), ("/v1/responses", "error")]
)
def test_a_stream_that_breaks_after_an_event_says_so_and_repeats_nothing(path, name):
    async def body():
        async with running(_dies_after, _dies_after, policy="round_robin") as it:
            async with it.http.stream("POST", path, json={"prompt": "x", "stream": True}) as answer:
                lines = [line async for line in answer.aiter_lines() if line]
            data = [line[6:] for line in lines if line.startswith("data: ")]
            assert texts(data[:2]) == ["one ", "two "]
            assert len(data) == 3, "no half of an event, no second telling, no [DONE]"
            assert "worker_lost" in data[2]
            assert (f"event: {name}" in lines) == (name is not None)
            assert sum(len(worker.seen) for worker in it.workers) == 1

    run(body)


def test_a_plain_answer_that_breaks_in_its_middle_is_asked_again():
    async def half(worker, request):
        yield b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n" + b"x" * 500
        await worker.die()

    async def body():
        async with running(half, None, policy="round_robin") as it:
            assert (await it.complete()).json() == {"from": "b"}

    run(body)


def test_a_worker_that_is_gone_costs_no_request():
    async def body():
        async with running(None, None, None, policy="round_robin") as it:
            await it.workers[1].die()
            answers = await asyncio.gather(*(it.complete(f"p{i}") for i in range(30)))
            assert Counter(answer.status_code for answer in answers) == {200: 30}
            await it.until(lambda: not it.worker(1).ready)
            assert it.worker(1).why == "nobody listens there"
            assert it.gateway.counters.failures[it.workers[1].url] <= 30

    run(body)


def test_a_kept_connection_that_the_worker_closed_is_no_failure():
    async def closes(worker, request):
        yield plain(200, {"from": worker.name})
        for writer in list(worker.writers):
            writer.close()

    async def body():
        async with running(closes) as it:
            for _ in range(5):
                assert (await it.complete()).status_code == 200
            assert not it.gateway.counters.failures

    run(body)


def test_with_no_worker_a_request_waits_a_while_and_is_then_refused():
    async def body():
        async with running(None, wait_s=0.5) as it:
            it.workers[0].ready = False
            await it.until(lambda: not it.worker(0).ready)
            assert (await it.http.get("/ready")).status_code == 503
            late = asyncio.create_task(it.complete())
            await asyncio.sleep(0.1)
            it.workers[0].ready = True
            assert (await late).status_code == 200
            it.workers[0].ready = False
            await it.until(lambda: not it.worker(0).ready)
            answer = await it.complete()
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker")
            assert answer.headers["retry-after"]

    run(body)


def test_a_worker_that_is_stopped_loses_what_it_has_and_only_what_had_begun_hears_of_it():
    async def hangs(worker, request):
        yield STREAM_HEAD
        if request["body"]["prompt"] == "begun":
            yield chunk(EVENT % "one ")
        worker.silent = True  # as SIGSTOP: the socket is open and says nothing
        await asyncio.sleep(30)

    def by_name(worker, request):
        return hangs(worker, request) if worker.name == "a" else say_hello(worker, request)

    async def body():
        async with running(by_name, by_name, policy="round_robin", stall_s=0.4, probe_timeout_s=0.2) as it:
            begun = asyncio.create_task(it.stream("begun"))
            await it.until(lambda: it.worker(0).in_flight == 1)
            other = asyncio.create_task(it.stream("other"))
            fresh = asyncio.create_task(it.stream("fresh"))
            assert texts((await other)[1])[0] == "b0 "
            assert texts((await fresh)[1])[0] == "b0 ", "it had no event, so it went to the other"
            events = (await begun)[1]
            assert texts(events) == ["one "]
            assert "worker_lost" in events[-1]

    run(body)


def test_a_client_that_leaves_takes_its_request_back():
    async def endless(worker, request):
        yield STREAM_HEAD
        while True:
            yield chunk(EVENT % "x")
            await asyncio.sleep(0.01)

    async def body():
        async with running(endless) as it:
            async with it.http.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as answer:
                await anext(answer.aiter_lines())
            await it.until(lambda: it.workers[0].aborted == 1 and it.worker(0).in_flight == 0)
            assert it.worker(0).load == 0
            assert it.gateway.counters.outcomes["client_gone"] == 1

    run(body)


def test_a_slow_reader_stops_its_worker_and_not_the_gateway():
    sent = 0

    async def endless(worker, request):
        nonlocal sent
        yield STREAM_HEAD
        while True:
            sent += 1
            yield chunk(EVENT % ("x" * 10_000))

    def one_of(worker, request):
        return endless(worker, request) if request["body"]["prompt"] == "slow" else say_hello(worker, request)

    async def body():
        async with running(one_of) as it:
            reader, writer = await asyncio.open_connection("127.0.0.1", it.port, limit=1024)
            payload = b'{"prompt":"slow","stream":true}'
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(payload))
            writer.write(payload)
            await reader.readline()
            before = -1
            while sent != before:
                before = sent
                await asyncio.sleep(0.2)
            assert sent * 10_000 < 50e6
            assert (await it.complete()).status_code == 200
            writer.transport.abort()

    run(body)


def test_a_connection_whose_answer_ends_after_its_pool_was_closed_is_not_kept():
    async def body():
        worker = FakeWorker("a", say_hello)
        await worker.start()
        pool = Pool(worker.url, 5.0)
        connection = await pool.connection()
        sink = Whole()
        connection.send(b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n", sink)
        pool.close()
        assert b"ready" in await sink.done
        assert connection.closed
        await worker.close()

    run(body)


def test_a_drained_worker_gets_nothing_new_and_only_an_admin_may_drain():
    async def body():
        async with running(None, None, policy="round_robin", admin_keys=(hash_key("adm"),)) as it:
            url = f"/gateway/drain?worker={it.workers[0].url}"
            head = {"authorization": "Bearer adm"}
            assert (await it.http.post(url)).status_code == 401
            assert (await it.http.post(url, headers=head)).json()["drained"]
            assert {(await it.complete()).json()["from"] for _ in range(4)} == {"b"}
            listed = (await it.http.get("/gateway/workers", headers=head)).json()["workers"]
            assert [worker["drained"] for worker in listed] == [True, False]
            await it.http.post(url.replace("drain?", "undrain?"), headers=head)
            assert {(await it.complete()).json()["from"] for _ in range(4)} == {"a", "b"}
            assert (await it.http.post("/gateway/drain?worker=x", headers=head)).status_code == 404
        async with running(None) as it:
            assert (await it.http.get("/gateway/workers")).status_code == 403

    run(body)


@pytest.mark.parametrize("path", ["/pause", "/reset_prefix_cache", "/v1/nothing", "/v1/completions/../../pause"])
def test_the_workers_admin_routes_are_not_passed_on(path):
    async def body():
        async with running(None) as it:
            assert (await it.http.post(path, json={})).status_code == 404
            assert not it.workers[0].seen

    run(body)


def test_a_stored_response_is_found_where_it_is():
    def stores(worker, request):
        if request["method"] in ("GET", "DELETE") and worker.name == "a":
            return error(404, "response_not_found")
        return plain(200, {"from": worker.name})

    async def body():
        async with running(stores, stores) as it:
            assert (await it.http.get("/v1/responses/resp_1")).json() == {"from": "b"}
            more = await it.http.post("/v1/responses", json={"input": "and?", "previous_response_id": "resp_1"})
            assert more.json() == {"from": "b"}

    run(body)


POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcdef", 400),
        (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\nhost: x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 40_000 + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
        (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\n", 413),
        (b"GET /health HTTP/1.1\r\nhost: x\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n", 400),
    ],
)
def test_what_is_no_good_request_is_refused_and_the_connection_ended(data, status):
    async def body():
        async with running(None) as it:
            reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
            writer.write(data + b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:100]
            assert answer.count(b"HTTP/1.1 ") == 1, "what follows it is never answered"
            assert b'"error"' in answer
            assert not it.workers[0].seen
            writer.close()

    run(body)


def test_requests_on_one_connection_are_answered_in_their_order():
    async def slow_first(worker, request):
        if request["body"]["prompt"] == "1":
            await asyncio.sleep(0.1)
        yield plain(200, {"n": request["body"]["prompt"]})

    async def body():
        async with running(slow_first) as it:
            reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
            for n in b"1", b"2", b"3":
                payload = b'{"prompt":"%b"}' % n
                head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n"
                writer.write(head % len(payload) + (b"connection: close\r\n" if n == b"3" else b"") + b"\r\n" + payload)
            answer = await reader.read()
            assert [part[:1] for part in answer.split(b'"n": "')[1:]] == [b"1", b"2", b"3"]
            writer.close()

    run(body)


def test_a_body_in_chunks_and_one_that_waits_for_leave_are_taken():
    async def body():
        async with running(None) as it:
            reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n")
            writer.write(b"expect: 100-continue\r\nconnection: close\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
            writer.write(b'7\r\n{"promp\r\n8\r\nt":"hi"}\r\n0\r\n\r\n')
            assert (await reader.read()).startswith(b"HTTP/1.1 200")
            assert it.workers[0].seen[0]["body"] == {"prompt": "hi"}
            assert it.workers[0].seen[0]["headers"]["content-length"] == "15"
            writer.close()

    run(body)


def test_one_key_never_learns_where_anothers_prompt_is():
    async def body():
        async with running(None, None, block_bytes=16) as it:
            prompt = "the same long prompt for two callers " * 4
            for key in ("alice", "bob"):
                for _ in range(3):
                    await it.complete(prompt, headers={"authorization": f"Bearer {key}"})
            assert it.gateway.balancer.choices["known"] == 4
            assert [len(worker.seen) for worker in it.workers] == [3, 3], "spread as two prompts are"

    run(body)


def test_a_worker_that_moved_is_found_at_its_new_address():
    async def body():
        async with running(None, None) as it:
            gateway, (old, new) = it.gateway, [worker.url for worker in it.workers]
            await it.workers[0].die()
            gateway.workers.pop()
            gateway.balancer.set_workers(gateway.workers)
            assert (await it.complete()).status_code == 503
            moved = gateway.move(old, new)
            task = asyncio.create_task(watch(gateway, moved))
            assert (await it.complete()).json() == {"from": "b"}
            assert set(gateway.balancer.workers) == {new}
            task.cancel()

    run(body)


def test_metrics_tell_what_happened():
    async def body():
        async with running(refuse(503, "shutting_down"), None, policy="round_robin") as it:
            await it.complete()
            text = (await it.http.get("/metrics")).text
            assert 'jaxllm_gateway_requests_total{outcome="answered"} 1.0' in text
            assert "jaxllm_gateway_retries_total 1.0" in text
            assert f'jaxllm_gateway_worker_usable{{worker="{it.workers[1].url}"}} 1.0' in text

    run(body)


def test_the_gateway_runs_where_jax_is_not_installed():
    script = (
        "import sys\n"
        "for name in ('jax', 'jaxlib', 'flax'): sys.modules[name] = None\n"
        "from serve.cli import main\n"
        "main(['gateway', '--workers', 'http://127.0.0.1:1', '--port', '99999'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == "error: --port 99999: must be an integer in [0, 65535]\n"
    assert done.returncode == 2
