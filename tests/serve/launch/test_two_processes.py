"""One engine in two real processes (gloo), over HTTP: what it says, what a kill -9 does, and how it ends.

Cut along the heads (tensor); a pipeline of two stages does the same, with the marker `mesh`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from helpers.ports import free_port

ROOT = Path(__file__).parents[3]
GOLDEN = json.loads((ROOT / "tests" / "goldens" / "bundled_greedy.json").read_text())["rows"]
RECIPE = """
[model]
max_model_len = 256
[cache]
num_pages = 64
[scheduler]
max_num_seqs = 2
token_budget = 64
[compile]
decode_buckets = [2]
token_buckets = [64]
[mesh]
{axis} = 2
[server]
port = 0
[launch]
timeout_s = 25
token_file = "{token}"
"""
# Groups are told apart, not their bits: compiling is the time.
pytestmark = pytest.mark.timeout(900)


class Launched:
    """`jaxllm launch` of one rank; its lines are kept."""

    def __init__(self, folder, *arguments, recipe="recipe.toml"):
        command = [sys.executable, "-m", "serve.cli", "launch", "-c", str(folder / recipe), *arguments]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        environ["JAXLLM_CACHE_DIR"] = str(folder / "cache")
        self.lines = []
        self.process = subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.strip())

    def until(self, condition, seconds=300):
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, "\n".join(["it did not happen in time", *self.lines])
            assert self.process.poll() is None, "\n".join(["it has ended", *self.lines])
            time.sleep(0.05)
        return found

    def url(self):
        line = self.until(lambda: next((line for line in self.lines if line.startswith("Serving")), None))
        return line.split()[3]

    def ends(self, seconds=120):
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(10)
        self.process.stdout.close()

    def said(self, text):
        return [line for line in self.lines if text in line]


def child_of(pid, module):
    """The pid of the one that runs this module."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == pid and module.encode() in command and fields[0] != "Z":
            return int(path.name)
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("group")
    (found / "token").write_text("a secret of this test")
    for axis, name in (("tensor", "recipe.toml"), ("pipe", "pipe.toml")):
        (found / name).write_text(RECIPE.format(token=found / "token", axis=axis))
    return found


@pytest.fixture(scope="module", params=["recipe.toml", pytest.param("pipe.toml", marks=pytest.mark.mesh)])
def group(request, folder):
    place = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2"]
    ranks = [Launched(folder, *place, "--process-id", str(rank), recipe=request.param) for rank in range(2)]
    yield ranks
    for rank in ranks:
        rank.kill()


@pytest.fixture(scope="module")
def http(group):
    with httpx.Client(base_url=group[0].url(), timeout=60, trust_env=False) as client:
        yield client


def greedy(http, row, count=20):
    body = {"prompt": row["prompt"], "max_tokens": count, "temperature": 0, "return_token_ids": True}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def test_two_processes_say_what_one_says(http):
    for row in GOLDEN[:3]:
        assert greedy(http, row) == row["token_ids"][:20]


def test_sampling_penalties_masks_and_logprobs_are_repeated_too(http):
    body = {"prompt": "The river", "max_tokens": 12, "seed": 3, "temperature": 0.8, "logprobs": 3, "ignore_eos": True}
    body |= {"frequency_penalty": 0.5, "logit_bias": {"300": -5}, "prompt_logprobs": 2}
    first, second = (http.post("/v1/completions", json=body).json()["choices"][0] for _ in range(2))
    assert first["text"] == second["text"]
    assert len(first["logprobs"]["token_logprobs"]) == 12
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    chat = {"messages": [{"role": "user", "content": "A number?"}], "max_tokens": 40, "temperature": 0}
    chat["response_format"] = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    answer = http.post("/v1/chat/completions", json=chat).json()["choices"][0]
    assert answer["finish_reason"] != "stop" or "n" in json.loads(answer["message"]["content"])


@pytest.mark.parametrize("which", ["follower", "leader"])
def test_a_killed_process_ends_its_streams_with_an_error_and_the_group_comes_back_as_one(group, http, which):
    rank, module = (1, "serve.launch.follower") if which == "follower" else (0, "serve.engine_process")
    victim = child_of(group[rank].process.pid, module)
    body = {"prompt": "Once", "max_tokens": 200, "temperature": 0, "stream": True, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(victim, signal.SIGKILL)
        events = [line for line in lines if line.startswith("data: ")]
    assert "engine_died" in events[-1], events[-1]
    assert http.get("/ready").status_code == 503
    group[0].until(lambda: http.get("/ready").status_code == 200)
    assert greedy(http, GOLDEN[0]) == GOLDEN[0]["token_ids"][:20]


@pytest.fixture(scope="module")
def abandoned(group, http):
    """The leader of a group whose other host stays away: it waits 25 s, in which the tests below are run."""
    group[1].process.kill()  # its launcher: nobody starts the follower again
    return group[0]


# ---- groups that never come together: one clear line and an exit code, within the stated time ----


@pytest.fixture
def launched(folder, abandoned):
    """Starts ranks that are gone after the test."""
    found = []

    def start(*arguments, **options):
        found.append(Launched(folder, *arguments, **options))
        return found[-1]

    yield start
    for each in found:
        each.kill()


def test_a_coordinator_that_is_gone(launched):
    place = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id", "1"]
    lone = launched(*place, "--timeout", "1")
    assert lone.ends() == 1
    assert lone.said("did not answer within 1 s (Connection refused)")


def test_a_port_that_is_taken(launched):
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port + 1))
        taken.listen()
        place = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", "0"]
        lone = launched(*place, "--timeout", "2")
        assert lone.ends() == 1
        assert lone.said(
            f"the group's port 127.0.0.1:{port + 1} (the coordinator's and one) is in use by another process"
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("num_pages = 64", "num_pages = 65"), "config mismatch: the settings of rank 1 are not those of rank 0"),
        (("/token", "/other"), "wrong token"),
    ],
)
def test_a_process_that_does_not_belong(folder, launched, change, said):
    (folder / "other").write_text("another secret, as long")
    (folder / "other.toml").write_text((folder / "recipe.toml").read_text().replace(*change))
    place = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--timeout", "12"]
    ranks = [launched(*place, "--process-id", "0"), launched(*place, "--process-id", "1", recipe="other.toml")]
    assert ranks[1].ends() == 1
    assert ranks[1].said(said)
    assert ranks[0].ends() == 1
    assert ranks[0].said(said if "config" in said else "missing: rank 1")


def test_fewer_devices_than_the_mesh(launched):
    place = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "-cp", "2", "--timeout", "20"]
    ranks = [launched(*place, "--process-id", str(rank)) for rank in range(2)]
    for rank in ranks:
        assert rank.ends() == 1
        assert rank.said("= 4 devices; there are 2 (cpu)")
        assert not rank.said("restart")


def test_when_a_host_stays_away_the_leader_says_so_and_ends_with_an_error(abandoned):
    assert abandoned.ends() == 1
    assert abandoned.said("1 of 2 processes came within 25 s; missing: rank 1")
