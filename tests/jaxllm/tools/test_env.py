"""What env finds out, and that nothing it cannot find out is an error."""

import json
import sys
import types

from jaxllm.tools import env


def test_it_names_versions_devices_driver_and_model(tmp_path, monkeypatch):
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 2**20)
    monkeypatch.setenv("JAXLLM_LOG", "debug")
    facts = env.collect(str(tmp_path))
    assert facts["jaxllm"]["python"] == sys.version.split()[0]
    assert facts["packages"]["tokenizers"] == env.version("tokenizers") != "not installed"
    assert facts["devices"]["backend"] in ("cpu", "gpu")
    assert facts["model"] == {
        "directory": str(tmp_path),
        "architecture": "LlamaForCausalLM",
        "layers": "2",
        "context": "128",
        "weights": "1 files, 1.0 MiB",
    }
    assert facts["environment"] == {"JAXLLM_LOG": "debug"}
    text = env.render(facts)
    assert "LlamaForCausalLM" in text
    assert "JAXLLM_LOG" in text


def test_what_is_missing_or_broken_is_said_in_its_place(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("no device")

    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(default_backend=broken))
    monkeypatch.setattr(env, "DRIVER_FILE", tmp_path / "no driver")
    (tmp_path / "config.json").write_text("{")
    facts = env.collect(str(tmp_path))
    assert facts["devices"] == {"error": "RuntimeError: no device"}
    assert facts["driver"]["nvidia"] == "no NVIDIA driver is loaded"
    assert facts["model"]["config.json"].startswith("not readable")
    assert "no such directory" in env.collect("nowhere")["model"]["error"]
    assert env.version("surely-not-a-package") == "not installed"


def test_the_driver_is_the_first_line_of_its_file(tmp_path, monkeypatch):
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  575.57.08\nGCC\n")
    monkeypatch.setattr(env, "DRIVER_FILE", tmp_path / "version")
    assert env._driver() == "NVIDIA UNIX x86_64 Kernel Module  575.57.08"
