"""jaxllm chat --url: a conversation with a server of OpenAI's API, one written down here and the real one."""

import asyncio
import io
import json
import os
import signal
import threading

import pytest
from helpers.fake_openai import FakeOpenAI, serving
from helpers.server import Server
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from jaxllm.core import FinishReason, SamplingParams
from serve import cli
from serve.chat import Conversation, repl
from serve.http_client import ClientError, Target
from serve.remote import open_remote


def chunk(text, finish=None):
    return {"id": "x", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


class Fake:
    """Answers every chat with the same events; None among them waits for ever."""

    def __init__(self, *events, status=200, models=({"id": "one"},)):
        self.events, self.status, self.models, self.bodies, self.keys = events, status, models, [], []
        self.waiting, self.left = threading.Event(), threading.Event()

    def app(self):
        return Starlette(
            routes=[
                Route("/v1/models", lambda request: JSONResponse({"data": list(self.models)})),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ]
        )

    async def chat(self, request):
        self.bodies.append(await request.json())
        self.keys.append(request.headers.get("authorization"))
        if self.status != 200:
            return JSONResponse({"error": {"message": "temperature = 9: too hot"}}, self.status)
        return StreamingResponse(self.stream(), media_type="text/event-stream")

    async def stream(self):
        try:
            for one in self.events:
                if one is None:
                    self.waiting.set()
                    await asyncio.sleep(60)
                yield f"data: {one if isinstance(one, str) else json.dumps(one)}\n\n"
        finally:
            self.left.set()


FINE = chunk("fi"), chunk("ne"), chunk("", "stop"), "[DONE]"


def talk(fake, *lines, stats=False, **sampling):
    """(all went well, printed, said, the conversation afterwards)."""
    out, err = io.StringIO(), io.StringIO()
    with serving(fake) as url:
        model = open_remote(url, None, "secret", list(sampling))
        try:
            made = Conversation(model, SamplingParams(**sampling), "Be brief.")
            good = repl(made, lines, out, err, stats=stats)
        finally:
            model.close()
    return good, out.getvalue(), err.getvalue(), made.messages


def test_the_server_gets_the_conversation_and_only_the_parameters_that_were_given():
    fake = Fake(*FINE)
    good, out, err, messages = talk(fake, "one", "two", temperature=0.5, max_tokens=7)
    assert (good, out, err) == (True, "fine\nfine\n", "")
    first, second = fake.bodies
    said = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}
    assert first == {"model": "one", "messages": [*said], "stream": True, "temperature": 0.5, "max_tokens": 7}
    assert second["messages"] == [*said, {"role": "assistant", "content": "fine"}, {"role": "user", "content": "two"}]
    assert messages[-1] == {"role": "assistant", "content": "fine"}
    assert fake.keys == ["Bearer secret"] * 2


def test_the_speed_of_an_answer_is_told_when_asked_for():
    _, _, err, _ = talk(Fake(*FINE), "one", stats=True)
    assert err.startswith("[2 tokens, TTFT ")


@pytest.mark.parametrize(
    ("fake", "said", "shown"),
    [
        (Fake(status=400), "the server said 400: temperature = 9: too hot", ""),
        (Fake(chunk("half"), {"error": {"message": "the engine died"}}), "the engine died", "half\n"),
        (Fake(chunk("half")), "the server ended the answer before its end", "half"),
        (Fake(chunk("half"), "what?"), "no event of OpenAI's API: 'what?'", "half"),
        (Fake("[1]"), "no event of OpenAI's API: '[1]'", ""),
    ],
    ids=["refused", "error event", "broken off", "no JSON", "no object"],
)
def test_a_turn_that_fails_is_said_and_leaves_the_conversation_as_it_was(fake, said, shown):
    good, out, err, messages = talk(fake, "one")
    assert (good, out, err) == (False, shown, f"error: {said}\n")
    assert messages == [{"role": "system", "content": "Be brief."}]


def test_a_server_that_goes_away_between_turns_does_not_end_the_chat():
    with serving(Fake(*FINE)) as url:
        model = open_remote(url, None, None, [])
        made = Conversation(model, SamplingParams())
        assert repl(made, ["one"], io.StringIO(), io.StringIO(), stats=False)
    err = io.StringIO()
    assert not repl(made, ["two", "three"], io.StringIO(), err, stats=False)
    model.close()
    assert err.getvalue().count("cannot be reached") == 2
    assert [one["content"] for one in made.messages] == ["one", "fine"]


@pytest.mark.parametrize(
    ("said", "known"),
    [("stop", FinishReason.STOP), ("length", FinishReason.LENGTH), ("tool_calls", FinishReason.STOP)],
)
def test_an_answers_end_has_a_reason_we_know(said, known):
    with serving(Fake(chunk("a"), chunk("b", said), "[DONE]")) as url:
        model = open_remote(url, "named", None, [])
        found = [one for one in model.stream_chat([{"role": "user", "content": "x"}], SamplingParams()) if one.outputs]
        model.close()
    assert [one.outputs[0].text for one in found] == ["a", "b"]
    assert [one.outputs[0].finish_reason for one in found] == [None, known]
    assert found[-1].finished


@pytest.mark.parametrize("said", [(), ("half",)], ids=["before its first token", "after it"])
def test_ctrl_c_ends_the_wait_for_a_silent_server_and_the_connection(said):
    fake = Fake(*map(chunk, said), None)
    with serving(fake) as url:
        model = open_remote(url, None, None, [])
        made, err = Conversation(model, SamplingParams()), io.StringIO()

        def interrupt():
            fake.waiting.wait(10)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        assert repl(made, ["one"], io.StringIO(), err, stats=True)
        thread.join()
        assert err.getvalue().startswith("[stopped; ")
        assert made.messages[-1] == {"role": "assistant", "content": "".join(said)}
        model.close()  # nothing of it runs any more
        assert fake.left.wait(10)


def test_a_second_ctrl_c_breaks_in_and_leaves_nothing_running():
    fake = Fake(chunk("half"), None)

    class Pressed(io.StringIO):
        def write(self, text):
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
            return len(text)

    with serving(fake) as url:
        model = open_remote(url, None, None, [])
        made = Conversation(model, SamplingParams())
        with pytest.raises(KeyboardInterrupt):
            repl(made, ["one"], Pressed(), io.StringIO(), stats=False)
        assert made.messages == []
        model.close()
        assert fake.left.wait(10)


def test_ctrl_c_stops_an_answer_and_the_server_stops_writing_it():
    fake = FakeOpenAI(delay_s=0.01)
    out = io.StringIO()

    class Reader(io.StringIO):
        def write(self, text):
            if out.write(text) and "and on" in text and not out.getvalue().count("!"):
                out.write("!")
                os.kill(os.getpid(), signal.SIGINT)
            return len(text)

    with serving(fake) as url:
        model = open_remote(url, None, None, [])
        made = Conversation(model, SamplingParams())
        assert repl(made, ["a long one"], Reader(), io.StringIO(), stats=False)
        model.close()
        for _ in range(200):
            if not fake.open_streams:
                break
            threading.Event().wait(0.02)
        assert fake.open_streams == 0
    assert made.messages[-1]["content"].endswith("and on ")


@pytest.mark.parametrize(
    ("models", "message"), [((), "/v1/models: 200"), (("one",), "/v1/models: 200")], ids=["none", "no objects"]
)
def test_a_server_without_models_is_an_error_that_says_so(models, message):
    with serving(Fake(models=models)) as url, pytest.raises(ClientError, match=message):
        open_remote(url, None, None, [])


# ---- the command, against the real application ----


def command(monkeypatch, capsys, stdin, *flags):
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    with pytest.raises(SystemExit) as raised:
        cli.main(["chat", *flags])
    told = capsys.readouterr()
    return raised.value.code, told.out, told.err


def test_piped_lines_are_answered_by_the_real_server(monkeypatch, capsys):
    with Server() as server:
        flags = ["--url", server.url + "/v1", "--temperature", "0", "--max-tokens", "12", "--system", "short"]
        code, out, err = command(monkeypatch, capsys, "first\nsecond\n", *flags)
        messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "first"}]
        wanted = server.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 12}).json()[
            "choices"
        ][0]["message"]["content"]
        server.check_a()
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == wanted
    assert len(lines) == 2


def test_what_the_real_server_refuses_is_said_and_the_code_is_1(monkeypatch, capsys):
    with Server() as server:
        code, out, err = command(monkeypatch, capsys, "hello\n", "--url", server.url, "--max-tokens", "100000")
        assert (code, out) == (1, "")
        assert err.startswith("error: the server said 400: the context is 512 tokens")
        code, _, err = command(monkeypatch, capsys, "hello\n", "--url", server.url, "--model", "nobody")
        assert (code, "model 'nobody' does not exist" in err) == (1, True)


def test_an_address_without_a_server_is_one_line(monkeypatch, capsys):
    code, _, err = command(monkeypatch, capsys, "hello\n", "--url", "http://127.0.0.1:1")
    assert (code, err) == (1, "error: http://127.0.0.1:1 cannot be reached: Connect call failed ('127.0.0.1', 1)\n")


def test_a_prefix_of_the_url_is_kept():
    assert Target("http://host:1/base").head("GET", "/v1/models", 0).startswith(b"GET /base/v1/models HTTP/1.1\r\n")
