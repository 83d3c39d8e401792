"""What an operator does to a running server, over real HTTP with a bundled model: sleep, other weights, traces.

Nothing of it may be compiled, lose a page, or disturb who is not concerned.
"""

import shutil
import threading
from pathlib import Path

import pytest
from helpers.checkpoints import copy_of_bundled, drop, negate
from helpers.server import DRAFT, HEAD, Server, settings

from jaxllm.config import bundled_model_dir

PROMPT = "def add(a, b):"
ONE_OF_EACH = {"max_num_seqs": 2, "decode_buckets": [2], "token_buckets": [64]}  # nothing here is done by bucket


@pytest.fixture(scope="module")
def server():
    with Server(settings(model_names=(DRAFT,)), bundled=ONE_OF_EACH) as running:
        yield running


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The served model with one layer's output turned around."""
    folder = copy_of_bundled(tmp_path_factory.mktemp("other") / "model", name=DRAFT)
    negate(folder, "model.layers.2.mlp.down_proj.weight")
    return folder


@pytest.fixture(autouse=True)
def check_a(server):
    yield
    server.check_a()
    assert server.info()["engine"]["stats"].get("compiles_after_ready", 0) == 0


def admin(server, path, body=None):
    answer = server.http.post(path, json=body or {}, headers=HEAD, timeout=60)
    return answer.status_code, answer.json()


def said(server, **fields):
    answer = server.complete(PROMPT, max_tokens=24, **fields).json()
    return answer["choices"][0]["text"], answer["weights_version"]


@pytest.mark.parametrize("level", [1, 2])
def test_a_server_that_slept_says_what_it_said_before(server, level):
    before = said(server)
    assert admin(server, "/sleep", {"level": level}) == (200, {"asleep": True, "level": level})
    server.until(lambda: server.status("/ready") == 503)
    assert server.status("/health") == 200
    refused = server.complete(PROMPT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "asleep")
    assert "retry-after" in refused.headers
    assert server.post("/v1/embeddings", {"input": "a"}).status_code == 503
    assert admin(server, "/sleep")[0] == 409
    assert admin(server, "/wake_up")[0] == 200
    assert admin(server, "/wake_up")[0] == 409
    server.wait_ready()
    assert said(server) == before
    assert server.complete(PROMPT).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_sleep_waits_for_who_is_in_flight_and_holds_or_ends_them_as_asked(server):
    alone = server.streamed_text(PROMPT, max_tokens=200, ignore_eos=True)
    found = {}

    def run(name):
        body = {"prompt": PROMPT, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        events = server.events("/v1/completions", body)
        found[name] = "".join(choice["text"] for event in events[:-1] for choice in event["choices"]), events[-2]

    for mode in ("wait", "abort"):
        thread = threading.Thread(target=run, args=(mode,))
        thread.start()
        server.until(lambda: server.info()["engine"]["stats"]["running"] == 1)
        assert admin(server, "/sleep", {"mode": mode})[0] == 200
        thread.join(20)
        admin(server, "/wake_up")
        server.wait_ready()
    assert found["wait"][0] == alone
    assert alone.startswith(found["abort"][0])
    assert len(found["abort"][0]) < len(alone)
    assert found["abort"][1]["choices"][0]["finish_reason"] == "abort"


def test_new_weights_answer_and_say_so_and_the_old_ones_come_back(server, other):
    first, version = said(server)
    assert admin(server, "/update_weights", {"path": str(other), "version": "step-7"}) == (
        200,
        {"weights_version": "step-7"},
    )
    second = said(server)
    assert second[0] != first
    assert second[1] == "step-7"
    chat = server.chat(stream=False).json()
    assert (chat["system_fingerprint"], chat["weights_version"]) == ("weights-step-7", "step-7")
    chunks = server.events("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4})
    assert {chunk["weights_version"] for chunk in chunks[:-1]} == {"step-7"}
    assert server.post("/generate", {"text": "a"}).json()["meta_info"]["weight_version"] == "step-7"
    assert admin(server, "/sleep", {"level": 2})[0] == 200  # reads again what it had last
    assert admin(server, "/wake_up")[0] == 200
    server.wait_ready()
    assert said(server) == second
    home = str(bundled_model_dir(DRAFT))
    assert admin(server, "/update_weights", {"path": home, "version": version}) == (200, {"weights_version": version})
    assert said(server) == (first, version)


def test_pages_of_old_weights_are_never_found(server, other):
    prompt = "a prompt that fills more than one page, so that it would be found again " * 2
    fresh = server.complete(prompt, max_tokens=20).json()["choices"][0]["text"]
    home = str(bundled_model_dir(DRAFT))
    admin(server, "/update_weights", {"path": str(other)})
    assert server.complete(prompt).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    admin(server, "/update_weights", {"path": home})
    assert server.complete(prompt, max_tokens=20).json()["choices"][0]["text"] == fresh


def test_a_request_sees_one_set_of_weights_only(server, other):
    """Those in flight end under the old weights; those that come meanwhile wait for the new ones."""
    found = {}

    def run(name, count):
        body = {"prompt": PROMPT, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        found[name] = {event["weights_version"] for event in server.events("/v1/completions", body)[:-1]}

    _, old = said(server)
    threads = [threading.Thread(target=run, args=("before", 200))]
    threads[0].start()
    server.until(lambda: server.info()["engine"]["stats"]["running"] == 1)
    update = threading.Thread(target=admin, args=(server, "/update_weights", {"path": str(other), "version": "new"}))
    update.start()
    server.until(lambda: server.info()["engine"]["stats"]["running"] == 1)
    threads.append(threading.Thread(target=run, args=("after", 5)))
    threads[1].start()
    for thread in (*threads, update):
        thread.join(20)
    assert found["before"] == {old}
    assert found["after"] in ({"new"}, {old})
    admin(server, "/update_weights", {"path": str(bundled_model_dir(DRAFT)), "version": old})


def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(server, other, tmp_path):
    before = said(server)
    status, body = admin(server, "/update_weights", {"path": str(tmp_path)})
    assert (status, body["error"]["code"]) == (400, "invalid_request")
    folder = copy_of_bundled(tmp_path / "cut", name=DRAFT)
    drop(folder, "model.norm.weight")
    status, body = admin(server, "/update_weights", {"path": str(folder)})
    assert status == 400
    assert "model.norm.weight is missing" in body["error"]["message"]
    for wrong in ({}, {"path": 5}, {"path": "a\0b"}, {"path": str(other), "mode": "later"}):
        assert admin(server, "/update_weights", wrong)[0] == 400
    assert said(server) == before


def test_a_paused_engine_with_requests_in_flight_refuses_what_would_wait_for_ever(server):
    admin(server, "/pause")
    thread = threading.Thread(target=server.complete)
    thread.start()
    server.until(lambda: server.info()["engine"]["stats"]["waiting"] == 1)
    status, body = admin(server, "/sleep")
    assert (status, body["error"]["code"]) == (409, "invalid_state")
    admin(server, "/resume")
    thread.join(20)
    server.wait_ready()


def test_a_trace_is_taken_and_written(server):
    status, begun = admin(server, "/start_profile")
    assert status == 200
    assert admin(server, "/start_profile")[0] == 409
    server.complete(PROMPT)
    assert admin(server, "/stop_profile") == (200, begun)
    assert admin(server, "/stop_profile")[0] == 409
    folder = Path(begun["directory"])
    assert any(path.stat().st_size > 0 for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder)
