"""jaxllm bench serve: metrics against timelines made by hand, arrivals, servers that answer, fail, hang and break off.

The fake server is an OpenAI server whose every event is written down here; the last tests drive the real application on
the fake engine.
"""

import asyncio
import itertools
import json
import math
import random

import numpy as np
import pytest
from helpers.fake_openai import serving
from helpers.server import Server
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from serve import cli, loadgen
from serve.http_client import ClientError, Target
from serve.loadgen import Load, Outcome, goodput_limits, report


def token(text, finish=None):
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}


def delta(finish=None, **said):
    return {"choices": [{"index": 0, "delta": said, "finish_reason": finish}]}


def usage(prompt, completion):
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


async def parts_of(*events):
    for one in events:
        yield f"data: {one if isinstance(one, str) else json.dumps(one)}\n\n".encode()


def heard(monkeypatch, times, *events):
    """What a listener makes of events that come at these times, sent at 100."""
    clock = iter(times)
    monkeypatch.setattr("serve.loadgen.time.perf_counter", lambda: next(clock))
    found = Outcome(5, sent_s=100.0)
    asyncio.run(loadgen._listen(found, parts_of(*events)))
    return found


# ---- what is measured ----


def test_a_timeline_has_vllms_ttft_gaps_and_end(monkeypatch):
    events = token("a"), token("b"), token("", "length"), usage(7, 3), "[DONE]"
    found = heard(monkeypatch, [100.5, 100.75, 101.5, 102.0], *events)
    assert (found.ttft_s, found.gaps_s, found.e2e_s) == (0.5, [0.25, 0.75], 1.5)
    assert (found.prompt_tokens, found.output_tokens) == (7, 3)
    assert found.tpot_s == (1.5 - 0.5) / 2
    assert found.error is None


def test_a_token_without_text_is_one_and_a_chats_role_is_none(monkeypatch):
    """Half a character, a reasoning model's thoughts and an end token take a step each."""
    events = (
        delta(role="assistant", content=""),
        delta(reasoning_content="hm"),
        delta(content=""),
        delta("stop"),
        "[DONE]",
    )
    found = heard(monkeypatch, [100.1, 101.0, 102.0, 104.0], *events)
    assert (found.ttft_s, found.gaps_s, found.e2e_s) == (1.0, [1.0, 2.0], 4.0)
    assert (found.output_tokens, found.prompt_tokens) == (3, 5)  # counted here: the server did not say


def test_a_role_beside_the_first_text_is_a_token(monkeypatch):
    found = heard(monkeypatch, [102.0], delta("stop", role="assistant", content="yes"), "[DONE]")
    assert (found.ttft_s, found.output_tokens, found.tpot_s) == (2.0, 1, 0.0)


def test_usage_beside_every_token_is_read_and_its_events_are_tokens(monkeypatch):
    events = token("a") | {"usage": {"prompt_tokens": 9, "completion_tokens": 1}}, token("b", "stop")
    events = *events, usage(9, 4), "[DONE]"
    found = heard(monkeypatch, [101.0, 102.0, 103.0], *events)
    assert (found.prompt_tokens, found.output_tokens, found.e2e_s) == (9, 4, 2.0)


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ((token("a"), {"error": {"message": "a step failed"}}), "a step failed"),
        ((usage(7, 0), "[DONE]"), "no token came"),
        ((token("a"),), "the stream ended before its end was said"),
        ((), "no token came"),
    ],
)
def test_a_stream_that_fails_or_says_nothing_is_an_error(monkeypatch, events, error):
    assert heard(monkeypatch, itertools.count(100.0), *events).error == error


def outcome(ttft, e2e, tokens, gaps=(), error=None, prompt=10):
    return Outcome(prompt, 0.0, ttft, e2e, list(gaps), tokens, error)


OUTCOMES = [
    outcome(0.1, 1.1, 11, [0.05, 0.15]),  # TPOT 100 ms
    outcome(0.3, 0.7, 3, [0.2, 0.2], prompt=30),  # 200 ms
    outcome(0.5, 0.5, 1),  # no TPOT: one token
    outcome(None, 0.0, 99, error="500: no"),
]


def test_a_report_is_the_arithmetic_of_its_outcomes():
    found = report(Load(request_rate=4.0, max_concurrency=2), OUTCOMES, 2.0, {}, [50, 99])
    assert (found["completed"], found["failed"], found["errors"]) == (3, 1, ["500: no"])
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (50, 15)
    assert (found["request_throughput"], found["output_throughput"]) == (1.5, 7.5)
    assert found["total_token_throughput"] == 32.5
    assert found["mean_ttft_ms"] == pytest.approx(300)
    assert found["median_ttft_ms"] == pytest.approx(300)
    assert found["std_ttft_ms"] == pytest.approx(np.std([100, 300, 500]))
    assert found["p99_ttft_ms"] == pytest.approx(496)  # numpy's: linear between 300 and 500
    assert found["mean_tpot_ms"] == pytest.approx(150)
    assert found["mean_itl_ms"] == pytest.approx(150)
    assert found["p50_itl_ms"] == pytest.approx(175)
    assert found["mean_e2el_ms"] == pytest.approx((1100 + 700 + 500) / 3)
    assert (found["request_rate"], found["max_concurrency"]) == (4.0, 2)
    assert "request_goodput" not in found


@pytest.mark.parametrize(
    ("limits", "met"),
    [(["ttft:300"], 2), (["ttft:300", "tpot:150"], 1), (["e2el:500"], 1), (["tpot:200"], 3), (["ttft:50"], 0)],
)
def test_goodput_counts_the_requests_that_met_every_limit(limits, met):
    found = report(Load(), OUTCOMES, 2.0, goodput_limits(limits), [99])
    assert found["request_goodput"] == met / 2.0


@pytest.mark.parametrize("pair", ["ttft", "ttft:", "ttft:-1", "ttft:nan", "itl:5", ":5"])
def test_a_limit_that_is_none_is_refused(pair):
    with pytest.raises(ClientError, match="must be ttft:MS, tpot:MS or e2el:MS"):
        goodput_limits([pair])


def test_a_run_in_which_nothing_was_answered_has_a_report():
    found = report(Load(), [OUTCOMES[-1]], 1.0, {"ttft": 1.0}, [99])
    assert (found["completed"], found["mean_ttft_ms"], found["p99_itl_ms"], found["request_goodput"]) == (0, 0, 0, 0)
    assert found["request_rate"] == "inf"
    json.dumps(found, allow_nan=False)


# ---- what is sent, and when ----


def arrival_times(monkeypatch, load):
    """On a clock that only sleeping moves."""
    now = [0.0]

    async def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr("serve.loadgen.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("serve.loadgen.asyncio.sleep", sleep)

    async def body():
        return [now[0] async for _ in loadgen.arrivals(load)]

    return np.asarray(asyncio.run(body()))


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, 1.0), (0.25, 2.0), (100.0, 0.1)])
def test_arrivals_are_poisson_or_bursts_or_even_at_the_same_rate(monkeypatch, burstiness, spread):
    """A gamma distribution's standard deviation over its mean is 1/sqrt(shape)."""
    times = arrival_times(monkeypatch, Load(num_prompts=4000, request_rate=20.0, burstiness=burstiness))
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.12)
    assert gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.12)


def test_without_a_rate_all_come_at_once(monkeypatch):
    assert not arrival_times(monkeypatch, Load(num_prompts=50)).any()


def test_lengths_are_as_asked_and_sharegpts_are_spread_within_its_cut():
    rng = random.Random(0)
    assert loadgen.lengths(Load(input_len=40, output_len=7), rng) == (40, 7)
    varied = [loadgen.lengths(Load(input_len=100, output_len=10, range_ratio=0.5), rng) for _ in range(500)]
    assert {min(size for size, _ in varied) >= 50, max(size for size, _ in varied) <= 150} == {True}
    assert len({size for size, _ in varied}) > 50
    shared = np.asarray([loadgen.lengths(Load(dataset="sharegpt"), rng) for _ in range(4000)])
    assert shared.min() >= 4
    assert shared.max() <= 1024
    assert np.median(shared, axis=0) == pytest.approx([90, 130], rel=0.1)


def test_bodies_repeat_with_their_seed_and_ask_for_what_was_asked():
    load = Load(num_prompts=3, input_len=6, output_len=9, chat=True, ignore_eos=False, temperature=0.5)
    made = loadgen.bodies(load, "m")
    assert made == loadgen.bodies(load, "m")
    (size, body), *_ = made
    assert (size, len(body["messages"][0]["content"].split())) == (6, 6)
    assert (body["model"], body["max_tokens"], body["temperature"], body["stream"]) == ("m", 9, 0.5, True)
    assert "ignore_eos" not in body
    assert loadgen.bodies(Load(num_prompts=1), "m")[0][1]["ignore_eos"] is True


# ---- against servers ----


class Fake:
    """Answers in turn with what `answers` holds: events to stream, a status, or "hang", "cut" and "garbage"."""

    def __init__(self, *answers):
        self.answers, self.bodies, self.keys, self.open, self.most = itertools.cycle(answers), [], set(), 0, 0

    def app(self):
        models = {"object": "list", "data": [{"id": "fake-model"}]}
        paths = "/v1/completions", "/v1/chat/completions"
        return Starlette(
            routes=[
                Route("/v1/models", lambda request: JSONResponse(models)),
                *(Route(path, self.answer, methods=["POST"]) for path in paths),
            ]
        )

    async def answer(self, request):
        self.bodies.append((request.url.path, await request.json()))
        self.keys.add(request.headers.get("authorization"))
        what = next(self.answers)
        if isinstance(what, int):
            return JSONResponse({"error": {"message": "not now"}}, what)
        return StreamingResponse(self.stream(what), media_type="text/event-stream")

    async def stream(self, what):
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            if what == "garbage":
                yield "data: [1, 2]\n\n"
                return
            yield f"data: {json.dumps(token('a'))}\n\n"
            if what == "hang":
                await asyncio.sleep(60)
            if what == "cut":
                raise ConnectionAbortedError
            await asyncio.sleep(0.02)
            async for part in parts_of(*what):
                yield part
        finally:
            self.open -= 1


GOOD = token("b"), token("c", "length"), usage(6, 3), "[DONE]"


def bench(url, *flags):
    """The command's exit code."""
    with pytest.raises(SystemExit) as raised:
        cli.main(["bench", "serve", "--base-url", url, *flags])
    return raised.value.code


@pytest.fixture
def printed(capsys):
    return lambda: capsys.readouterr()


def test_the_command_prints_a_table_and_writes_json(printed, tmp_path):
    fake, out = Fake(GOOD), tmp_path / "deep" / "result.json"
    with serving(fake) as url:
        flags = ["--num-prompts", "4", "--max-concurrency", "2", "--input-len", "5", "--output-len", "3"]
        flags += ["--goodput", "ttft:5000", "--metric-percentiles", "50,99", "--api-key", "k", "--out", str(out)]
        assert bench(url + "/v1", *flags) == 0
    found = json.loads(out.read_text())
    assert (found["completed"], found["failed"], found["model"]) == (4, 0, "fake-model")
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (24, 12)
    assert found["load"]["num_prompts"] == 4
    assert found["load"]["request_rate"] == "inf"
    assert found["command"].split()[0] == "jaxllm"
    assert found["p99_itl_ms"] > 10  # a pause of 20 ms is in every answer
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])
    told = printed().out
    assert "Requests answered, failed" in told
    assert "Requests/s within the limits" in told
    assert told.splitlines()[7].split() == ["ms", "mean", "median", "p50", "p99"]
    assert fake.keys == {"Bearer k"}
    assert {path for path, _ in fake.bodies} == {"/v1/completions"}


def test_a_closed_loop_never_has_more_under_way_than_asked():
    fake = Fake(GOOD)
    with serving(fake) as url:
        load = Load(num_prompts=12, max_concurrency=3, input_len=4, output_len=3)
        outcomes, seconds = asyncio.run(loadgen.run(load, Target(url), "m", lambda done: None))
    assert fake.most <= 3
    assert len(outcomes) == 12
    assert all(one.error is None and one.output_tokens == 3 for one in outcomes)
    assert seconds >= 4 * 0.02  # four rounds of at least one pause each


def test_an_open_loop_waits_for_nobody_and_tells_how_many_are_done():
    fake, told = Fake(GOOD), []
    with serving(fake) as url:
        load = Load(num_prompts=10, request_rate=500.0, burstiness=0.5, chat=True)
        outcomes, _ = asyncio.run(loadgen.run(load, Target(url), "m", told.append))
    assert told == list(range(1, 11))
    assert {path for path, _ in fake.bodies} == {"/v1/chat/completions"}
    starts = [one.sent_s for one in outcomes]
    assert starts == sorted(starts)
    assert fake.most > 1


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (503, "503: not now"),
        ("cut", "the answer broke off"),
        ("hang", "no end within 0.3 s"),
        ("garbage", "no event of OpenAI's API"),
        ((), "the stream ended before its end was said"),
        (({"error": {"message": "engine_error: a step failed"}},), "engine_error: a step failed"),
    ],
    ids=["status", "cut", "hang", "garbage", "no end", "error event"],
)
def test_a_request_that_fails_is_counted_and_the_others_are_measured(answer, error):
    with serving(Fake(GOOD, answer)) as url:
        load = Load(num_prompts=4, max_concurrency=1, timeout_s=0.3 if answer == "hang" else 30)
        outcomes, seconds = asyncio.run(loadgen.run(load, Target(url), "m", lambda done: None))
    found = report(load, outcomes, seconds, {}, [99])
    assert (found["completed"], found["failed"]) == (2, 2)
    assert len(found["errors"]) == 1
    assert error in found["errors"][0]
    assert found["total_output_tokens"] == 6


def test_a_server_that_answers_nothing_is_an_error_of_the_command(printed):
    with serving(Fake(500)) as url:
        assert bench(url, "--num-prompts", "2") == 1
    assert "error: no request was answered: 500: not now" in printed().err


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1", "cannot be reached"),
        ("ftp://there", "must be http://host:port or https://host:port"),
        ("http://here:nowhere", "must be http://host:port or https://host:port"),
    ],
)
def test_a_server_that_is_not_there_is_one_line(printed, url, message):
    assert bench(url) == 1
    assert message in printed().err


def test_what_cannot_be_measured_is_refused_first(printed):
    for flags in (
        ["--dataset-name", "novels"],
        ["--request-rate", "0"],
        ["--burstiness", "0"],
        ["--metric-percentiles", "101"],
        ["--metric-percentiles", "high"],
    ):
        assert bench("http://127.0.0.1:1", *flags) == 2
        told = printed().err
        assert told.startswith("error: ")
        assert flags[0] in told


def test_something_that_speaks_no_http_is_one_line():
    async def body():
        async def talk(reader, writer):
            writer.write(b"SSH-2.0-no\r\n\r\n")
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await loadgen.send(Target(f"http://127.0.0.1:{port}"), "/v1/completions", 1, {}, 5.0)

    assert "no HTTP" in (asyncio.run(body()).error or "")


# ---- against the real application ----


def test_a_real_server_is_measured_and_counts_as_its_own_metrics_do(tmp_path):
    out = tmp_path / "real.json"
    with Server() as server:
        flags = ["--num-prompts", "6", "--max-concurrency", "3", "--input-len", "4", "--output-len", "9"]
        assert bench(server.url, *flags, "--out", str(out)) == 0
        server.settle()
        stats = server.info()["engine"]["stats"]
        assert bench(server.url, *flags, "--chat", "--request-rate", "200", "--out", str(tmp_path / "chat.json")) == 0
    found = json.loads(out.read_text())
    assert (found["completed"], found["total_output_tokens"]) == (6, 54)
    assert found["total_input_tokens"] == stats["prompt_tokens"]
    assert stats["generated_tokens"] == 54
    assert json.loads((tmp_path / "chat.json").read_text())["total_output_tokens"] == 54
    assert math.isfinite(found["p99_itl_ms"])
