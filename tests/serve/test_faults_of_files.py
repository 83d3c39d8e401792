"""faults.md section 3, cases 46 to 52, 57 and 58: what lies on the disk or in the machine is not what it should be.

Each start must end with one clear message that names the file, before device memory is taken, and with exit code 1; or
go on without what is broken and say so. Starts are those of the real engine with changed copies of the bundled model:
most in this process, some as `jaxllm serve`, whose port must be closed again.
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
from helpers.checkpoints import WEIGHTS, copy_of_bundled, drop, edit_json, join, split
from helpers.ports import free_port
from helpers.served import ROOT, Served
from helpers.server import REAL, Server

from jaxllm.config import ConfigError
from jaxllm.core import JaxLLMError
from jaxllm.engine.process.main import build_engine
from serve.texts import open_tokenizer

FEWEST = ("--max-num-seqs", "1", "--max-num-batched-tokens", "32", "--num-gpu-blocks-override", "64")  # executables
NORM = "model.norm.weight"
DOWN = "model.layers.3.mlp.down_proj.weight"


def truncated(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:100_000])


def bad_header(folder):
    path = folder / WEIGHTS
    content = bytearray(path.read_bytes())
    content[8:40] = b"x" * 32
    path.write_bytes(content)


def huge_length(folder):
    path = folder / WEIGHTS
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def overlapping(folder):
    header, data = split(folder)
    begin, end = header[DOWN]["data_offsets"]
    header[DOWN]["data_offsets"] = [begin - 2, end - 2]
    join(folder, header, data)


def lying_shape(folder):
    header, data = split(folder)
    header[DOWN]["shape"] = [384, 10**15]
    join(folder, header, data)


def flipped_bit(folder):
    """With the list of sums that sha256sum made before."""
    made = subprocess.run(["sha256sum", WEIGHTS], cwd=folder, capture_output=True, text=True, check=True).stdout
    (folder / "SHA256SUMS").write_text(made)
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1000] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def other_shapes(folder):
    """Three things wrong at once."""
    header, data = split(folder)
    header[NORM]["shape"], header[DOWN]["shape"] = [2, 192], list(reversed(header[DOWN]["shape"]))
    header["model.layers.99.extra.weight"] = header.pop("model.layers.0.input_layernorm.weight")
    join(folder, header, data)


def another_dtype(folder):
    header, data = split(folder)
    header[NORM]["dtype"] = "I16"
    join(folder, header, data)


def missing_shard(folder):
    header, _ = split(folder)
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    names = [name for name in header if name != "__metadata__"]
    where = {name: f"model-0000{1 + (name == NORM)}-of-00002.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def untied(folder):
    edit_json(folder, "config.json", tie_word_embeddings=False)


def text(name, content):
    def act(folder):
        (folder / name).write_text(content)

    return act


def key(**changes):
    return lambda folder: edit_json(folder, "config.json", **changes)


def gguf_only(folder):
    """A GGUF header that promises 10^18 tensors, and nothing behind it."""
    (folder / WEIGHTS).unlink()
    (folder / "model.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (10**18).to_bytes(8, "little") * 2)


# what is done to the copy -> what the message must name
BAD_MODELS = {
    "47 truncated": (truncated, [WEIGHTS, "truncated", "model."]),
    "47 bad header": (bad_header, [WEIGHTS, "header is not JSON"]),
    "47 huge length": (huge_length, [WEIGHTS, "no header"]),
    "47 overlap": (overlapping, [WEIGHTS, DOWN, "starts at byte"]),
    "47 lying shape": (lying_shape, [WEIGHTS, DOWN, "do not hold"]),
    "47 bit flip": (flipped_bit, [WEIGHTS, "SHA256SUMS"]),
    "48 missing, extra and misshapen": (
        other_shapes,
        [NORM, DOWN, "model.layers.99.extra.weight", "model.layers.0.input_layernorm.weight", "4 problems"],
    ),
    "48 missing tensor": (lambda folder: drop(folder, NORM), [WEIGHTS, f"{NORM} is missing"]),
    "48 dtype": (another_dtype, [WEIGHTS, NORM, "I16"]),
    "48 missing shard": (missing_shard, ["model-00002-of-00002.safetensors", "no such file"]),
    "48 untied without a head": (untied, ["lm_head.weight is missing", "tie_word_embeddings"]),
    "48 no weights": (lambda folder: (folder / WEIGHTS).unlink(), [WEIGHTS]),
    "49 no config": (lambda folder: (folder / "config.json").unlink(), ["config.json", "cannot be read"]),
    "49 not JSON": (text("config.json", "{"), ["config.json", "is not JSON"]),
    "49 not an object": (text("config.json", "[]"), ["config.json"]),
    "49 missing key": (key(hidden_size=None), ["config.json", "hidden_size"]),
    "49 unknown architecture": (key(architectures=["WizardForCausalLM"]), ["config.json", "Wizard", "Qwen3"]),
    "49 heads": (key(num_attention_heads=7, num_key_value_heads=2), ["config.json", "num_"]),
    "49 a number that is none": (key(num_hidden_layers="twelve"), ["config.json", "num_hidden_layers"]),
    "50 vocabulary": (key(vocab_size=8000), ["tokenizer.json", "vocab_size = 8000"]),
    "50 tokenizer": (text("tokenizer.json", '{"version": "1.0", "model": {}}'), ["tokenizer.json", "not a tokenizer"]),
    "51 GGUF": (gguf_only, ["model.safetensors"]),
}


ONE_OF_EACH = {"decode_buckets": [8], "token_buckets": [64]}  # sums are compared while they are compiled


@pytest.mark.parametrize("case", BAD_MODELS)
def test_47_to_51_a_model_that_is_not_whole_is_refused_by_name_before_memory_is_taken(case, tmp_path):
    damage, named = BAD_MODELS[case]
    folder = copy_of_bundled(tmp_path / "model")
    damage(folder)
    with pytest.raises(JaxLLMError) as raised:
        build_engine({"overrides": {**REAL, **ONE_OF_EACH, "model": str(folder)}})
    for word in named:
        assert word in str(raised.value)


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def refused_start(*flags, environ=None):
    """`jaxllm serve` on a port of ours: (code, last words), and nobody listens there afterwards."""
    port = free_port()
    command = [sys.executable, "-m", "serve.cli", "serve", *flags, "--port", str(port)]
    own = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **(environ or {})}
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False, timeout=120)
    assert not listens(port)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


def test_46_a_cache_that_does_not_fit_ends_the_server_with_the_sum_and_the_flag():
    code, said = refused_start("--num-gpu-blocks-override", "20000000")
    assert code == 1
    for part in ("weights", "workspace", "KV pages", "GiB", "num_pages"):
        assert part in said


def test_47_49_50_the_whole_command_ends_with_code_1_and_the_name(tmp_path):
    for number, (damage, word) in enumerate([(truncated, WEIGHTS), (key(hidden_size=None), "hidden_size")]):
        folder = copy_of_bundled(tmp_path / str(number))
        damage(folder)
        code, said = refused_start(str(folder))
        assert code == 1
        assert word in said


# ---- 50: half a tokenizer ----


def test_50_a_broken_template_leaves_completions_and_says_so(tmp_path):
    folder = copy_of_bundled(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }")
    tokenizer, warnings = open_tokenizer(folder)
    assert tokenizer is not None
    assert not tokenizer.templates
    assert any("does not parse" in one for one in warnings)
    assert any("/v1/completions works" in one for one in warnings)


@pytest.mark.parametrize("source", ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
                                    "{{ 'a' * 2000000000 }}", "{{ messages.__class__.__mro__ }}"])  # fmt: skip
def test_50_a_template_that_cannot_render_a_greeting_is_left_out(tmp_path, source):
    folder = copy_of_bundled(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(source)
    tokenizer, warnings = open_tokenizer(folder)
    assert not tokenizer.templates
    assert len(warnings) == 2


def test_50_no_end_token_and_no_tokenizer_are_said(tmp_path):
    folder = copy_of_bundled(tmp_path / "model", without=["generation_config.json"])
    edit_json(folder, "config.json", eos_token_id=None)
    edit_json(folder, "tokenizer_config.json", eos_token=None)
    warnings = open_tokenizer(folder)[1]
    assert any("no end-of-sequence token" in one for one in warnings)
    bare = copy_of_bundled(tmp_path / "bare", without=["tokenizer.json"])
    assert open_tokenizer(bare)[0] is None
    assert "token ids only" in open_tokenizer(bare)[1][0]
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        open_tokenizer(folder)


def test_50_a_model_without_a_tokenizer_serves_token_ids(tmp_path):
    folder = copy_of_bundled(tmp_path / "model", without=["tokenizer.json"])
    with Served(str(folder), *FEWEST) as server, httpx.Client(base_url=server.url, timeout=30, trust_env=False) as http:
        answer = http.post("/v1/completions", json={"prompt": [300, 301], "max_tokens": 4, "return_token_ids": True})
        assert len(answer.json()["choices"][0]["token_ids"]) == 4
        assert http.post("/v1/completions", json={"prompt": "text"}).status_code == 400
        chat = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
        assert chat.json()["error"]["code"] == "no_chat_template"


# ---- 52: the compile cache ----


def answer_with_cache(cache, **settings):
    """What the bundled model says when its executables come from this cache."""
    with Server(bundled={**REAL, "cache_dir": str(cache), **settings}) as server:
        said = server.complete("def add(a, b):", max_tokens=16, ignore_eos=True).json()["choices"][0]["text"]
        server.check_a()
        return said


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A filled cache, and what is said with it."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, answer_with_cache(folder)


def entries(folder):
    return [path for path in folder.rglob("*-cache") if path.is_file()]


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["flipped", "truncated", "empty", "no sum"])
def test_52_a_damaged_cache_costs_time_and_no_answer(cache, kind):
    folder, said = cache
    for number, path in enumerate(entries(folder)):
        content = bytearray(path.read_bytes())
        if kind == "flipped":
            content[len(content) * (number % 7) // 7] ^= 4
            path.write_bytes(content)
        elif kind == "truncated":
            path.write_bytes(content[: len(content) // 2])
        elif kind == "empty":
            path.write_bytes(b"")
        else:
            path.with_name(path.name + ".sha256").unlink()
    assert answer_with_cache(folder) == said
    assert all(path.with_name(path.name + ".sha256").exists() for path in entries(folder))


@pytest.mark.faults
def test_52_a_cache_that_cannot_be_written_costs_time_and_no_answer(cache, tmp_path):
    file = tmp_path / "a file"
    file.write_text("")
    assert answer_with_cache(file) == cache[1]  # cannot be a folder
    assert answer_with_cache("/proc/no-such-place") == cache[1]
    assert answer_with_cache("/dev/full") == cache[1]


@pytest.mark.faults
def test_52_two_processes_share_a_cache(cache, tmp_path):
    said = {}
    threads = [threading.Thread(target=lambda i=i: said.update({i: answer_with_cache(tmp_path)})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(250)
    assert said == {0: cache[1], 1: cache[1]}


# ---- 57, 58: two of us ----


def test_57_a_second_server_on_the_port_is_refused_before_it_loads_and_the_first_goes_on():
    with Served(*FEWEST) as first:
        port = first.url.rpartition(":")[2]
        began = time.monotonic()
        command = [sys.executable, "-m", "serve.cli", "serve", "--port", port]
        own = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=own, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1
        assert "in use by another process" in done.stderr
        assert time.monotonic() - began < 30
        assert json.loads(first.get("/ready"))["status"] == "ready"


def test_57_a_device_that_is_full_is_said_with_its_free_bytes():
    """No device here: what a GPU of which 3 of 80 GiB are free would lead to."""
    from jaxllm.engine.memory import out_of_memory

    class Full:
        platform, device_kind = "gpu", "NVIDIA H200"

        @staticmethod
        def memory_stats():
            return {"bytes_limit": 80 * 2**30, "bytes_in_use": 77 * 2**30}

    said = out_of_memory("weights", None, Full())
    assert "3.00 GiB of 80.00 GiB are free" in said
    assert "nvidia-smi" in said


SCRIPT = """
import {module} as processes
from jaxllm.core import SamplingParams
from jaxllm.llm import LLM

llm = LLM(max_num_seqs=2, max_num_batched_tokens=32, num_pages=64, max_model_len=64, decode_buckets=[2])
{use}
"""
USE_CHILD = """
def use():
    try:
        llm.generate("a", SamplingParams(max_tokens=1))
    except Exception as error:
        print(type(error).__name__, error, flush=True)

child = processes.get_context("fork").Process(target=use)
child.start()
child.join(30)
print("child", child.exitcode)
"""


def run_script(tmp_path, use, module="multiprocessing"):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(module=module, use=use))
    own = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", str(path)]
    return subprocess.run(command, env=own, capture_output=True, text=True, check=False, timeout=120)


def test_58_llm_needs_no_main_guard_and_a_forked_child_gets_one_clear_error(tmp_path):
    use = "print(llm.generate('a', SamplingParams(max_tokens=3, ignore_eos=True))[0].finished)"
    done = run_script(tmp_path, use + USE_CHILD)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "True"
    assert lines[1].startswith("JaxLLMError this LLM belongs to process ")
    assert lines[2] == "child 0"


# ---- 55: signals ----


def test_55_a_hangup_drains_and_a_broken_pipe_is_nothing():
    server = Served(*FEWEST)
    try:
        os.kill(server.pid, signal.SIGPIPE)
        assert json.loads(server.get("/ready"))["status"] == "ready"
        engine = server.engine_pid()
        assert server.stop(signal.SIGHUP) == 0
        assert not Path(f"/proc/{engine}").exists()
        assert not listens(int(server.url.rpartition(":")[2]))
    finally:
        server.process.kill()
