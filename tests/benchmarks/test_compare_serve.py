"""Two servers under one client: commands, results that are refused, the bars, and the whole drive with servers that are
written down here; vLLM's own client and server run only where vLLM is carried."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare_serve
from benchmarks.compare_serve import (
    OFFLINE,
    Plan,
    client_command,
    compare,
    measure,
    offline,
    read_offline,
    read_result,
    running,
    server_command,
    table,
    verdicts,
)

HELPERS = Path(__file__).parent.parent / "helpers"
GOOD = {
    "completed": 8,
    "duration": 2.0,
    "total_input_tokens": 40,
    "total_output_tokens": 24,
    "output_throughput": 12.0,
    "median_ttft_ms": 5.0,
    "p99_ttft_ms": 9.0,
    "median_tpot_ms": 1.0,
    "median_itl_ms": 1.0,
    "p99_itl_ms": 3.0,
}


def plan(folder: Path, **changes) -> Plan:
    made = Plan(
        model=folder,
        peer=folder / "peer",
        client="jaxllm",
        concurrency=(4,),
        waves=2,
        input_len=5,
        output_len=3,
        max_model_len=128,
        settings=(),
        limit_s=60.0,
        folder=folder,
    )
    return dataclasses.replace(made, **changes)


def flag(command, name):
    return command[command.index(name) + 1]


def test_both_servers_get_the_same_model_and_limits_and_no_prefix_cache(tmp_path):
    given = plan(tmp_path, concurrency=(4, 16), settings=(("max_num_batched_tokens", "2048"),))
    ours = server_command("jaxllm", given, 8123)
    shell, run, theirs = server_command("vllm", given, 8123)
    assert (shell, run) == ("bash", "-c")
    assert theirs.startswith(
        f". {tmp_path}/peer/setup.sh {tmp_path}/peer && exec python3 -m vllm.entrypoints.cli.main serve "
    )
    for name, value in (("--port", "8123"), ("--max-num-seqs", "16"), ("--max-model-len", "128")):
        assert flag(ours, name) == value
        assert f"{name} {value}" in theirs
    for word in ("--load-format dummy", "--no-enable-prefix-caching", "--served-model-name m"):
        assert word in theirs
        assert word in " ".join(ours)
    assert ours[-2:] == ["--max-num-batched-tokens", "2048"]
    assert "2048" not in theirs


def test_one_client_drives_both_with_the_same_prompts(tmp_path):
    result = tmp_path / "r.json"
    (_, _, theirs), ours = (
        client_command(plan(tmp_path, client=client), "http://h:1", 4, result) for client in ("vllm", "jaxllm")
    )
    common = (
        "bench serve --base-url http://h:1 --model m --dataset-name random --random-input-len 5 --random-output-len 3 "
    )
    common += "--ignore-eos --temperature 0 --num-prompts 8 --seed 0 --max-concurrency 4 --metric-percentiles 50,90,99"
    assert common in theirs
    assert common in " ".join(ours)
    for word in ("--backend openai", "--endpoint /v1/completions", f"--tokenizer {tmp_path}", "--save-result"):
        assert word in theirs
    assert theirs.endswith(f"--result-dir {tmp_path} --result-filename r.json")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({}, None),
        ({"completed": 7}, "7 of 8 requests were answered"),
        ({"total_output_tokens": 23}, "23 tokens instead of 24"),
        ({"p99_itl_ms": None}, "no p99_itl_ms"),
    ],
)
def test_a_run_that_did_less_than_it_was_asked_has_no_rate(tmp_path, changes, error):
    found = read_result(GOOD | changes, plan(tmp_path), 4)
    assert found.get("error") == error
    assert found["completed"] == (GOOD | changes)["completed"]


def test_offline_figures_are_read_by_their_concurrency(tmp_path):
    given = plan(tmp_path, concurrency=(4, 8, 16))
    lines = ["noise", OFFLINE + json.dumps({"concurrency": 4, "tokens": 12, "seconds": 0.5})]
    lines += [OFFLINE + json.dumps({"concurrency": 8, "tokens": 23, "seconds": 0.5})]
    found = read_offline("\n".join(lines), given)
    assert found[4] == {"output_throughput": 24.0}
    assert found[8] == {"error": "23 tokens"}
    assert found[16] == {"error": "no figure; see offline.log"}


def results(rate=1200.0, alone=1210.0, theirs=1000.0, ttft=(10.0, 10.0), itl=(5.0, 6.0)):
    ours = {"output_throughput": rate, "median_ttft_ms": ttft[0], "p99_itl_ms": itl[0]}
    other = {"output_throughput": theirs, "median_ttft_ms": ttft[1], "p99_itl_ms": itl[1]}
    return {"jaxllm": {4: ours}, "vllm": {4: other}, "offline": {4: {"output_throughput": alone}}}


@pytest.mark.parametrize(
    ("changes", "met"),
    [
        ({}, [True, True, True, True]),
        ({"rate": 1199.0}, [True, False, True, True]),
        ({"alone": 1300.0}, [False, True, True, True]),
        ({"ttft": (10.1, 10.0)}, [True, True, False, True]),
        ({"itl": (6.1, 6.0)}, [True, True, True, False]),
    ],
)
def test_the_bars_are_those_of_the_issue(changes, met):
    assert [one for _, _, one in verdicts(results(**changes), 4)] == met


def test_a_bar_without_its_figures_is_neither_met_nor_missed(tmp_path):
    found = results()
    found["vllm"] = {4: {"error": "the server ended with code 1"}}
    assert [one for _, _, one in verdicts(found, 4)] == [True, None, None, None]
    written = table(plan(tmp_path), found)
    assert "| 4 | vllm: the server ended with code 1 |" in written
    assert "| 4 | jaxllm | 1,200.00 | 10.00 |" in written
    assert written.count("not measured") == 3


# ---- the drive ----


@pytest.fixture
def servers(monkeypatch):
    """Both "engines" are the real server over the fake engine, in processes."""

    def command(engine, given, port):
        if engine == "vllm" and given.settings:
            return [sys.executable, "-c", "import sys; sys.exit(3)"]
        return [sys.executable, str(HELPERS / "server_main.py"), "--port", str(port), "--engine", "{}"]

    monkeypatch.setattr(compare_serve, "server_command", command)
    monkeypatch.setattr(compare_serve, "NAME", "model")
    monkeypatch.setitem(compare_serve.READY, "vllm", "/ready")


def test_a_comparison_measures_each_server_alone_and_writes_what_it_found(servers, tmp_path, monkeypatch):
    (tmp_path / "peer").mkdir()
    monkeypatch.setattr(compare_serve, "offline", lambda given: {4: {"output_throughput": 1.0}})
    seen = []

    def watched(given, engine, url, concurrency):
        seen.append((engine, url))
        return measure(given, engine, url, concurrency)

    monkeypatch.setattr(compare_serve, "measure", watched)
    found = compare(plan(tmp_path, input_len=4), ["jaxllm", "vllm", "offline"], tmp_path / "out", "abc1234")
    for engine in ("jaxllm", "vllm"):
        assert "error" not in found[engine][4]
        assert (found[engine][4]["completed"], found[engine][4]["total_output_tokens"]) == (8, 24)
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["commit"] == "abc1234"
    assert document["results"]["jaxllm"]["4"]["output_throughput"] > 0
    assert set(document["ready_s"]) == {"jaxllm", "vllm"}
    assert "p99 ITL over vLLM's" in (tmp_path / "out.md").read_text()
    assert [engine for engine, _ in seen] == ["jaxllm", "vllm"]
    assert not any(compare_serve.answers(url + "/health") for _, url in seen)  # both have ended


def test_a_server_that_does_not_start_leaves_the_others_figures(servers, tmp_path, monkeypatch):
    (tmp_path / "peer").mkdir()
    monkeypatch.setattr(compare_serve, "measure", lambda *_: {"output_throughput": 1.0})
    found = compare(plan(tmp_path, settings=(("x", "1"),)), ["vllm", "jaxllm"], tmp_path / "out", "")
    assert found["vllm"] == {4: {"error": "the server ended with code 3; see vllm.log"}}
    assert found["jaxllm"] == {4: {"output_throughput": 1.0}}


def test_a_server_that_is_never_ready_is_ended_after_its_time(tmp_path, monkeypatch):
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(compare_serve, "server_command", lambda *_: sleeper)
    message = "was not ready within 0.5 s"
    with pytest.raises(RuntimeError, match=message), running("jaxllm", plan(tmp_path, limit_s=0.5)):
        raise AssertionError("it is not ready")


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("import time; time.sleep(60)", "the client took more than 1 s"),
        ("import sys; sys.exit(4)", "the client ended with code 4; see client.log (FileNotFoundError)"),
        (
            "import sys; open(sys.argv[1], 'w').write('no')",
            "the client ended with code 0; see client.log (JSONDecodeError)",
        ),
    ],
    ids=["hangs", "fails", "writes no JSON"],
)
def test_a_client_that_fails_is_an_error_of_its_run(tmp_path, monkeypatch, script, error):
    monkeypatch.setattr(
        compare_serve, "client_command", lambda given, url, level, out: [sys.executable, "-c", script, str(out)]
    )
    limit = 1.0 if "sleep" in script else 60.0
    assert measure(plan(tmp_path, limit_s=limit), "jaxllm", "http://h:1", 4) == {"error": error}


def test_memory_that_is_given_back_is_waited_for(monkeypatch):
    left, waited = [9000.0, 8000.0, 100.0], []
    monkeypatch.setattr(compare_serve, "used_mib", lambda: left.pop(0))
    monkeypatch.setattr(compare_serve.time, "sleep", waited.append)
    compare_serve.await_memory()
    assert waited == [0.5, 0.5]


def test_offline_runs_the_model_without_a_server(tmp_path):
    """A tiny random model on this CPU: two rates, of whole outputs."""
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "vocab_size": 8192,
                "max_position_embeddings": 128,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "tie_word_embeddings": True,
            }
        )
    )
    settings = (("max_num_batched_tokens", "16"), ("token_buckets", "[16]"), ("decode_buckets", "[2]"))
    found = offline(plan(tmp_path, model=model, concurrency=(1, 2), settings=settings, limit_s=200.0))
    assert all(found[level].get("output_throughput") for level in (1, 2)), (tmp_path / "offline.log").read_text()


def test_the_job_says_its_flags():
    done = subprocess.run(
        [sys.executable, compare_serve.__file__, "--help"], capture_output=True, text=True, check=True
    )
    assert "--concurrency" in done.stdout
