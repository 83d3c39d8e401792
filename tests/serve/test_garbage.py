"""What a request leaves behind is nothing: no cycle that only a collection would find, so that memory stays flat."""

import gc
import json
import time

import pytest
from helpers.server import Server

HEAD = (
    b"POST %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
)
MESSAGES = [{"role": "user", "content": "x"}]
ASKED = {
    "whole": ("/v1/completions", {"prompt": "x"}),
    "streamed": ("/v1/completions", {"prompt": "x", "stream": True}),
    "chat": ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 5, "stream": True}),
    "two prompts": ("/v1/completions", {"prompt": ["x", "y"], "n": 2, "max_tokens": 5, "stream": True}),
    "grammar": ("/v1/completions", {"prompt": "x", "guided_regex": "[a-f]{3}"}),
    "refused": ("/v1/completions", {"prompt": "x", "temperature": 9}),
    "embeddings": ("/v1/embeddings", {"input": "x"}),
    "response": ("/v1/responses", {"input": "x", "max_output_tokens": 3}),
    "cancelled": ("/v1/completions", {"prompt": "x", "max_tokens": 400, "stream": True}),
}


@pytest.fixture(scope="module")
def server():
    with Server(step_s=0.0005) as running:
        gc.collect()
        gc.freeze()  # a collection here looks at what requests leave, not at all that tests before this made
        yield running
        gc.unfreeze()


def ask(server, name):
    path, body = ASKED[name]
    content = json.dumps(body).encode()
    with server.raw() as connection:
        connection.sendall(HEAD % (path.encode(), len(content)) + content)
        while connection.recv(65536) and name != "cancelled":
            pass


@pytest.mark.parametrize("name", ASKED)
def test_a_request_leaves_no_cycle_behind(server, name):
    ask(server, name)
    server.settle()
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            ask(server, name)
        deadline = time.monotonic() + 10
        while server.front.admission.slots and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        left = gc.collect()
    finally:
        gc.enable()
    assert left < 10  # less than one object a request
