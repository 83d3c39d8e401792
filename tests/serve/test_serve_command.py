"""`jaxllm serve`: what its flags mean, and what it says when they are wrong; no server is started here."""

import tomllib

import pytest
import typer
from typer.testing import CliRunner

from jaxllm.config import ConfigError
from jaxllm.core import SamplingParams
from jaxllm.engine.faults import Fault, parse_faults
from jaxllm.engine.messages import Ready
from serve.commands.serve import command, front_settings, read_keys, size, start_lines
from serve.settings import FrontSettings, hash_key

app = typer.Typer(pretty_exceptions_enable=False)
app.command("serve")(command)


def invoke(*arguments, environ=None):
    done = CliRunner().invoke(app, arguments, env={"JAXLLM_API_KEY": None, **(environ or {})})
    return done.exit_code, done.output


@pytest.mark.parametrize(("text", "value"), [("4096", 4096), ("32k", 32_000), ("32K", 32_768), ("1.5m", 1_500_000)])
def test_sizes_are_read_as_vllm_reads_them(text, value):
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "k", "-1", "3x", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(typer.BadParameter):
        size(text)


def test_vllms_and_sglangs_spellings_mean_the_same():
    vllm = invoke("--print-config", "--max-model-len", "2k", "--max-num-seqs", "7", "--gpu-memory-utilization", "0.5")
    sglang = invoke(
        "--print-config", "--context-length", "2k", "--max-running-requests", "7", "--mem-fraction-static", "0.5"
    )
    assert vllm == sglang
    printed = tomllib.loads(vllm[1])
    assert printed["model"]["max_model_len"] == 2000
    assert printed["scheduler"]["max_num_seqs"] == 7
    assert printed["cache"]["memory_fraction"] == 0.5
    assert printed["server"]["host"] == "127.0.0.1"


def test_a_flag_beats_the_recipe_and_the_recipe_the_defaults(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("max_num_seqs = 3\n[server]\nport = 9000\nmax_queue = 5\n")
    code, printed = invoke("-c", str(recipe), "--port", "9001", "--print-config")
    settings = tomllib.loads(printed)
    assert code == 0
    assert (settings["server"]["port"], settings["server"]["max_queue"]) == (9001, 5)
    assert settings["scheduler"]["max_num_seqs"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/no/such/model"], "no such directory"),
        (["--max-num-seqs", "99k"], "max_num_seqs"),
        (["--dtype", "int3"], "dtype"),
        (["-c", "/no/recipe.toml"], "config file"),
        (["--api-key", ""], "must not be empty"),
        (["--api-key-file", "/no/keys"], "not readable"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_1(arguments, said):
    code, output = invoke(*arguments)
    assert code == 1
    assert said in output
    assert "Traceback" not in output
    assert len(output.strip().splitlines()) == 1


def test_an_unknown_setting_of_the_recipe_is_named():
    with pytest.raises(ConfigError, match="unknown setting 'prot'"):
        front_settings({"prot": 1}, {}, "m", {})
    with pytest.raises(ConfigError, match="unknown setting 'keys'"):
        front_settings({"keys": ["plain"]}, {}, "m", {})


def test_keys_come_from_flags_and_files_else_from_the_environment_and_are_never_printed(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one\n\ntwo\n")
    assert read_keys(["three"], file, "four") == tuple(map(hash_key, ["three", "one", "two"]))
    assert read_keys(None, None, "four") == (hash_key("four"),)
    assert read_keys(None, None) == ()
    printed = invoke("--print-config", "--api-key", "hunter2", environ={"JAXLLM_API_KEY": "hunter3"})[1]
    assert "hunter" not in printed
    assert "# 1 keys" in printed


def test_the_start_says_four_facts_and_ends_with_a_curl_to_paste():
    facts = {"weights_bytes": 2**30, "cache_bytes": 2**31, "seconds": {"weights": 1.5, "compile": 2.0}, "total_s": 2.4}
    ready = Ready(1000, 64, 8000, 100, (), None, SamplingParams(), facts)
    lines = start_lines(ready, FrontSettings(model_names=("m",)), "http://127.0.0.1:8000")
    assert lines[0] == "Model loading took 1.00 GiB memory and 2.4 s (weights 1.5 s, compile 2.0 s)"
    assert lines[1] == "KV cache: 2.00 GiB, 8,000 tokens"
    assert lines[2] == "Maximum concurrency for 1,000 tokens per request: 8.0x"
    assert "Serving m at http://127.0.0.1:8000" in lines[3]
    assert "curl http://127.0.0.1:8000/v1/chat/completions" in lines[3]


def test_faults_are_parsed_or_refused():
    assert parse_faults("step:37:nan_row=2, step:4:hang=0.5") == (Fault(37, "nan_row", 2), Fault(4, "hang", 0.5))
    assert parse_faults("") == ()
    for wrong in ("step:0:raise=1", "step:3:dance=1", "37:nan_row=2", "step:3:raise"):
        with pytest.raises(ConfigError, match="must be step:N:kind=value"):
            parse_faults(wrong)
