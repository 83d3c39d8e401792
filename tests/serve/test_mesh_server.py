"""One server in front of several engines, over real HTTP: replicas without a device, and real ones on a mesh."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers.server import HEAD, Server, settings
from safetensors.numpy import save_file

from jaxllm.config import BUNDLED_MODEL, bundled_model_dir

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "bundled_greedy.json").read_text())["rows"]
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
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
TEXTS = [f"neighbour number {i}" for i in range(8)]
SMALL = {"max_num_seqs": 2, "decode_buckets": [2], "max_num_batched_tokens": 64, "token_buckets": [64]}
SMALL |= {"num_pages": 64, "max_model_len": 256, "threads": 2}


def together(server, bodies):
    """The events of streams that run side by side, in order."""
    found = {}

    def one(number, body):
        found[number] = server.events("/v1/completions", {"temperature": 0, **body}, timeout=120)

    threads = [threading.Thread(target=one, args=each) for each in enumerate(bodies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return [found[number] for number in range(len(bodies))]


def text_of(events):
    assert events[-1] == "[DONE]", events[-1]
    return "".join(choice["text"] for event in events[:-1] for choice in event["choices"])


def admin(server, path, body=None):
    answer = server.http.post(path, json=body or {}, headers=HEAD, timeout=120)
    return answer.status_code, answer.json()


def stats_of(server):
    return server.info()["engine"]["stats"]


# ---- without a device ----


def test_replicas_say_what_one_engine_says_and_are_counted_together():
    bodies = [{"prompt": text, "max_tokens": 40} for text in TEXTS]
    with Server(max_num_seqs=2) as server:
        alone = [text_of(events) for events in together(server, bodies)]
    with Server(max_num_seqs=2, replicas=3, step_s=0.002) as server:
        info = server.info()
        assert (info["max_num_seqs"], info["capacity_tokens"]) == (6, 3 * 128 * 8)
        assert [text_of(events) for events in together(server, bodies)] == alone
        stats = stats_of(server)
        assert (stats["generated_tokens"], stats["total_pages"]) == (8 * 40, 3 * 128)
        server.until(lambda: "jaxllm_engine_generated_tokens_total 320.0" in server.http.get("/metrics").text)
        server.check_a()


def test_a_failed_step_of_one_replica_ends_its_streams_alone():
    bodies = [{"prompt": text, "max_tokens": 60} for text in TEXTS]
    with Server(replicas=2, fault="step:9:raise=1", step_s=0.01) as server:
        streams = together(server, bodies)
        broken = [events[-1]["error"]["code"] for events in streams if events[-1] != "[DONE]"]
        assert broken == ["engine_error"] * 4, "half of them were the first replica's"
        assert server.status("/ready") == 200
        assert len(server.streamed_text(TEXTS[0], max_tokens=40)) == 40
        server.check_a()
        assert server.info()["engine"]["restarts"] == 0


def test_a_client_that_leaves_is_forgotten_by_the_replica_that_had_it():
    with Server(replicas=2, step_s=0.02) as server:
        body = {"prompt": "gone", "max_tokens": 400, "temperature": 0, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert stats_of(server)["running"] == 1
        server.settle()
        server.check_a()


def test_replicas_without_a_device_say_that_they_cannot_sleep():
    with Server(replicas=2) as server:
        status, body = admin(server, "/sleep")
        assert (status, body["error"]["code"]) == (400, "not_supported")
        server.check_a()


# ---- without a device, a process a replica ----


def test_processes_say_what_one_engine_says_and_a_killed_one_ends_its_streams_alone():
    bodies = [{"prompt": text, "max_tokens": 60} for text in TEXTS]
    with Server(max_num_seqs=4) as server:
        alone = [text_of(events) for events in together(server, bodies)]
    with Server(fleet=2, max_num_seqs=4, step_s=0.01) as server:
        info = server.info()
        assert (info["max_num_seqs"], info["capacity_tokens"]) == (8, 2 * 128 * 8)
        server.until(lambda: "jaxllm_engine_replicas_serving 2.0" in server.http.get("/metrics").text)
        threading.Timer(0.3, os.kill, (server.link.pids[0], signal.SIGKILL)).start()
        streams = together(server, bodies)
        broken = [events[-1]["error"]["code"] for events in streams if events[-1] != "[DONE]"]
        assert broken == ["engine_died"] * 4, "half of them were the first replica's"
        whole = [text_of(events) == text for events, text in zip(streams, alone) if events[-1] == "[DONE]"]
        assert whole == [True] * 4
        assert server.status("/health") == server.status("/ready") == 200
        server.until(lambda: stats_of(server)["replicas_serving"] == 2)
        assert [text_of(events) for events in together(server, bodies)] == alone
        server.check_a()
        stats = stats_of(server)
        assert (stats["replica_restarts"], server.info()["engine"]["restarts"]) == (1, 0)
        assert stats["generated_tokens"] >= 12 * 60, "with what the killed one had told last"
        assert admin(server, "/sleep")[1]["error"]["code"] == "not_supported"


# ---- the bundled model on simulated devices ----


def serves_as_one(server, rows):
    bodies = [{"prompt": row["prompt"], "max_tokens": 20, "return_token_ids": True} for row in rows]
    for row, events in zip(rows, together(server, bodies)):
        found = [id for event in events[:-1] for choice in event["choices"] for id in choice.get("token_ids") or ()]
        assert found == row["token_ids"][:20]


def sleeps_and_says_the_same(server, level):
    assert admin(server, "/sleep", {"level": level}) == (200, {"asleep": True, "level": level})
    server.until(lambda: server.status("/ready") == 503)
    assert server.complete().json()["error"]["code"] == "asleep"
    assert admin(server, "/wake_up")[0] == 200
    server.wait_ready()
    serves_as_one(server, GOLDEN[:2])


@pytest.mark.parametrize("processes", [False, True], ids=["one_process", "a_process_each"])
def test_a_tiny_model_on_two_replicas_serves_and_sleeps(tmp_path, processes):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model_dir(BUNDLED_MODEL) / name, tmp_path)
    wanted = {**SMALL, "model": str(tmp_path), "load_format": "dummy", "dp": 2, "max_model_len": 128}
    wanted |= {"data_processes": processes}
    with Server(settings(model_names=("tiny",)), bundled=wanted) as server:
        assert server.info()["start"]["mesh"] == "dp2"
        bodies = [{"prompt": row["prompt"], "max_tokens": 20, "ignore_eos": True} for row in GOLDEN[:4]]
        before = [text_of(events) for events in together(server, bodies)]
        assert admin(server, "/sleep")[0] == 200
        assert admin(server, "/wake_up")[0] == 200
        server.wait_ready()
        assert [text_of(events) for events in together(server, bodies[::-1])] == before[::-1], "on the other replica"
        server.check_a()
        stats = stats_of(server)
        assert (stats["compiles_after_ready"], stats["total_pages"]) == (0, 128)
        if processes:
            shutil.copytree(tmp_path, tmp_path / "other")
            comes_back_with_the_others_weights(server, tmp_path / "other", bodies, before)


def write_weights(folder):
    """Of the tiny model, random."""
    D, F, V, q, kv = 32, 48, 8192, 32, 16
    layer = {"self_attn.q_proj": (q, D), "self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D)}
    layer |= {"self_attn.o_proj": (D, q), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    layer |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    source = np.random.default_rng(1)
    save_file({name: source.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}, folder)


def comes_back_with_the_others_weights(server, path, bodies, before):
    """A replica is killed after all got other weights."""
    write_weights(path / "model.safetensors")
    status, body = admin(server, "/update_weights", {"path": str(path), "version": "second"})
    assert (status, body) == (200, {"weights_version": "second"})
    after = [text_of(events) for events in together(server, bodies)]
    assert after != before
    os.kill(server.link.pids[0], signal.SIGKILL)
    server.until(lambda: stats_of(server)["replicas_serving"] == 1)
    server.until(lambda: stats_of(server)["replicas_serving"] == 2, 60)
    streams = together(server, bodies)
    assert [text_of(events) for events in streams] == after
    assert {events[0]["weights_version"] for events in streams} == {"second"}, "also of the new one"
    assert all(link.death() is None for link in server.link.links)


@pytest.mark.mesh
@pytest.mark.parametrize("mesh", [{"dp": 2}, {"pp": 2}, {"dp": 2, "pp": 2, "tp": 2}], ids=["dp2", "pp2", "dp2 pp2 tp2"])
def test_the_bundled_model_on_replicas_and_lanes(mesh):
    with Server(settings(model_names=("first-light",)), bundled={**SMALL, "model": BUNDLED_MODEL, **mesh}) as server:
        serves_as_one(server, GOLDEN[:8])
        for level in (1, 2):
            sleeps_and_says_the_same(server, level)
        assert admin(server, "/update_weights", {"path": "first-light"})[0] == 400
        schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        answer = server.chat("A number?", max_tokens=40, response_format=form).json()["choices"][0]
        assert answer["finish_reason"] != "stop" or "n" in json.loads(answer["message"]["content"])
        assert admin(server, "/start_profile")[0] == 200
        assert server.complete().status_code == 200
        assert admin(server, "/stop_profile")[0] == 200
        server.check_a()
        assert stats_of(server)["compiles_after_ready"] == 0
