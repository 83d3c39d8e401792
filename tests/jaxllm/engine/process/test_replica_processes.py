"""From one config to a process a replica: who decides, what each is told and sees, and what they say together."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.config import ConfigError, load
from jaxllm.core import SamplingParams
from jaxllm.engine.messages import Beat, Reply
from jaxllm.engine.process import choice, merge, replicas
from jaxllm.engine.process.choice import in_processes
from jaxllm.engine.process.replicas import fleet, one_replica
from jaxllm.llm import LLM
from sharding.axes import MeshError

ROOT = Path(__file__).parents[4]
SMALL = {"model": "first-light-draft", "max_num_seqs": 2, "decode_buckets": [2], "max_num_batched_tokens": 64}
SMALL |= {"token_buckets": [64], "num_pages": 32, "max_model_len": 256}
PROMPTS = ["def add(a, b):\n", "import os\n", "class Tree:\n", "The quick"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
CHILD = """
import json, sys
from jaxllm.core import GrammarKind, GrammarSpec, RequestError, SamplingParams
from jaxllm.llm import LLM

settings, prompts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
llm = LLM(**settings, data=2, data_processes=True)
greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
outputs = llm.generate([*prompts, list(range(50)) * 5 + [5] * 10], greedy)
try:
    llm.generate("x", greedy.replace(grammar=GrammarSpec(GrammarKind.REGEX, "(")))
    refused = None
except RequestError as error:
    refused = error.field
digits = llm.generate("A number: ", greedy.replace(grammar=GrammarSpec(GrammarKind.REGEX, "[0-9]{3}")))
print(json.dumps({
    "tokens": [output.outputs[0].token_ids for output in outputs],
    "texts": [output.outputs[0].text for output in outputs],
    "errors": [output.error for output in outputs],
    "refused": refused,
    "digits": digits[0].outputs[0].text,
    "device": llm.report.device_kind,
    "phases": sorted(llm.report.seconds),
    "generated": llm.engine.control("check")["generated_tokens"],
    "jax": "jax" in sys.modules,
}))
"""


def test_llm_over_processes_says_what_one_engine_says_and_leaves_jax_to_them():
    command = [sys.executable, "-c", CHILD, json.dumps(SMALL), json.dumps(PROMPTS)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    alone = [output.outputs[0] for output in LLM(**SMALL).generate(PROMPTS, GREEDY)]
    assert found["tokens"][:4] == [output.token_ids for output in alone]
    assert found["texts"][:4] == [output.text for output in alone]
    assert found["errors"][:4] == [None] * 4
    assert "must have at most 255 tokens" in found["errors"][4]
    assert found["refused"] == "response_format"
    assert found["digits"].isdigit()
    assert (found["device"], found["jax"]) == ("cpu", False)
    assert {"weights", "compile", "warm-up"} <= set(found["phases"])
    assert found["generated"] >= 4 * 12 + 3


# ---- what each is told ----


def test_each_process_gets_one_replica_a_share_of_the_cores_and_the_first_the_faults(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    config = load(**SMALL, data=4, tp=2, fault="step:3:raise=1")
    each = [one_replica(config, number) for number in range(4)]
    assert [str(one.mesh) for one in each] == ["tp2"] * 4
    assert [one.compile.threads for one in each] == [16] * 4
    assert [one.fault for one in each] == ["step:3:raise=1", "", "", ""]
    assert one_replica(load(**SMALL, data=4, threads=3), 0).compile.threads == 3
    assert load(environ={}, **dataclasses.asdict(each[1])) == each[1], "as it crosses to the process"


@pytest.mark.parametrize(
    ("wanted", "gpus", "data", "found"),
    [("auto", 4, 4, True), ("auto", 0, 4, False), (False, 4, 4, False), (True, 0, 4, True), (True, 4, 1, False)],
)
def test_replicas_are_processes_on_gpus_or_where_it_is_said(monkeypatch, wanted, gpus, data, found):
    monkeypatch.setattr(choice, "runs_on_gpus", lambda: gpus > 0)
    assert in_processes(load(**SMALL, data=data, data_processes=wanted)) is found


def test_a_setting_that_is_neither_is_refused():
    with pytest.raises(MeshError, match="must be true, false or auto"):
        load(**SMALL, data=2, data_processes="maybe")


def seen(config):
    found = fleet(config)
    found.close()
    return [link.environment and link.environment["CUDA_VISIBLE_DEVICES"] for link in found.links]


def test_each_process_sees_gpus_of_its_own_among_those_this_one_was_given(monkeypatch):
    monkeypatch.setattr(replicas, "gpus_here", lambda: 4)
    monkeypatch.setattr(replicas, "runs_on_gpus", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert seen(load(**SMALL, data=2, tp=2)) == ["0,1", "2,3"]
    with pytest.raises(ConfigError, match=r"4 replicas x 2 GPUs = 8, of 4 here"):
        fleet(load(**SMALL, data=4, tp=2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7f, GPU-03,GPU-aa")
    assert seen(load(**SMALL, data=3)) == ["GPU-7f", "GPU-03", "GPU-aa"]
    with pytest.raises(ConfigError, match="names 3"):
        fleet(load(**SMALL, data=4))
    monkeypatch.setattr(replicas, "runs_on_gpus", lambda: False)
    assert seen(load(**SMALL, data=4)) == [None] * 4, "hidden, or JAX is told to use others"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(replicas, "gpus_here", lambda: 0)
    assert seen(load(**SMALL, data=2)) == ["0", "1"], "should they be there and not be found"


def test_a_model_that_is_not_there_is_told_at_once():
    with pytest.raises(ConfigError, match="no such directory"):
        LLM("/nowhere/at/all", data=2, data_processes=True)


# ---- what they say together ----


def test_beats_add_up_and_the_worst_state_is_that_of_all():
    quick = Beat(0.0, False, False, {"steps": 3, "expert_imbalance": 1.5, "compiles_after_ready": 1})
    slow = Beat(2.5, False, True, {"steps": 4, "expert_imbalance": 1.25, "compiles_after_ready": 1, "held_pages": 7})
    found = merge.beat([quick, slow], {"steps": 10}, silent_s=0.0)
    assert found.stats == {"steps": 17, "expert_imbalance": 1.5, "compiles_after_ready": 1, "held_pages": 7}
    assert (found.stalled_s, found.paused, found.sick, found.asleep) == (2.5, False, True, False)
    assert merge.beat([quick], {}, silent_s=9.0).stalled_s == 9.0
    assert merge.counters(slow.stats) == {"steps": 4, "compiles_after_ready": 1}


@pytest.mark.parametrize(
    ("operation", "values", "answer"),
    [
        ("reset_prefix_cache", [{"evicted_pages": 3}, {"evicted_pages": 4}], {"evicted_pages": 7}),
        ("sleep", [{"asleep": True, "level": 2}] * 2, {"asleep": True, "level": 2}),
        ("stop_profile", [{"directory": "/a"}, {"directory": "/b"}], {"directory": "/a, /b"}),
        ("rebalance_experts", [{"imbalance": 2.0, "layers": 1}, {"imbalance": 1.0, "layers": 2}],
         {"imbalance": 2.0, "layers": 3}),
        ("check", [{"steps": 1}, {"steps": 2}], {"steps": 3, "replicas_serving": 2}),
        ("embed", [[0.5, 0.25]], [0.5, 0.25]),
    ],
)  # fmt: skip
def test_an_operations_answers_become_one(operation, values, answer):
    found = merge.reply(5, operation, [Reply(5, value) for value in values], {"replicas_serving": 2})
    assert (found.id, found.value, found.error) == (5, answer, None)


def test_one_replicas_error_is_the_answer():
    assert merge.reply(5, "pause", [Reply(5, 1), Reply(5, error="asleep: no")], {}) == Reply(5, error="asleep: no")
