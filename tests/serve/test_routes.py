"""What each route gives, over real HTTP, from the shapes that clients of OpenAI, Anthropic and SGLang expect."""

import base64
import json
import struct
import threading
import time

import httpx
import pytest
from helpers.server import HEAD, Server, settings

from serve.app import TABLE
from serve.middleware import ADMIN, PUBLIC
from serve.settings import hash_key

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server():
    with Server(step_s=0.001) as running:
        yield running
        running.check_a()


# ---- completions and chat ----


def test_a_stream_says_what_the_whole_answer_says(server):
    whole = server.complete(max_tokens=30).json()["choices"][0]["text"]
    assert server.streamed_text(max_tokens=30) == whole
    assert len(whole) == 30


def test_a_chat_stream_has_a_role_first_a_reason_last_and_usage_when_asked(server):
    body = {"messages": MESSAGES, "max_tokens": 20, "stream_options": {"include_usage": True}}
    events = server.events("/v1/chat/completions", body)
    assert events[-1] == "[DONE]"
    deltas = [event["choices"][0] for event in events[:-2]]
    assert deltas[0]["delta"]["role"] == "assistant"
    assert [one["finish_reason"] for one in deltas if one["finish_reason"]] == ["length"]
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 20
    text = "".join(one["delta"]["content"] for one in deltas)
    assert text == server.chat(max_tokens=20).json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("stop_at", [3, 7, 15])
def test_a_stop_string_cuts_streams_and_answers_alike_and_frees_the_sequence(server, stop_at):
    text = server.complete(max_tokens=200).json()["choices"][0]["text"]
    stop = text[stop_at : stop_at + 3]
    answer = server.complete(max_tokens=200, stop=stop).json()["choices"][0]
    assert answer["text"] == text[: text.index(stop)]
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", stop)
    assert server.streamed_text(max_tokens=200, stop=stop) == answer["text"]
    kept = server.complete(max_tokens=200, stop=stop, include_stop_str_in_output=True).json()["choices"][0]
    assert kept["text"] == answer["text"] + stop
    server.settle()


def test_a_stop_token_ends_and_is_not_shown(server):
    text = server.complete(max_tokens=30).json()["choices"][0]["text"]
    answer = server.complete(max_tokens=30, stop_token_ids=[ord(text[5])]).json()["choices"][0]
    assert answer["text"] == text[: text.index(text[5])]
    assert answer["stop_reason"] == ord(text[5])


def test_many_prompts_and_choices_keep_their_order(server):
    alone = [server.complete(text).json()["choices"][0]["text"] for text in ("one", "two")]
    answer = server.complete(["one", "two"], n=2).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [answer["choices"][i]["text"] for i in (0, 2)] == alone
    body = {"prompt": ["one", "two"], "n": 2, "max_tokens": 8}
    streamed = dict.fromkeys(range(4), "")
    for event in server.events("/v1/completions", body)[:-1]:
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert list(streamed.values()) == [choice["text"] for choice in answer["choices"]]


def test_a_prompt_of_token_ids_is_the_text_it_spells(server):
    assert server.complete(list(b"hello")).json()["choices"] == server.complete("hello").json()["choices"]
    both = server.complete([list(b"one"), list(b"two")]).json()["choices"]
    assert both == server.complete(["one", "two"]).json()["choices"]


def test_logprobs_have_both_of_openais_shapes(server):
    found = server.complete("ab", logprobs=2, echo=True).json()["choices"][0]
    logprobs = found["logprobs"]
    assert "".join(logprobs["tokens"]) == found["text"]
    assert logprobs["text_offset"] == list(range(10))
    assert logprobs["token_logprobs"][0] is None
    assert set(map(len, logprobs["top_logprobs"][2:])) == {2}
    content = server.chat(logprobs=True, top_logprobs=3).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 8
    assert all(len(one["top_logprobs"]) == 3 and one["bytes"] == [ord(one["token"])] for one in content)


def test_token_ids_are_returned_when_asked_for(server):
    answer = server.complete("ab", return_token_ids=True).json()["choices"][0]
    assert answer["prompt_token_ids"] == [97, 98]
    assert bytes(answer["token_ids"]).decode() == answer["text"]


def test_a_second_request_is_told_what_the_cache_gave(server):
    text = "cached prompt of some length, of several pages"
    server.complete(text)
    details = server.complete(text).json()["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == len(text) // 8 * 8
    salted = server.complete(text, cache_salt="mine").json()["usage"]["prompt_tokens_details"]
    assert salted["cached_tokens"] == 0


def test_a_prompt_is_truncated_from_the_left(server):
    assert server.complete("x" * 300, truncate_prompt_tokens=10).json()["usage"]["prompt_tokens"] == 10
    assert server.complete("x" * 1000, truncate_prompt_tokens=-1, max_tokens=1).json()["usage"]["prompt_tokens"] == 511


def test_a_final_message_can_be_continued(server):
    messages = [*MESSAGES, {"role": "assistant", "content": "It is"}]
    body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True, "max_tokens": 4}
    ended = server.post("/tokenize", {"messages": messages, "add_generation_prompt": False}).json()["count"]
    assert server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"] == ended - 1  # no line end


def test_priority_and_allowed_tokens_reach_the_engine(server):
    text = server.complete(allowed_token_ids=[65, 66], priority=-5, max_tokens=20).json()["choices"][0]["text"]
    assert set(text) == {"A", "B"}


# ---- other shapes ----


def test_models_are_listed_by_their_served_names(server):
    listed = server.http.get("/v1/models").json()
    assert [card["id"] for card in listed["data"]] == ["byte"]
    assert listed["data"][0]["max_model_len"] == 512


def test_tokenize_and_detokenize_are_inverse(server):
    ids = server.post("/tokenize", {"prompt": "héllo"}).json()
    assert ids["count"] == 6
    assert server.post("/detokenize", {"tokens": ids["tokens"]}).json() == {"prompt": "héllo"}
    assert server.post("/detokenize", {"tokens": [10**6]}).status_code == 400
    assert server.post("/tokenize", {}).status_code == 400


def test_embeddings_are_unit_vectors_that_depend_on_the_text_alone(server):
    answer = server.post("/v1/embeddings", {"input": ["one text", "another"]}).json()
    first, second = (one["embedding"] for one in answer["data"])
    assert sum(value * value for value in first) == pytest.approx(1)
    assert first != second
    alone = server.post("/v1/embeddings", {"input": "one text"}).json()["data"][0]["embedding"]
    assert alone == first
    packed = server.post("/v1/embeddings", {"input": "one text", "encoding_format": "base64"}).json()
    assert struct.unpack("<16f", base64.b64decode(packed["data"][0]["embedding"])) == pytest.approx(first, rel=1e-6)
    last = server.post("/v1/embeddings", {"input": "one text", "pooling": "last"}).json()["data"][0]["embedding"]
    assert last != first
    assert server.post("/v1/embeddings", {"input": "x" * 600}).json()["error"]["param"] == "input"
    long = server.post("/v1/embeddings", {"input": "y" * 500})  # eight chunks
    assert long.json()["usage"]["prompt_tokens"] == 500
    server.check_a()


def test_responses_are_created_kept_continued_and_forgotten(server):
    body = {"input": "hello", "max_output_tokens": 8, "temperature": 0, "instructions": "be kind"}
    made = server.post("/v1/responses", body).json()
    assert made["status"] == "incomplete"
    assert made["usage"]["output_tokens"] == 8
    text = made["output"][0]["content"][0]["text"]
    assert server.http.get(f"/v1/responses/{made['id']}").json() == made
    after = server.post("/v1/responses", {**body, "input": "and?", "previous_response_id": made["id"]}).json()
    assert after["usage"]["input_tokens"] > made["usage"]["input_tokens"] + len(text)
    assert server.http.delete(f"/v1/responses/{made['id']}").json()["deleted"]
    assert server.http.get(f"/v1/responses/{made['id']}").status_code == 404


def test_a_response_stream_numbers_its_events_and_ends_with_the_whole(server):
    body = {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}], "max_output_tokens": 8}
    events = server.events("/v1/responses", body)
    kinds = [event["type"] for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-1] == "response.incomplete"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == text


def test_a_running_response_can_be_cancelled(server):
    found = {}
    body = {"input": "hello", "max_output_tokens": 400, "stream": True}

    def run():
        with server.http.stream("POST", "/v1/responses", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    event = json.loads(line[6:])
                    found.setdefault("id", event.get("response", {}).get("id"))
                    found["last"] = event

    thread = threading.Thread(target=run)
    thread.start()
    server.until(lambda: "id" in found)
    assert server.http.post(f"/v1/responses/{found['id']}/cancel").json()["status"] == "cancelled"
    thread.join(10)
    assert found["last"]["response"]["status"] == "cancelled"
    server.settle()


def test_messages_have_anthropics_shape_whole_and_streamed(server):
    body = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0.0, "system": "be kind"}
    whole = server.post("/v1/messages", body).json()
    assert (whole["type"], whole["role"], whole["stop_reason"]) == ("message", "assistant", "max_tokens")
    with server.http.stream("POST", "/v1/messages", json={**body, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    names = [line[7:] for line in lines if line.startswith("event: ")]
    data = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert names == [one["type"] for one in data]
    assert (names[0], names[1], names[-1]) == ("message_start", "content_block_start", "message_stop")
    text = "".join(one["delta"]["text"] for one in data if one["type"] == "content_block_delta")
    assert text == whole["content"][0]["text"]
    wrong = server.post("/v1/messages", {**body, "temperature": 5.0})
    assert (wrong.status_code, wrong.json()["type"]) == (400, "error")
    assert server.post("/v1/messages", {"messages": MESSAGES}).json()["error"]["param"] == "max_tokens"


def test_generate_has_sglangs_shape(server):
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 8, "temperature": 0}, "return_logprob": True}
    answer = server.post("/generate", body).json()
    assert answer["text"] == server.complete("hello").json()["choices"][0]["text"]
    assert answer["meta_info"]["finish_reason"]["type"] == "length"
    assert len(answer["meta_info"]["output_token_logprobs"]) == 8
    events = server.events("/generate", {**body, "input_ids": list(b"hello"), "text": None})
    assert events[-2]["text"] == answer["text"]
    assert server.post("/generate", {"text": "x", "sampling_params": {"warp": 9}}).status_code == 400


def test_a_request_can_be_aborted_by_its_name(server):
    found = {}

    def run():
        found["answer"] = server.complete(max_tokens=450, request_id="long-one").json()

    thread = threading.Thread(target=run)
    thread.start()
    server.until(lambda: server.front.client.streams)
    assert server.post("/abort", {"request_id": "long-one"}).json() == {"aborted": ["long-one-0"]}
    thread.join(10)
    assert found["answer"]["choices"][0]["finish_reason"] == "abort"
    assert server.post("/abort", {"request_id": "long-one"}).json() == {"aborted": []}


def test_what_an_engine_without_a_device_cannot_do_is_a_400_that_says_so(server):
    for path in ("/sleep", "/wake_up", "/start_profile", "/stop_profile", "/rebalance_experts"):
        answer = server.http.post(path, headers=HEAD)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_supported"), path
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


# ---- documents, metrics ----


def test_openapi_lists_every_route_and_docs_shows_it_without_script(server):
    document = server.http.get("/openapi.json").json()
    listed = {(method.upper(), path) for path, line in document["paths"].items() for method in line}
    assert listed == {(entry.method, entry.path.replace(":path", "")) for entry in TABLE}
    names = set(document["components"]["schemas"])
    used = [part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]]
    assert set(used) <= names
    page = server.http.get("/docs").text
    assert "/v1/chat/completions" in page
    assert "<script" not in page


def test_metrics_count_requests_tokens_and_pages(server):
    server.complete()
    text = server.http.get("/metrics", headers=HEAD).text
    for name in ("jaxllm_requests_total", "jaxllm_time_to_first_token_seconds_bucket", "jaxllm_engine_free_pages"):
        assert name in text
    assert "vllm:" not in text


def test_metrics_have_vllms_names_when_asked():
    from serve.metrics import FrontMetrics

    with Server() as server:
        front, compatible = server.front, FrontMetrics("byte")
        compatible.bind(front.client, front.admission)
        text = compatible.text().decode()
        assert 'vllm:num_requests_running{model_name="byte"}' in text
        assert "vllm:time_to_first_token_seconds_bucket" in text


# ---- who may come in ----


@pytest.fixture(scope="module")
def guarded():
    with Server(settings(keys=(hash_key("secret"), hash_key("other")), requests_per_minute=0)) as running:
        yield running


def every_route():
    for entry in TABLE:
        yield entry.method, entry.path.replace("{model:path}", "byte").replace("{response_id}", "x")
    yield from [("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/nowhere"), ("OPTIONS", "/v1/models")]
    yield from [("DELETE", "/v1/models"), ("PUT", "/v1/completions"), ("GET", "/ui/nothing"), ("GET", "/health/x")]


def test_28_every_route_but_the_allow_listed_ones_needs_a_key(guarded):
    bodies = set()
    for method, path in every_route():
        for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}):
            answer = guarded.http.request(method, path, headers=headers)
            if path in PUBLIC:
                assert answer.status_code == 200
                continue
            assert answer.status_code == 401, (method, path)
            bodies.add(answer.content)
    assert len(bodies) == 1
    assert {"/health", "/ready"} == PUBLIC


def test_28_admin_routes_need_an_admin_key_and_are_off_without_one(guarded):
    for path in ADMIN:
        assert guarded.http.post(path, headers={"authorization": "Bearer secret"}).status_code == 401
    with Server(settings(admin_keys=())) as server:
        for path in ADMIN:
            assert server.http.post(path, headers=HEAD).status_code == 403


@pytest.mark.parametrize("key", ["secret", "other"])
def test_28_each_key_opens_the_routes_in_both_headers(guarded, key):
    for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
        assert guarded.http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("key", [b"x" * 10_000, b"s\xe9cret", b".", b"secret-"])
def test_28_a_key_of_any_kind_is_a_401_alike(guarded, key):
    wrong = guarded.http.get("/v1/models", headers={"authorization": b"Bearer wrong"})
    answer = guarded.http.get("/v1/models", headers={"authorization": b"Bearer " + key})
    assert (answer.status_code, answer.content) == (401, wrong.content)


def test_28_no_key_is_in_what_the_server_says(guarded):
    info = guarded.http.get("/server_info", headers=HEAD).text
    assert "secret" not in info
    assert hash_key("secret").hex() not in info


def test_29_cors_is_off_unless_an_origin_is_allowed(guarded):
    evil = {"origin": "https://evil.example", "authorization": "Bearer secret"}
    assert not [name for name in guarded.http.get("/v1/models", headers=evil).headers if name.startswith("access-")]
    with Server(settings(allowed_origins=("https://good.example",))) as server:
        good = server.http.options("/v1/models", headers={"origin": "https://good.example"})
        assert (good.status_code, good.headers["access-control-allow-origin"]) == (204, "https://good.example")
        bad = server.http.options("/v1/models", headers={"origin": "https://evil.example"})
        assert bad.status_code == 405
        assert "access-control-allow-origin" not in bad.headers


def test_a_key_has_its_rate_and_others_theirs():
    keys = (hash_key("a"), hash_key("b"))
    with Server(settings(keys=keys, requests_per_minute=3)) as server:

        def get(key):
            return server.http.get("/v1/models", headers={"authorization": f"Bearer {key}"})

        assert [get("a").status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = get("a")
        assert refused.json()["error"]["code"] == "rate_limited"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert get("b").status_code == 200


def test_a_tenant_cannot_see_or_end_anothers_requests():
    keys = (hash_key("a"), hash_key("b"))
    with Server(settings(keys=keys), step_s=0.005) as server:
        a, b = ({"authorization": f"Bearer {key}"} for key in "ab")
        body = {"input": "hi", "max_output_tokens": 2}
        made = server.post("/v1/responses", body, headers=a).json()
        assert server.http.get(f"/v1/responses/{made['id']}", headers=b).status_code == 404
        done = []
        fields = {"prompt": "x", "max_tokens": 100, "request_id": "mine"}
        thread = threading.Thread(target=lambda: done.append(server.post("/v1/completions", fields, headers=a).json()))
        thread.start()
        server.until(lambda: server.front.client.streams)
        assert server.post("/abort", {"request_id": "mine"}, headers=b).json() == {"aborted": []}
        thread.join(10)
        assert done[0]["choices"][0]["finish_reason"] == "length"


# ---- liveness of streams ----


def test_a_silent_stream_gets_signs_of_life():
    with Server(settings(ping_s=0.1), step_s=0.5) as server:
        body = {"prompt": "x", "max_tokens": 2, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert ": ping" in lines
        assert lines[-1] == "data: [DONE]"


def test_the_server_answers_while_its_engine_still_starts():
    with Server(step_s=0.0, start_s=0.7, wait=False) as server:
        assert server.status("/health") == 200
        assert server.status("/ready") == 503
        answer = server.complete()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        server.wait_ready()


def test_a_long_prompt_does_not_hold_up_other_streams(server):
    gaps, stop = [], threading.Event()

    def watch():
        with httpx.Client(base_url=server.url, trust_env=False) as client:
            while not stop.is_set():
                began = time.monotonic()
                client.get("/version")
                gaps.append(time.monotonic() - began)

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.monotonic()
    for _ in range(3):
        assert server.complete("lorem ipsum " * 200_000).status_code == 400
    each = (time.monotonic() - began) / 3
    stop.set()
    thread.join(10)
    held = sum(gap for gap in gaps if gap > each / 3)
    assert held < sum(gaps) / 2, gaps  # held up, an answer would take as long as a prompt nearly all the time


def test_a_stream_over_http_1_0_has_no_chunks_and_says_the_same(server):
    body = json.dumps({"prompt": "hello", "max_tokens": 8, "temperature": 0, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.0\r\nhost: x\r\ncontent-type: application/json\r\n"
    said = server.exchange(head + b"content-length: %d\r\n\r\n" % len(body) + body)
    head, _, content = said.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    data = [line[6:] for line in content.decode().split("\n\n") if line]
    assert data[-1] == "[DONE]"
    assert "".join(json.loads(one)["choices"][0]["text"] for one in data[:-1]) == server.streamed_text()


def test_a_chunk_in_mid_stream_has_the_keys_of_the_first_and_the_last():
    with Server(step_s=0.02) as server:  # tokens that come together are one chunk: the device must be the slow one
        chunks_of_every_kind(server)


def chunks_of_every_kind(server):
    for path, body in (("/v1/completions", {"prompt": "hello"}), ("/v1/chat/completions", {"messages": MESSAGES})):
        for options in ({}, {"stream_options": {"include_usage": True}}):
            chunks = server.events(path, {**body, "max_tokens": 12, **options})[:-1]
            chunks = [chunk for chunk in chunks if chunk["choices"]]
            assert {frozenset(chunk) for chunk in chunks} == {frozenset(chunks[0])}
            kinds = [frozenset(chunk["choices"][0]) - {"stop_reason"} for chunk in chunks]
            assert set(kinds) == {kinds[0]}
            assert len(chunks) > 2
            assert chunks[len(chunks) // 2]["choices"][0]["finish_reason"] is None
