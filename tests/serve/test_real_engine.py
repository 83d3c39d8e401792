"""`jaxllm serve` as people start it, with the real engine on a tiny random model: two processes, JAX and all."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parent.parent.parent
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 8192,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 8178,  # <|im_end|>
    "bos_token_id": 8176,
}
START = "import typer; from serve.commands.serve import command; typer.run(command)"
FLAGS = "--load-format dummy --port 0 --admin-key adm --max-num-seqs 4 --max-num-batched-tokens 64"
MESSAGES = [{"role": "user", "content": "Hello!"}]


class Running:
    def __init__(self, folder, *flags, **environ):
        command = [sys.executable, "-c", START, str(folder), *FLAGS.split(), "--num-gpu-blocks-override", "64", *flags]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environ}
        environ["JAXLLM_CACHE_DIR"] = str(folder / "cache")
        self.process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if line.startswith("Serving"):
                break
        self.url = self.lines[-1].split()[3]
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def post(self, path, body):
        return self.http.post(path, json=body)

    def stop(self):
        self.http.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            self.process.stdout.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "jaxllm" / "models" / "first-light" / name, made)
    (made / "config.json").write_text(json.dumps(TINY))
    return made


@pytest.fixture(scope="module")
def server(folder):
    running = Running(folder)
    yield running
    assert running.stop() == 0


def test_the_start_prints_four_facts_and_the_address(server):
    assert [line.split()[0] for line in server.lines] == ["Model", "KV", "Maximum", "Serving"]


def test_a_chat_streams_what_it_says_whole(server):
    body = {"messages": MESSAGES, "max_tokens": 20, "seed": 7, "temperature": 1.0}
    whole = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    with server.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1]) == whole
    assert whole


def test_a_schema_is_obeyed_by_a_random_model(server):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    body = {"messages": MESSAGES, "max_tokens": 60, "temperature": 0, "response_format": form}
    choice = server.post("/v1/chat/completions", body).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert isinstance(json.loads(choice["message"]["content"])["ok"], bool)


def test_a_cpu_has_counted_work_and_no_share_of_a_peak(server):
    server.post("/v1/completions", {"prompt": "hello", "max_tokens": 8, "ignore_eos": True})
    stats = server.http.get("/server_info", headers={"authorization": "Bearer adm"}).json()["engine"]["stats"]
    for phase in ("prefill", "decode"):
        assert stats[f"{phase}_flops"] > 0
        assert 0 < stats[f"{phase}_step_s"] < 600
    text = server.http.get("/metrics").text
    assert "jaxllm_engine_decode_bytes_total" in text
    assert "jaxllm_mfu" not in text
    assert "jaxllm_mbu" not in text


def test_embeddings_come_from_the_served_model_and_leave_no_page_behind(server):
    answer = server.post("/v1/embeddings", {"input": ["hello there", "x " * 100]}).json()
    first, second = (one["embedding"] for one in answer["data"])
    assert len(first) == TINY["hidden_size"]
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-5)
    assert first != second
    stats = server.http.get("/server_info", headers={"authorization": "Bearer adm"}).json()["engine"]["stats"]
    assert stats["held_pages"] == 0
    assert stats["free_pages"] + stats["cached_pages"] == stats["total_pages"]


def test_the_engine_can_live_in_the_servers_process_to_debug(folder, server):
    alone = Running(folder, "--in-process")
    try:
        children = subprocess.run(
            ["ps", "--ppid", str(alone.process.pid), "-o", "args="], capture_output=True, text=True
        )
        assert "serve.engine_process" not in children.stdout
        body = {"prompt": "hello", "max_tokens": 8, "temperature": 0}
        texts = [one.post("/v1/completions", body).json()["choices"][0]["text"] for one in (alone, server)]
        assert texts[0] == texts[1]
    finally:
        assert alone.stop() == 0


def test_a_fault_point_of_the_environment_reaches_the_engine(folder):
    running = Running(folder, JAXLLM_FAULT="step:1:nan_row=0")
    try:
        error = running.post("/v1/completions", {"prompt": "a", "max_tokens": 2})
        assert (error.status_code, error.json()["error"]["code"]) == (500, "numerical_error")
        assert running.post("/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200
    finally:
        assert running.stop() == 0
