"""The jaxllm command: what it prints where, its exit codes, and that mistakes cost one line and no JAX."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from helpers.scripted_engine import at_rest, saying, scripted_engine

from jaxllm.llm import LLM
from serve import cli

ANSWERS = {"once": " upon a time", "assistant": "hello 🙂", "failing": "x"}


@pytest.fixture
def tokenizer(tokenizers_by_kind):
    return tokenizers_by_kind["byte_level"]


@pytest.fixture
def llm(tokenizer, monkeypatch):
    """What every verb opens, whatever model it is told."""
    made = LLM(engine=scripted_engine(tokenizer, saying(tokenizer, ANSWERS)))
    monkeypatch.setattr(cli, "open_llm", lambda model, config, settings: made)
    yield made
    assert at_rest(made.engine)


@pytest.fixture
def jaxllm(monkeypatch, capsys):
    """Runs the command in this process; gives exit code, stdout and stderr."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


class Terminal(io.StringIO):
    def isatty(self):
        return True


def process(*arguments, code=None):
    script = code or "from serve.cli import main; main()"
    ran = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout, ran.stderr


# ---- generate ----


def test_generate_prints_the_text_and_its_speed_on_stderr(llm, jaxllm):
    code, out, err = jaxllm("generate", "once")
    assert (code, out) == (0, " upon a time\n")
    assert err.rstrip().endswith("tok/s")
    assert "TTFT" in err


def test_generate_reads_the_prompt_from_a_pipe(llm, jaxllm):
    assert jaxllm("generate", "--quiet", stdin="once") == (0, " upon a time\n", "")


def test_generate_without_a_prompt_on_a_terminal_says_what_to_do(llm, jaxllm):
    code, out, err = jaxllm("generate", stdin=Terminal())
    assert (code, out, err) == (2, "", "error: no prompt: give one as an argument or pipe it in\n")


def test_generate_passes_its_options_on(llm, jaxllm):
    assert jaxllm("generate", "once", "-q", "--stop", "time", "--temperature", "0")[1] == " upon a \n"
    assert jaxllm("generate", "once", "-q", "--max-tokens", "2")[1] != " upon a time\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", "3"), "error: temperature = 3.0: must be a number in [0, 2]"),
        (("--max-tokens", "0"), "error: max_tokens = 0: must be an integer in [1, 2147483647]"),
        (("--top-p", "1.5"), "error: top_p = 1.5"),
        (("--stop", ""), "error: stop = '': every stop string must have"),
    ],
)
def test_a_parameter_out_of_range_is_one_line_and_code_2(jaxllm, arguments, message):
    code, out, err = jaxllm("generate", "once", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_an_empty_prompt_is_one_line_and_code_2(llm, jaxllm):
    code, _, err = jaxllm("generate", "")
    assert (code, err) == (2, "error: prompt = '': must hold at least one token (this model has no start token)\n")


def test_a_request_that_fails_is_one_line_and_code_1(tokenizer, jaxllm, monkeypatch):
    engine = scripted_engine(tokenizer, lambda sequence: ["logits are not finite"])
    monkeypatch.setattr(cli, "open_llm", lambda *_: LLM(engine=engine))
    assert jaxllm("generate", "once") == (1, "\n", "error: logits are not finite\n")


def interrupting(tokenizer, after, then):
    """A model whose answer is interrupted by ctrl-c while token `after` is computed."""

    def say(sequence):
        if sequence.num_output == after:
            os.kill(os.getpid(), signal.SIGINT)
        return saying(tokenizer, then)(sequence)

    return LLM(engine=scripted_engine(tokenizer, say))


def test_ctrl_c_stops_generate_keeps_its_text_and_takes_the_request_back(tokenizer, jaxllm, monkeypatch):
    llm = interrupting(tokenizer, 1, "hello world the end")
    monkeypatch.setattr(cli, "open_llm", lambda *_: llm)
    before = signal.getsignal(signal.SIGINT)
    code, out, err = jaxllm("generate", "once")
    assert code == 130
    assert "hello world the end".startswith(out.rstrip("\n"))
    assert err.startswith("2 tokens")
    assert at_rest(llm.engine)
    assert signal.getsignal(signal.SIGINT) is before


# ---- chat ----


def test_piped_lines_are_answered_one_by_one(llm, jaxllm):
    code, out, err = jaxllm("chat", stdin="first\n\nsecond\n")
    assert (code, out, err) == (0, "hello 🙂\nhello 🙂\n", "")


def test_quit_ends_and_lines_behind_it_are_not_answered(llm, jaxllm):
    assert jaxllm("chat", stdin="first\n/quit\nsecond\n")[1] == "hello 🙂\n"


def test_a_line_that_is_too_long_is_an_error_and_the_chat_goes_on(llm, jaxllm):
    code, out, err = jaxllm("chat", stdin="word " * 300 + "\nsecond\n")
    assert (code, out) == (1, "hello 🙂\n")
    assert err.startswith("error: prompt = ")


def test_on_a_terminal_it_prompts_and_shows_speed(llm, jaxllm, monkeypatch):
    typed = iter(["first"])
    prompts = []

    def type_a_line(prompt):
        prompts.append(prompt)
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_a_line)
    code, out, err = jaxllm("chat", "--system", "Be brief.", stdin=Terminal())
    assert (code, out) == (0, "hello 🙂\n\n")
    assert prompts == ["> ", "> "]
    assert err.startswith("/reset forgets")
    assert "tok/s]" in err


# ---- demo, env, version, help ----


def test_demo_answers_every_task_or_fails(llm, jaxllm, tokenizer, monkeypatch):
    code, out, err = jaxllm("demo")
    assert code == 1  # this model extracts no JSON
    assert err == "error: a task of the demo was not answered as it should be\n"
    json_speaker = LLM(engine=scripted_engine(tokenizer, saying(tokenizer, '{"name": "Maria"}')))
    monkeypatch.setattr(cli, "open_llm", lambda *_: json_speaker)
    code, out, err = jaxllm("demo")
    assert (code, err) == (0, "")
    assert out.count("tok/s") == 3


def test_env_prints_facts_as_text_or_json(jaxllm, monkeypatch):
    monkeypatch.setattr("jaxllm.tools.env._devices", lambda: {"backend": "cpu"})
    code, out, _ = jaxllm("env", "--model", "nowhere")
    assert code == 0
    assert "backend:" in out
    code, out, _ = jaxllm("env", "--model", "nowhere", "--json")
    assert "no such directory" in json.loads(out)["model"]["error"]


def test_version_and_help_answer(jaxllm):
    assert jaxllm("--version")[1].startswith("jaxllm ")
    for verb in ((), ("generate",), ("chat",), ("demo",), ("env",)):
        code, out, _ = jaxllm(*verb, "--help")
        assert code == 0
        assert "Usage:" in out


def test_help_and_mistakes_import_no_jax():
    script = (
        "import sys\nfrom serve.cli import main\n"
        "try:\n    main()\nfinally:\n    print('jax' in sys.modules, 'tokenizers' in sys.modules, file=sys.stderr)"
    )
    code, out, err = process("--help", code=script)
    assert (code, err) == (0, "False False\n")
    assert "generate" in out
    code, _, err = process("generate", "hi", "--model", "nowhere", code=script)
    assert code == 2
    assert "no such directory" in err
    assert err.splitlines()[-1].startswith("False")


# ---- opening a model ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nowhere"), "error: model = 'nowhere': no such directory"),
        (("--config", "nowhere.toml"), "error: config file 'nowhere.toml': No such file or directory"),
        (("--set", "max_num_seq=3"), "error: unknown setting 'max_num_seq' (did you mean 'max_num_seqs'?)"),
        (("--set", "max_num_seqs"), "error: --set 'max_num_seqs': must be NAME=VALUE"),
        (("--set", "max-num-seqs=x"), "error: scheduler.max_num_seqs = 'x': must be an integer"),
        (("--set", "prefix_cache=false", "--set", "dtype=int8"), "error: model.dtype = 'int8'"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line_and_code_2(jaxllm, arguments, message):
    code, out, err = jaxllm("generate", "once", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_an_unknown_option_or_verb_is_code_2(jaxllm):
    assert jaxllm("generate", "once", "--bogus")[0] == 2
    assert jaxllm("bogus")[0] == 2


def test_settings_are_read_as_toml_where_they_are():
    given = ["max-num-seqs=8", "prefix_cache=false", "memory_fraction=0.5", "dtype=float32", "decode_buckets=[1, 8]"]
    assert cli._settings(given) == {
        "max_num_seqs": 8,
        "prefix_cache": False,
        "memory_fraction": 0.5,
        "dtype": "float32",
        "decode_buckets": [1, 8],
    }


def test_the_module_runs_as_a_program():
    ran = subprocess.run([sys.executable, "-m", "serve.cli", "--version"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("jaxllm ")
