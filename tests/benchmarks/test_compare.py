"""The comparison: the peers' lines under our names, turns that favour nobody, and processes that are ended."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.compare import START, Plan, Run, at_its_turn, lines_of, merged, order, peer_figure, run_transformers
from jaxllm.tools.figures import RATE, median_figure


def plan(folder: Path) -> Plan:
    return Plan(
        model=folder,
        peer=folder,
        batches="1",
        context=64,
        prefills="",
        repeats=1,
        hf_batches="1,2",
        requests=0,
        settings=(),
        limit_s=20.0,
    )


def test_rounds_go_forward_and_backward_and_some_engines_run_once():
    names = ["jaxllm", "vllm", "transformers"]
    assert order(names, 2, ["transformers"]) == ["jaxllm", "vllm", "transformers", "vllm", "jaxllm"]
    assert order(names, 2, ["vllm", "transformers"]) == ["jaxllm", "vllm", "transformers", "jaxllm"]
    assert order(names[:2], 3, []) == ["jaxllm", "vllm", "vllm", "jaxllm", "jaxllm", "vllm"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"what": "decode", "batch": 8, "ctx": 1024, "step_ms": 5.0, "all_ms": [4.0, 6.0]}, (5.0, "ms")),
        ({"what": "decode", "batch": 8, "ctx": 1024, "step_ms": 6.46}, (6.46, "ms")),
        ({"what": "prefill", "tokens": 1024, "ttft_ms": 28.2}, (28.2, "ms")),
        ({"what": "throughput", "requests": 256, "out_tokens": 1000, "s": 2.0}, (500.0, RATE)),
        ({"what": "startup", "s": 60.0}, (74.6, "s")),
    ],
)
def test_a_peers_line_becomes_a_figure(line, expected):
    figure = peer_figure(line, 74.6)
    assert (figure.value, figure.unit) == expected


def test_a_line_about_something_else_is_passed_over():
    assert peer_figure({"what": "weather"}, 1.0) is None


def test_figures_of_all_rounds_are_merged_but_a_first_start_is_not_a_later_one():
    def run(step_ms, start_s):
        step = median_figure("decode step", "batch 1", "ms", [step_ms])
        return Run("ours", 1.0, [step, median_figure(START, "", "s", [start_s])])

    runs = [at_its_turn(run(4.0, 60.0), again=False), at_its_turn(run(5.0, 15.0), again=True)]
    step, cold, warm = merged(runs)["ours"]
    assert (step.value, step.repeats) == (4.5, (4.0, 5.0))
    assert (cold.value, cold.at) == (60.0, "empty caches")
    assert (warm.value, warm.at) == (15.0, "caches of a run before")


def test_lines_come_with_their_time_and_the_error_stream_goes_to_the_log(tmp_path):
    script = "import sys; print('a'); sys.stderr.write('oh\\n'); sys.exit(3)"
    log = tmp_path / "log"
    lines = list(lines_of([sys.executable, "-c", script], 20.0, log))
    assert [line for _, line in lines] == ["a"]
    assert "oh\n" in log.read_text()
    assert "exit 3" in log.read_text()


def test_a_process_that_takes_too_long_is_ended_with_its_children(tmp_path):
    started = time.perf_counter()
    assert list(lines_of(["bash", "-c", "sleep 60 & sleep 60"], 0.5, tmp_path / "log")) == []
    assert time.perf_counter() - started < 20


def test_transformers_is_ended_after_its_last_decode_figure(tmp_path):
    pid = tmp_path / "pid"
    line = {"what": "decode", "ctx": 64, "step_ms": 1.0}
    (tmp_path / "peer_hf.py").write_text(
        "import json, os, time\n"
        f"open({str(pid)!r}, 'w').write(str(os.getpid()))\n"
        f"for batch in (1, 2): print('PEER ' + json.dumps({line!r} | dict(batch=batch)), flush=True)\n"
        "time.sleep(60)\n"
    )
    run = run_transformers(plan(tmp_path), tmp_path / "log")
    assert [figure.at for figure in run.figures] == ["batch 1, context 64", "batch 2, context 64"]
    assert not Path(f"/proc/{pid.read_text()}").exists()


def test_a_peers_error_is_kept_beside_the_figures_it_had(tmp_path):
    lines = [{"what": "decode", "batch": 1, "ctx": 64, "step_ms": 1.0}, {"what": "decode", "error": "out of memory"}]
    (tmp_path / "peer_hf.py").write_text("".join(f"print('PEER ' + {json.dumps(json.dumps(x))})\n" for x in lines))
    run = run_transformers(plan(tmp_path), tmp_path / "log")
    assert (len(run.figures), run.error) == (1, "out of memory")


def test_an_unknown_engine_is_named():
    command = [sys.executable, "-m", "benchmarks.compare", "x", "--engines", "ours", "--out", "y"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "unknown ours; there are jaxllm, vllm, transformers" in ran.stderr
