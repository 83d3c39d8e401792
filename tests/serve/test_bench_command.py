"""jaxllm bench and jaxllm profile, through the command, with a tiny random model on this CPU."""

import json
import re

import pytest

from jaxllm.config import ConfigError
from serve import cli
from serve.commands.bench import numbers, process_age_s, with_defaults

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
SMALL = [
    *("--set", "max_num_batched_tokens=32", "--set", "token_buckets=[32]", "--set", "decode_buckets=[2]"),
    *("--set", "max_num_seqs=2"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    return str(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled once for all of these tests; their shapes are the same."""
    return f"cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture
def jaxllm(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


def test_latency_is_a_table_and_json(jaxllm, model, cache, tmp_path):
    out = tmp_path / "deep" / "figures.json"
    where = ["--set", cache, "--out", str(out), "--label", "abc1234"]
    what = ["--batch", "1,2", "--context", "16", "--prefill", "8", "--repeats", "1"]
    code, printed, told = jaxllm("bench", "latency", model, *what, *SMALL, *where)
    assert code == 0
    assert "exposed host, ms" in printed.splitlines()[0]
    assert [line.split("|")[1:3] for line in printed.splitlines()[2:]] == [
        [" decode step ", " batch 1, context 16 "],
        [" decode step ", " batch 2, context 16 "],
        [" prefill, one prompt ", " 8 tokens "],
    ]
    assert told.splitlines()[0].startswith("decode step, batch 1, context 16: ")
    document = json.loads(out.read_text())
    assert (document["device"], document["commit"]) == ("cpu", "abc1234")
    assert document["compiles_after_ready"] == 0
    assert told.splitlines()[-1] == "compiles after ready: 0"
    assert [figure["unit"] for figure in document["figures"]] == ["ms"] * 3
    assert document["seconds"] + 0.1 >= document["first_token_s"] >= document["ready_s"]
    assert document["ready_s"] > document["start_phases_s"]["compile"] > 0


def test_throughput_of_a_small_workload(jaxllm, model, cache):
    what = ["--requests", "3", "--shortest", "2", "--most", "6", "--repeats", "2"]
    code, printed, _ = jaxllm("bench", "throughput", model, *what, *SMALL, "--set", cache)
    assert code == 0
    assert "| throughput | 3 requests, 2..6 in and out, " in printed
    assert " tok/s | " in printed


def test_a_known_prefix_is_told_beside_a_new_one(jaxllm, model, cache):
    code, printed, told = jaxllm("bench", "prefix", model, "--shared", "96", "--repeats", "2", *SMALL, "--set", cache)
    assert code == 0
    assert [line.split("|")[1:3] for line in printed.splitlines()[2:]] == [
        [" first token, new prefix ", " 96 tokens shared, 32 its own "],
        [" first token, known prefix ", " 96 tokens shared, 32 its own "],
    ]
    assert "times shorter" in printed.splitlines()[0]
    off = ("--set", "prefix_cache=false")
    code, _, told = jaxllm("bench", "prefix", model, "--shared", "96", "--repeats", "1", *SMALL, "--set", cache, *off)
    assert code == 1
    assert "0 of 96 tokens were cached: is prefix_cache on?" in told


def test_start_up_is_told_by_phase_cold_and_warm(jaxllm, model):
    code, printed, _ = jaxllm("bench", "startup", model, *SMALL)
    assert code == 0
    head, _, cold, warm = printed.splitlines()
    assert all(f" {phase}, s |" in head for phase in ("imports", "weights", "compile", "warm-up", "first token"))
    seconds = [float(line.split("|")[3].split()[0]) for line in (cold, warm)]
    assert 0 < seconds[1] < seconds[0]


def test_a_profile_names_the_models_scopes(jaxllm, model, cache, tmp_path):
    what = ["--batch", "2", "--context", "8", "--steps", "4", "--trace", str(tmp_path / "trace")]
    code, printed, told = jaxllm("profile", model, *what, *SMALL, "--set", cache)
    assert code == 0
    scopes = {line.split("|")[1].strip() for line in printed.splitlines()[2:]}
    assert {"attention", "attention/decode_attention", "logits", "all"} <= scopes, scopes
    assert any("mlp" in scope for scope in scopes)
    assert re.match(r"[45] steps, (8|10) tokens; trace in ", told)
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("latency", "--batch", "1,x"), "error: '1,x': must be a list of integers >= 1, such as 1,8,32"),
        (("latency", "--context", "0"), "error: '0': must be a list of integers >= 1"),
        (
            ("latency", "--context", "400", "--prefill", ""),
            "error: this needs 656 tokens a request; the model's context is 512",
        ),
        (("throughput", "--shortest", "9", "--most", "8"), "error: --shortest 9: must be at most --most 8"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_code_2(jaxllm, model, arguments, message):
    verb, *options = arguments
    code, out, err = jaxllm("bench", verb, model, *options)
    assert (code, out) == (2, "")
    assert err.startswith(message)


def test_numbers_are_read_from_a_list():
    assert numbers("1,8, 32") == [1, 8, 32]
    assert numbers("") == []
    with pytest.raises(ConfigError):
        numbers("1;2")


def test_what_a_bench_needs_gives_way_to_what_was_set_under_any_name_and_to_a_recipe(model, tmp_path):
    wanted = {"prefix_cache": False, "max_num_seqs": 8}
    given = ["enable-prefix-caching=true"]
    assert with_defaults(model, None, given, **wanted) == ["max_num_seqs=8", 'load_format="dummy"', *given]
    assert with_defaults(model, tmp_path / "recipe.toml", given, **wanted) == given


def test_a_model_with_weights_keeps_them():
    assert with_defaults(None, None, None, max_num_seqs=8) == ["max_num_seqs=8"]


def test_a_process_knows_its_age():
    assert 0 < process_age_s() < 86_400
