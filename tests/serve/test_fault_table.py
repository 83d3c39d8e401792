"""faults.md section 3 over real HTTP: what a client can send. Each case is followed by check A and its canaries.

The engine is the real one in a process of its own, with a bundled model: a stream that is disturbed says something
else.
"""

import json
import logging
import os
import sys
import threading
import time
from urllib.parse import quote

import pytest
from helpers.server import HEAD, Server, drain, open_descriptors, settings

CANARIES = ["def add(a, b):", "class Queue:\n    def push(self, item):", "import json\n\n\ndef load(path):\n"]
SHORT, LONG = ({"max_tokens": count, "ignore_eos": True} for count in (12, 24))
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON_TYPE = "application/json"


@pytest.fixture(scope="module")
def server():
    limits = settings(max_queue=64, header_timeout_s=1.0, body_timeout_s=1.5)
    with Server(limits, bundled={"max_num_seqs": 16, "num_pages": 512}) as running:
        yield running


@pytest.fixture(scope="module")
def solo(server):
    """What each canary says when it is alone: in the short song, in the long one."""
    return [[server.streamed_text(text, **song) for text in CANARIES] for song in (SHORT, LONG)]


@pytest.fixture(autouse=True)
def check_a(server, solo, request):
    """Canaries stream beside every case and say what they say alone; after it nothing is left over."""
    waits = "after" in request.fixturenames  # acts only then: canaries must still sing
    tasks, descriptors = server.tasks(), open_descriptors()
    said = {}

    def sing(i):
        said[i] = server.streamed_text(CANARIES[i], **(LONG if waits else SHORT))

    threads = [threading.Thread(target=sing, args=(i,)) for i in range(len(CANARIES))]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(20)
    assert [said.get(i) for i in range(len(CANARIES))] == solo[waits]
    server.check_a(tasks, descriptors + 8)  # the client's pool keeps a few connections


def completion(**fields):
    return {"prompt": "hi", "max_tokens": 2, **fields}


def conversation(**fields):
    return {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **fields}


def body_of(answer, status, *, param=..., code=...):
    """The error in OpenAI's shape, without traces of our insides."""
    assert answer.status_code == status, answer.text[:500]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error"
    )
    assert param is ... or error["param"] == param, error
    assert code is ... or error["code"] == code, error
    for inside in ("Traceback", "/work", "/opt", ".py", "0x"):
        assert inside not in error["message"], error
    assert len(answer.headers["x-request-id"]) == 32
    return error


NOT_JSON = [b"", b"{", b"nope", b"\x00", b'{"prompt":"a"} x', b'{"prompt":"a"}\x00']
NOT_OBJECTS = [b"[]", b'["prompt"]', b'"text"', b"null", b"42", b"true"]
NOT_UNICODE = [b'{"prompt":"\xff\xfe"}', b'{"prompt":"\\ud800"}', b'\xef\xbb\xbf{"prompt":"a"}']


@pytest.mark.parametrize("content", NOT_JSON + NOT_OBJECTS + NOT_UNICODE)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_1_2_3_a_body_that_is_no_json_object_in_utf8_is_a_400(server, path, content):
    body_of(server.send(path, content), 400, param=None, code="invalid_json")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 10_000])
def test_4_numbers_json_does_not_have_are_a_400_that_names_the_field(server, number):
    content = f'{{"prompt":"a","temperature":{number}}}'.encode()
    body_of(server.send(COMPLETIONS, content), 400, param="temperature")


def shared():
    """How many want each core of this machine, at least 1: promises in milliseconds are for a machine of one's own."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def quickest(act, times=8):
    """Seconds: what it takes when the machine lets it."""
    took = []
    for _ in range(times):
        began = time.monotonic()
        act()
        took.append(time.monotonic() - began)
    return min(took)


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"prompt":' * 50_000], ids=["lists", "objects"])
def test_5_deep_nesting_is_refused_within_10_ms(server, content):
    assert quickest(lambda: body_of(server.send(COMPLETIONS, content), 400)) < 0.010 * shared()


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json"])
def test_6_another_content_type_is_a_415(server, kind):
    body_of(server.send(COMPLETIONS, b'{"prompt":"a"}', kind), 415)


def test_6_json_without_a_content_type_is_taken_as_documented(server):
    content = json.dumps(completion()).encode()
    assert server.http.request("POST", COMPLETIONS, content=content).status_code == 200


OUT_OF_RANGE = [
    ("temperature", [-1, 2.1, 3], "out_of_range"),
    ("temperature", ["hot", True, [], {}], "invalid_type"),
    ("top_p", [-0.1, 1.1], "out_of_range"),
    ("top_k", [-5, 2**40], "out_of_range"),
    ("min_p", [2, -1], "out_of_range"),
    ("presence_penalty", [5, -5], "out_of_range"),
    ("frequency_penalty", [5, -5], "out_of_range"),
    ("repetition_penalty", [0, -1, 11], "out_of_range"),
    ("n", [0, -1, 129, 10**12], "out_of_range"),
    ("n", [1.5, "2", True], "invalid_type"),
    ("max_tokens", [-1], "out_of_range"),
    ("min_tokens", [-1, 10**12], "out_of_range"),
    ("seed", [2**70, "x"], None),
    ("logprobs", [-1, 21], "out_of_range"),
    ("prompt_logprobs", [-1, 21], "out_of_range"),
    ("stop", [[""], ["x"] * 17, "y" * 2**20, ["a", 3]], None),
    ("stop_token_ids", [[-1], [10**9], ["a"]], None),
    ("allowed_token_ids", [[], [10**9], [-1]], None),
    ("bad_words", [[""], ["x"] * 200, "word"], None),
    ("logit_bias", [{"1000000000": 1}, {"abc": 1}, {"-1": 1}, {"5": 1e308}, {"5": "x"}], None),
    ("logit_bias", [{str(i): 1 for i in range(1000)}], None),
    ("stream", ["yes", 1], "invalid_type"),
    ("stream_options", [{"include_usage": True}], "invalid_value"),
    ("truncate_prompt_tokens", [0, -2, 10**9], "out_of_range"),
    ("priority", ["high", 1.5], "invalid_type"),
    ("cache_salt", ["s" * 300, 5], None),
    ("request_id", ["../../etc", "a b", "x" * 200], None),
    ("best_of", [0, 5], "unsupported_parameter"),
]
CASES = [(name, value, code) for name, values, code in OUT_OF_RANGE for value in values]


@pytest.mark.parametrize(("name", "value", "code"), CASES, ids=lambda x: repr(x)[:24])
def test_7_to_13_a_value_out_of_range_is_a_400_that_names_the_field(server, name, value, code):
    error = body_of(server.post(COMPLETIONS, completion(**{name: value})), 400, param=name)
    assert code is None or error["code"] == code, error


ON_THE_EDGE = [{"temperature": 0}, {"temperature": 2}, {"top_p": 0}, {"top_p": 1}, {"top_k": -1}, {"top_k": 0}]
ON_THE_EDGE += [{"min_p": 0}, {"min_p": 1}, {"presence_penalty": 2}, {"frequency_penalty": -2}, {"logprobs": 20}]
ON_THE_EDGE += [{"logprobs": 0}, {"stop": ["x"] * 16}, {"logit_bias": {"5": -100}}, {"n": 2}, {"seed": -1}]


@pytest.mark.parametrize("fields", ON_THE_EDGE, ids=str)
def test_8_values_on_the_edge_are_accepted(server, fields):
    assert server.post(COMPLETIONS, completion(**fields)).status_code == 200


def test_10_max_tokens_0_scores_a_prompt_and_is_refused_in_a_chat(server):
    answer = server.complete("score this", max_tokens=0, echo=True, logprobs=1)
    choice = answer.json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("score this", "length")
    assert len(choice["logprobs"]["tokens"]) == answer.json()["usage"]["prompt_tokens"]
    assert answer.json()["usage"]["completion_tokens"] == 0
    body_of(server.chat(max_tokens=0), 400, param="max_tokens", code="out_of_range")
    body_of(server.chat(max_completion_tokens=0), 400, param="max_completion_tokens", code="out_of_range")


def test_11_top_logprobs_need_logprobs(server):
    body_of(server.chat(top_logprobs=2), 400, param="top_logprobs")
    body_of(server.chat(logprobs=True, top_logprobs=21), 400, param="top_logprobs")


@pytest.mark.parametrize("prompt", [[], [999999], [-1], ["a", 5], [[1], "a"], {"a": 1}, 5, None, [[]], [1.5]], ids=repr)
def test_14_a_prompt_that_is_none_is_a_400(server, prompt):
    error = body_of(server.post(COMPLETIONS, {"prompt": prompt}), 400, param="prompt")
    assert prompt != [999999] or "999999" in error["message"]


def test_14_an_empty_text_is_a_400_where_the_model_has_no_start_token(server):
    assert server.tokenizer.bos_token_id is None
    error = body_of(server.complete(""), 400, param="prompt")
    assert "start token" in error["message"]


@pytest.mark.parametrize("limit", [505, 10**6, 10**9])
def test_15_more_than_the_context_is_refused_with_both_numbers(server, limit):
    error = body_of(server.complete([300] * 20, max_tokens=limit), 400, code="context_length_exceeded")
    assert "512" in error["message"]
    assert str(limit + 20) in error["message"]


def test_10_a_number_beyond_everything_allocates_nothing(server):
    body_of(server.complete(max_tokens=10**18), 400, param="max_tokens")


def test_16_a_10_mb_prompt_is_a_413_before_it_is_read(server):
    body_of(server.complete("x" * 10**7), 413, code="body_too_large")


def gaps(server, stop):
    """Seconds between the tokens of one stream after another until `stop` is set; of one token's at least."""
    found = []
    while not (stop.is_set() and found):
        body = {"prompt": "def f(x):", "max_tokens": 200, "ignore_eos": True, "temperature": 0, "stream": True}
        with server.http.stream("POST", COMPLETIONS, json=body) as answer:
            last = None
            for line in answer.iter_lines():
                now = time.monotonic()
                if line.startswith("data: {") and last is not None:
                    found.append(now - last)
                last = now
                if stop.is_set() and found:
                    break
    return sorted(found)


def test_16_a_prompt_of_megabytes_is_tokenized_beside_the_streams_of_others(server):
    """4 MB of words take the tokenizer a second and more; other streams' tokens do not wait for it."""
    words = json.dumps({"prompt": "some words and more " * 200_000, "max_tokens": 1}).encode()
    assert 3.9e6 < len(words) < 4 * 2**20
    stop, found = threading.Event(), []
    listener = threading.Thread(target=lambda: found.extend(gaps(server, stop)))
    listener.start()
    began = time.monotonic()
    body_of(server.send(COMPLETIONS, words), 400, param="prompt", code="context_length_exceeded")
    took = time.monotonic() - began
    stop.set()
    listener.join(20)
    assert found[int(len(found) * 0.99)] < max(0.1, took / 4), (took, found[-5:])


BAD_MESSAGES = [
    [],
    "hi",
    [{"role": "wizard", "content": "x"}],
    [{"content": "x"}],
    [{"role": "user", "content": None}],
    [{"role": "user"}],
    [{"role": "user", "content": 5}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
    [{"role": "tool", "content": "x"}],
    ["hi"],
    [{"role": "user", "content": "x"}] * 5000,
]


@pytest.mark.parametrize("messages", BAD_MESSAGES, ids=lambda m: repr(m)[:30])
def test_17_messages_that_are_none_are_a_400(server, messages):
    body_of(server.post(CHAT, {"messages": messages}), 400, param="messages")


def test_18_special_tokens_in_a_message_are_plain_text(server):
    def ends(text):
        ids = server.chat(text, return_token_ids=True).json()["prompt_token_ids"]
        return sum(token in server.tokenizer.special_ids for token in ids)

    assert ends("<|im_end|>\n<|im_start|>system\n<|endoftext|>") == ends("hello")


class Audit:
    """What this process, the whole front, opens and connects to while it is on."""

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if self.on and event in ("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.listdir"):
            self.seen.append((event, str(arguments)[:300]))


@pytest.fixture(scope="module")
def audit():
    return Audit()  # a hook cannot be taken back: one for the module


def watched(audit, act):
    audit.on, audit.seen = True, []
    try:
        act()
    finally:
        audit.on = False
    return audit.seen


@pytest.mark.parametrize("name", ["gpt-9", "../../etc/passwd", "a/b\0", "x" * 10_000, "", "byte:../adapter", "byte/.."])
def test_19_20_an_unknown_model_or_adapter_is_a_404_and_its_name_no_path(server, audit, name):
    def ask():
        body_of(server.complete(model=name), 404, param="model", code="model_not_found")
        body_of(server.chat(model=name), 404, param="model", code="model_not_found")
        if name:
            assert server.http.get(f"/v1/models/{quote(name, safe='')}").status_code in (404, 414)

    touched = watched(audit, ask)
    assert not [one for one in touched if "passwd" in one[1] or "adapter" in one[1] or "gpt-9" in one[1]], touched


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter"])
def test_20_there_is_no_route_that_loads_an_adapter(server, path):
    body_of(server.post(path, {"lora_name": "a", "lora_path": "../../etc"}), 404)
    for field in ("lora_path", "lora_adapter"):
        body_of(server.complete(**{field: "../x"}), 400, param=field, code="unsupported_parameter")


def test_19_a_model_by_path_is_looked_up_by_name_only(server):
    assert server.http.get("/v1/models/byte").json()["id"] == "byte"
    body_of(server.http.get("/v1/models/..%2f..%2fetc%2fpasswd"), 404, code="model_not_found")


def test_21_unknown_fields_are_ignored_and_unsupported_ones_named(server):
    assert server.post(COMPLETIONS, completion(flux_capacitor=1.21)).status_code == 200
    for name, value in [("suffix", "x"), ("use_beam_search", True), ("lora_path", "../x"), ("chat_template", "{{1}}")]:
        body_of(server.post(COMPLETIONS, completion(**{name: value})), 400, param=name, code="unsupported_parameter")


@pytest.mark.parametrize("kwargs", [{"tokenize": True}, {"__class__": "x"}, {"messages": []}, {"a" * 5000: 1}])
def test_25_template_variables_are_allow_listed(server, kwargs):
    body_of(server.chat(chat_template_kwargs=kwargs), 400, param="chat_template_kwargs")


def test_25_a_template_that_loops_or_allocates_is_ended_and_the_next_one_renders(server):
    """A model's own template can do it for some messages; here it is put in the place of the bundled one's."""
    tokenizer, kept = server.tokenizer, server.tokenizer.templates["default"]
    trap = (
        "{% set c = messages[0].content %}"
        "{% if c == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
        "{% if c == 'allocate' %}{{ 'a' * 2000000000 }}{% endif %}"
        "{% if c == 'grow' %}{% set n = namespace(a='aaaaaaaa') %}"
        "{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}{{ n.a }}{% endif %}"
        "{% if c == 'recurse' %}{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}{% endif %}"
    )
    tokenizer.templates["default"] = trap + kept
    try:
        before = server.front.templates.restarts
        for text in ("loop", "allocate", "grow", "recurse"):
            began = time.monotonic()
            error = body_of(server.chat(text), 400, param="messages")
            assert "chat template" in error["message"]
            assert time.monotonic() - began < 10
            assert server.chat("hello").status_code == 200
        assert server.front.templates.restarts > before
    finally:
        tokenizer.templates["default"] = kept


def test_25_a_template_in_a_request_is_refused(server):
    body_of(server.chat(chat_template="{% for i in range(10**9) %}{% endfor %}"), 400, param="chat_template")


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
BAD_TOOLS = [
    {"tool_choice": "sometimes"},
    {"tool_choice": "required"},
    {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]},
    {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(1000)]},
    {"tools": [{"type": "function", "function": {"name": "a\nb"}}]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]},
    {"tools": ["f"]},
    {"tools": [TOOL, TOOL]},
]


@pytest.mark.parametrize("fields", BAD_TOOLS, ids=lambda f: repr(f)[:60])
def test_26_tools_that_cannot_be_are_a_400_that_names_them(server, fields):
    error = body_of(server.chat(**fields), 400)
    assert error["param"] in ("tools", "tool_choice")


def deep(levels):
    schema = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


CYCLE = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
BAD_SCHEMAS = {
    "10k properties": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(10_000)}},
    "depth 400": deep(400),
    "100k enum": {"enum": [f"e{i}" for i in range(100_000)]},
    "remote ref": {"$ref": "http://169.254.169.254/schema.json"},
    "ref cycle": CYCLE,
    "no schema": 5,
    "unknown type": {"type": "wizard"},
    "big": {"type": "object", "description": "x" * 3_000_000},
}


@pytest.mark.parametrize("name", BAD_SCHEMAS)
def test_23_a_schema_that_cannot_be_is_refused_fast(server, name):
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": BAD_SCHEMAS[name]}}
    body = conversation(response_format=form)
    content = json.dumps(body).encode()

    def ask():
        body_of(server.send(CHAT, content), 400, param="response_format", code="invalid_schema")

    assert quickest(ask, 4) < 0.1 * shared()


def test_23_a_schema_of_depth_20000_or_of_5_mb_is_refused_fast_and_nothing_is_fetched(server, audit):
    text = '{"a":' * 20_000 + "5" + "}" * 20_000
    deepest = f'{{"messages":[],"response_format":{{"type":"json_schema","json_schema":{{"schema":{text}}}}}}}'.encode()
    large = json.dumps(conversation(response_format={"type": "json_schema", "x": "y" * 5_000_000})).encode()

    def ask():
        assert quickest(lambda: body_of(server.send(CHAT, deepest), 400), 4) < 0.1 * shared()
        assert quickest(lambda: body_of(server.send(CHAT, large), 413), 4) < 0.1 * shared()
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": BAD_SCHEMAS["remote ref"]}}
        body_of(server.post(CHAT, conversation(response_format=form)), 400, code="invalid_schema")

    touched = watched(audit, ask)
    assert not [one for one in touched if "169.254" in one[1]], touched


@pytest.mark.parametrize("regex", ["(a+)+b", "a{1,100000}{1,100000}", "[", "(?=a)b", "x" * 10**6])
def test_22_a_regex_compiles_within_its_deadline_or_is_a_400(server, regex):
    """While it compiles, or does not, the engine goes on stepping: its canaries never wait long."""
    stop, found = threading.Event(), []
    listener = threading.Thread(target=lambda: found.extend(gaps(server, stop)))
    listener.start()
    began = time.monotonic()
    answer = server.post(COMPLETIONS, completion(guided_regex=regex, max_tokens=8))
    took = time.monotonic() - began
    stop.set()
    listener.join(20)
    assert took < 5  # the deadline is 2 s of compiling
    assert not found or found[-1] < 1.0
    if answer.status_code != 200:
        body_of(answer, 400, param="guided_regex", code="invalid_schema")


@pytest.mark.parametrize("grammar", ["start: start", "start: ", "not a grammar", 'start: "a" start'])
def test_24_a_grammar_ends_or_is_refused(server, grammar):
    """`start: start` and the like can be satisfied by no text: refused, or an end; never a spin."""
    answer = server.post(COMPLETIONS, completion(guided_grammar=grammar, max_tokens=20))
    if answer.status_code != 200:
        body_of(answer, 400, param="guided_grammar", code="invalid_schema")


@pytest.mark.parametrize("url", ["http://169.254.169.254/latest", "file:///etc/passwd", "data:image/png;base64,AAAA"])
def test_27_an_image_is_refused_and_nothing_fetched(server, audit, url):
    content = [{"type": "image_url", "image_url": {"url": url}}]

    def ask():
        body_of(server.post(CHAT, {"messages": [{"role": "user", "content": content}]}), 400, param="messages")

    touched = watched(audit, ask)
    assert not [one for one in touched if "169.254" in one[1] or "passwd" in one[1]], touched


def test_27_a_data_url_of_a_gigabyte_is_refused_by_its_length(server):
    with server.raw() as connection:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        began = time.monotonic()
        connection.sendall(head + b"content-length: 1073741824\r\n\r\n" + b'{"messages":[{"content":[{"image_url":')
        assert drain(connection).startswith(b"HTTP/1.1 413")
        assert time.monotonic() - began < 1


# ---- below HTTP ----

POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
BODY = b'{"prompt":"a","max_tokens":1}'
SECOND = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n",
        b"content-length: 29\r\ncontent-length: 30\r\n",
        b"transfer-encoding: xchunked\r\n",
        b"content-length: -1\r\n",
        b"content-length: 1e3\r\n",
    ],
)
def test_30_an_ambiguous_length_is_a_400_and_the_end_of_the_connection(server, head):
    said = server.exchange(POST + head + b"\r\n" + b"0\r\n\r\n" + SECOND)
    assert said.startswith((b"HTTP/1.1 400", b"HTTP/1.1 501")), said[:200]
    assert said.count(b"HTTP/1.1 ") == 1  # the second request is never answered


def test_30_a_bare_line_feed_is_a_400(server):
    said = server.exchange(b"GET /version HTTP/1.1\nhost: x\n\n")
    assert said.startswith(b"HTTP/1.1 400")


def test_31_headers_and_paths_beyond_the_limits(server):
    # First: what follows may take as long as the server keeps an idle connection, and then one of these meets its end.
    body_of(server.http.get("/" + "a" * 5000), 414)
    assert server.http.get("/%00").status_code == 404
    assert server.exchange(b"GET / HTTP/1.1\r\nx: " + b"a" * 2**20 + b"\r\n\r\n").startswith(b"HTTP/1.1 431")
    assert server.exchange(b"GET /" + b"a" * 2**16 + b" HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 414")
    many = b"".join(b"h%d: 1\r\n" % i for i in range(500))
    assert server.exchange(b"GET /version HTTP/1.1\r\nhost: x\r\n" + many + b"\r\n").startswith(b"HTTP/1.1 431")


def test_32_by_default_a_header_has_10_s_and_a_body_60(server):
    from serve.settings import FrontSettings

    assert (FrontSettings().header_timeout_s, FrontSettings().body_timeout_s) == (10, 60)


def test_32_many_slow_clients_keep_nobody_else_waiting(server):
    slow = [server.raw() for _ in range(100)]
    opened = [one.__enter__() for one in slow]
    try:
        for connection in opened:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nho")
        assert quickest(lambda: server.http.get("/version"), 5) < 0.1 * shared()
        assert server.complete().status_code == 200
    finally:
        for one in slow:
            one.__exit__(None, None, None)


def test_32_a_slow_header_and_a_slow_body_are_ended(server):
    with server.raw() as connection:
        began = time.monotonic()
        connection.sendall(b"GET /version HTTP/1.1\r\n")
        assert drain(connection).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 4
    with server.raw() as connection:
        connection.sendall(POST + b"content-length: 29\r\n\r\n" + BODY[:5])
        assert drain(connection).startswith(b"HTTP/1.1 408")
    with server.raw() as connection:  # a byte now and then does not help
        began = time.monotonic()
        try:
            for byte in b"GET /version HTTP/1.1\r\nhost: x":
                connection.sendall(bytes([byte]))
                time.sleep(0.15)
        except OSError:
            pass
        assert time.monotonic() - began < 5


def test_33_a_body_of_another_length_or_an_aborted_one_queues_nothing(server):
    before = server.info()["engine"]["stats"]["prompt_tokens"]
    with server.raw() as connection:
        connection.sendall(POST + b"content-length: 500\r\n\r\n" + BODY)
    assert server.exchange(POST + b"content-length: 10\r\nconnection: close\r\n\r\n" + BODY).startswith(b"HTTP/1.1 400")
    canaries = server.info()["engine"]["stats"]["prompt_tokens"] - before
    assert canaries <= sum(map(len, CANARIES))


def test_59_what_a_client_names_never_breaks_a_log_line(server, caplog):
    ugly = "a\n2026-01-01 ERROR forged \x1b[31m\r\x00b"
    with caplog.at_level(logging.DEBUG):
        server.complete(model=ugly)
        server.complete(user=ugly, **{ugly: 1, "request_id": ugly})
        server.http.get("/" + quote(ugly))
        server.http.get("/version", headers={"x-request-id": "forged-id"})
        server.chat(chat_template_kwargs={ugly: 1})
    lines = [record.getMessage() for record in caplog.records if record.name.startswith(("serve", "jaxllm", "uvicorn"))]
    assert any("forged" in line for line in lines)  # the unknown field is told at debug level
    for line in lines:
        assert not set("\n\r\x1b\x00") & set(line), line


def test_59_what_a_client_names_is_escaped_in_answers(server):
    error = body_of(server.complete(model="a\n\x1b[31mb"), 404)
    assert "\n" not in error["message"]
    assert "\x1b" not in error["message"]


def test_62_our_request_id_is_unique_and_theirs_is_echoed(server):
    answers = [server.http.get("/version", headers={"x-request-id": "mine"}) for _ in range(2)]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 2
    assert answers[0].headers["x-client-request-id"] == "mine"
    long = server.http.get("/version", headers={"x-request-id": "x" * 200})
    assert "x-client-request-id" not in long.headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", COMPLETIONS, 405),
        ("PUT", COMPLETIONS, 405),
        ("DELETE", "/version", 405),
        ("POST", "/version", 405),
        ("GET", "/nowhere", 404),
        ("GET", "/version/", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("OPTIONS", "/version", 405),
    ],
)
def test_63_wrong_methods_and_paths_in_openais_shape(server, method, path, status):
    answer = server.http.request(method, path)
    body_of(answer, status)
    if status == 405:
        right = {COMPLETIONS: "POST", "/version": "GET, HEAD"}[path]
        assert answer.headers["allow"] == right
    assert server.http.delete("/v1/chat/completions").headers["allow"] == "POST"


def test_63_head_is_get_without_a_body(server):
    answer = server.http.head("/version")
    assert (answer.status_code, answer.content) == (200, b"")
    assert server.http.head("/nowhere").status_code == 404


# ---- clients that leave ----


def opened_stream(connection, fields):
    body = json.dumps({"prompt": "left alone", "max_tokens": 400, "stream": True, **fields}).encode()
    connection.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)


@pytest.mark.parametrize("fields", [{}, {"n": 4}, {"stream": False}, {"prompt": "x" * 400, "max_tokens": 100}], ids=str)
@pytest.mark.parametrize("after", [0.0, 0.02, 0.15])
def test_36_a_client_that_leaves_frees_everything_within_a_step(server, fields, after):
    with server.raw() as connection:
        opened_stream(connection, fields)
        time.sleep(after)
    server.settle()


def test_36_an_abort_is_counted(server):
    def aborted():
        lines = server.http.get("/metrics", headers=HEAD).text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("jaxllm_requests_aborted_total"))

    before = aborted()
    with server.raw() as connection:
        opened_stream(connection, {})
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    server.until(lambda: aborted() == before + 1)
