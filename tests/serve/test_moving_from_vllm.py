"""What a client of vLLM, SGLang or OpenAI sends without thinking about it, over real HTTP on the fake engine."""

import asyncio
import json
import logging
import threading
from types import SimpleNamespace

import pytest
import typer
from helpers.server import HEAD, Server, settings
from typer.testing import CliRunner

from jaxllm.core import GrammarKind, GrammarSpec
from jaxllm.engine.decoding.grammars import MAX_SOURCE_BYTES
from jaxllm.engine.intake import Intake
from jaxllm.engine.messages import Beat
from serve.commands.serve import command
from serve.openai.tools import ToolPlan, parser_names
from serve.settings import FrontSettings, hash_key

LONG = "a prompt of more than sixty-four tokens, which is what one step of this engine takes: so it comes in parts" * 2


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


def collected(events, chosen):
    """By choice: everything that a stream's chunks hold under a key, in order."""
    found = {}
    for event in events[:-1]:
        for choice in event["choices"]:
            found.setdefault(choice["index"], []).extend(chosen(choice) or ())
    return found


# ---- log-probabilities of prompts ----


@pytest.mark.parametrize("prompt", ["abc", LONG], ids=["in one step", "in several"])
@pytest.mark.parametrize("pace", [0.0, 0.04])
def test_streamed_log_probabilities_of_a_prompt_are_those_of_the_whole_answer(prompt, pace):
    """Also of the second choice, whose row computes none of them, and when the prompt's parts come one by one."""
    fields = dict(prompt=prompt, max_tokens=3, temperature=1, seed=1, n=2, logprobs=1, prompt_logprobs=1)
    with Server(step_s=pace) as server:
        for echo in (False, True):
            whole = server.post("/v1/completions", {**fields, "echo": echo}).json()["choices"]
            events = server.events("/v1/completions", {**fields, "echo": echo})
            for name in ("tokens", "token_logprobs", "text_offset"):
                found = collected(events, lambda choice, name=name: (choice["logprobs"] or {}).get(name))
                assert found == {choice["index"]: choice["logprobs"][name] for choice in whole}
            found = collected(events, lambda choice: choice.get("prompt_logprobs"))
            assert found == {choice["index"]: choice["prompt_logprobs"] for choice in whole}
            assert len(found[0]) == len(prompt)


@pytest.mark.parametrize("pace", [0.0, 0.04])
def test_a_chat_stream_has_the_prompts_log_probabilities_once(pace):
    fields = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 3, "temperature": 0, "prompt_logprobs": 2}
    with Server(step_s=pace) as server:
        whole = server.post("/v1/chat/completions", fields).json()
        events = server.events("/v1/chat/completions", fields)
    with_them = [event for event in events[:-1] if "prompt_logprobs" in event]
    assert with_them == events[:1]
    assert events[0]["prompt_logprobs"] == whole["prompt_logprobs"]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"


# ---- fields ----


def test_null_is_what_it_would_be_without_it(server):
    names = ("n", "stream", "stop", "logprobs", "top_logprobs", "logit_bias", "seed", "tools", "tool_choice", "user")
    names += ("ignore_eos", "min_tokens", "priority", "stream_options", "presence_penalty", "top_p", "response_format")
    nulls = dict.fromkeys((*names, "skip_special_tokens", "add_generation_prompt"))
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
    plain, with_nulls = (server.post("/v1/chat/completions", one) for one in (body, {**body, **nulls}))
    assert with_nulls.status_code == 200
    assert with_nulls.json()["choices"] == plain.json()["choices"]
    assert server.post("/v1/completions", {"prompt": None}).json()["error"]["param"] == "prompt"
    schema = server.http.get("/openapi.json").json()["components"]["schemas"]["ChatBody"]
    assert {"type": "null"} in schema["properties"]["n"]["anyOf"]
    assert "anyOf" not in schema["properties"]["messages"]


@pytest.mark.parametrize(
    "field",
    [
        {"echo": True},
        {"add_special_tokens": True},
        {"spaces_between_special_tokens": False},
        {"include_reasoning": False},
        {"guided_whitespace_pattern": " "},
        {"thinking_token_budget": 5},
        {"vllm_xargs": {"a": 1}},
    ],
    ids=lambda field: next(iter(field)),
)
def test_what_vllm_has_and_this_server_has_not_is_refused_by_name_and_its_default_is_not(server, field):
    (name,) = field
    answer = server.chat(**field)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    assert server.chat(**{name: None}).status_code == 200


def test_fields_of_other_servers_that_change_nothing_are_ignored(server):
    fields = dict(service_tier="auto", store=True, metadata={"a": "b"}, safety_identifier="x", prompt_cache_key="k")
    assert server.chat(**fields, guided_decoding_backend="xgrammar").status_code == 200


def test_tokens_are_named_by_their_ids_when_asked(server):
    body = dict(logprobs=1, return_tokens_as_token_ids=True)
    found = server.complete("hello", **body).json()["choices"][0]
    assert found["logprobs"]["tokens"] == [f"token_id:{ord(letter)}" for letter in found["text"]]
    found = server.chat(**{**body, "logprobs": True}).json()["choices"][0]
    names = [one["token"] for one in found["logprobs"]["content"]]
    assert names == [f"token_id:{ord(letter)}" for letter in found["message"]["content"]]


def test_special_tokens_around_a_prompt_can_be_left_out():
    """The fake engine's tokenizer adds none; this one adds a start token."""
    tokenizer = SimpleNamespace(
        encode=lambda text, add_special_tokens: [1] * add_special_tokens + [ord(c) for c in text]
    )
    intake = Intake(vocab_size=300, max_model_len=9, tokenizer=tokenizer)
    assert intake.encode("ab") == (1, 97, 98)
    assert intake.encode("ab", False) == (97, 98)


# ---- forms and thinking ----


def test_a_response_obeys_the_form_of_its_text(server):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "name": "s", "schema": schema, "strict": True}
    body = {"input": "hi", "max_output_tokens": 60, "text": {"format": form}}
    found = server.post("/v1/responses", body).json()
    assert found["status"] == "completed"
    assert isinstance(json.loads(found["output"][0]["content"][0]["text"])["a"], bool)
    assert found["text"] == {"format": form}
    for wrong in ({"type": "yaml"}, {"type": "json_schema"}, "json", {"type": "json_schema", "schema": 3}):
        answer = server.post("/v1/responses", {**body, "text": {"format": wrong}})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "text"), wrong


def test_a_model_that_thinks_may_think_before_a_form_and_the_form_is_the_answer():
    """The fake model says what its grammar lets it at random: some answers begin with a thought, which never ends."""
    seen = set()
    with Server(settings(reasoning_parser="qwen3")) as server:
        for word in ("a", "b", "c", "d", "e", "f", "g", "h"):
            message = server.chat(word, guided_regex="x{3}", max_tokens=24).json()["choices"][0]["message"]
            thought = message.get("reasoning_content")
            assert (message["content"] or "") == ("xxx" if thought is None else "")
            seen.add(thought is None)
    assert seen == {True, False}


def test_a_form_that_is_too_long_with_its_thought_is_refused_and_no_fault_of_the_server():
    whole = "x" * (MAX_SOURCE_BYTES - 8)
    with Server(settings(reasoning_parser="qwen3")) as server:
        answer = server.chat(guided_regex=whole)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "guided_regex")


def test_a_form_follows_the_thought_that_the_prompt_has_begun():
    asked = GrammarSpec(GrammarKind.REGEX, "x")
    inside = ToolPlan(reasoning_parser="deepseek_r1").past_thinking(asked, "User: hi<think>\n")
    assert inside is not None
    first, then = json.loads(inside.source)["elements"]
    assert (first["elements"][0]["begin"], first["elements"][0]["end"]) == ("", "</think>")
    assert then == {"type": "regex", "pattern": "x"}
    assert ToolPlan().past_thinking(asked, "User: hi") is asked
    assert ToolPlan(reasoning_parser="qwen3").past_thinking(None, "User: hi") is None


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("qwen25", "qwen"),
        ("llama3", "llama3_json"),
        ("deepseekv3", "deepseek_v3"),
        ("hermes", "hermes"),
        ("none", None),
    ],
)
def test_parsers_also_have_sglangs_names(theirs, ours):
    found = parser_names(FrontSettings(tool_parser=theirs, reasoning_parser="deepseek-r1"), None)
    assert found == (ours, "deepseek_r1")


# ---- operators ----


def test_a_pause_is_known_as_soon_as_it_is_answered(server):
    for path, status in (("/pause", 503), ("/resume", 200)) * 3:
        assert server.http.post(path, headers=HEAD).status_code == 200
        assert server.status("/ready") == status


def test_a_key_has_its_tokens_a_minute_and_others_theirs():
    keys = settings(keys=(hash_key("one"), hash_key("two")), tokens_per_minute=12)
    body = {"prompt": "eight ch", "max_tokens": 1}
    with Server(keys) as server:
        ask = lambda key: server.post("/v1/completions", body, headers={"authorization": f"Bearer {key}"})  # noqa: E731
        assert ask("one").status_code == 200
        refused = ask("one")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
        assert 1 <= int(refused.headers["retry-after"]) <= 21  # 4 more tokens at one in five seconds
        assert ask("two").status_code == 200


@pytest.mark.parametrize(
    ("stats", "lines"),
    [
        ({"generated_tokens": 5.0}, 1),  # once: nothing was generated after it
        ({"generated_tokens": 0.0, "running": 1}, 3),  # a long prompt, and no token yet
        ({"generated_tokens": 0.0, "waiting": 2}, 3),
        ({"generated_tokens": 0.0}, 0),
    ],
    ids=["tokens", "a long prompt", "a queue", "nothing"],
)
def test_a_busy_server_says_so_every_ten_seconds_and_an_idle_one_nothing(server, caplog, monkeypatch, stats, lines):
    paces, real, here = [], asyncio.sleep, threading.get_ident()

    async def sleep(seconds):
        if threading.get_ident() != here:  # the server that runs beside
            await real(seconds)
            return
        paces.append(seconds)
        if len(paces) > 3:
            raise asyncio.CancelledError

    monkeypatch.setattr(server.front.client.health, "beat", Beat(0.0, False, False, {"total_pages": 9, **stats}))
    monkeypatch.setattr("serve.front.asyncio.sleep", sleep)
    with caplog.at_level(logging.INFO, "serve.front"), pytest.raises(asyncio.CancelledError):
        asyncio.run(server.front.report())
    said = [record.getMessage() for record in caplog.records if "tokens/s" in record.getMessage()]
    assert paces == [10.0] * 4
    assert len(said) == lines


def test_vllms_switches_that_are_always_on_are_taken_and_cannot_be_turned_off():
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("serve")(command)
    on = CliRunner().invoke(
        app, ["--enable-auto-tool-choice", "--enable-chunked-prefill", "-q", "int8", "--print-config"]
    )
    assert on.exit_code == 0
    assert 'quantization = "int8"' in on.output
    off = CliRunner().invoke(app, ["--no-enable-auto-tool-choice", "--print-config"])
    assert (off.exit_code, "use --tool-call-parser none" in off.output) == (1, True)
