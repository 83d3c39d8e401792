"""`jaxllm launch` with a prefill worker in a process of its own, over HTTP: one server's text, also when it dies."""

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers.ports import free_port
from helpers.served import ROOT, SMALL, Served

pytestmark = pytest.mark.faults
PROMPTS = [f"def function_number_{i}(a, b):\n    " + "x = a + b\n    " * (3 * i) for i in range(8)]


def recipe(folder, **tables):
    path = folder / "recipe.toml"
    tables = {"scheduler": {"max_num_seqs": 8, "token_budget": 128}, "cache": {"num_pages": 512}, **tables}
    lines = [
        line
        for name, table in tables.items()
        for line in (f"[{name}]", *(f"{knob} = {json.dumps(value)}" for knob, value in table.items()))
    ]
    path.write_text("\n".join(lines))
    return path


@contextlib.contextmanager
def launched(path, port):
    command = [os.sys.executable, "-m", "serve.cli", "launch", "-c", str(path), "--port", str(port)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 240
        while not ready(url):
            assert process.poll() is None, "it ended"
            assert time.monotonic() < deadline, "not ready in time"
            time.sleep(0.2)
        yield process, url
    finally:
        process.terminate()
        assert process.wait(40) == 0


def ready(url):
    try:
        with urllib.request.urlopen(url + "/ready", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def complete(url, prompt, tokens=24):
    """The pieces of a streamed completion."""
    body = {"model": "first-light", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body["ignore_eos"] = True
    asked = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=120) as answer:
        events = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", events[-1]
    return "".join(choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"])


def workers_of(pid):
    """The launcher's prefill workers."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split() + threads_children(pid):
        line = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ")
        if b"--disaggregation-mode prefill" in line:
            found.append(int(child))
    return found


def threads_children(pid):
    """A child belongs to the thread that started it."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [child for task in tasks for child in (task / "children").read_text().split()]


@pytest.fixture(scope="module")
def wanted():
    with Served(*SMALL) as server:
        return [complete(server.url, prompt) for prompt in PROMPTS]


def test_two_roles_in_one_server_say_what_one_engine_says(wanted):
    with Served(*SMALL, "--disaggregation-mode", "both") as server:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda prompt: complete(server.url, prompt), PROMPTS)) == wanted
        stats = server.info()["engine"]["stats"]
        assert stats["transferred_pages"] > len(PROMPTS)
        assert stats["prefill_held_pages"] == stats["held_pages"] == 0


def test_a_worker_that_is_killed_under_load_costs_no_request(tmp_path, wanted):
    address = f"127.0.0.1:{free_port()}"
    path = recipe(tmp_path, disaggregation={"role": "decode", "workers": [address]})
    with launched(path, free_port()) as (process, url):
        assert [complete(url, prompt) for prompt in PROMPTS] == wanted
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = [pool.submit(complete, url, prompt) for prompt in PROMPTS * 4]
            time.sleep(0.3)
            (worker,) = set(workers_of(process.pid))
            os.kill(worker, signal.SIGKILL)
            assert [answer.result() for answer in answers] == wanted * 4
        assert worker not in workers_of(process.pid)
