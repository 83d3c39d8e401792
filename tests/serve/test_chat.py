"""A conversation in the terminal: what is remembered, forgotten and kept when an answer is stopped or fails."""

import io
import os
import signal

import pytest
from helpers.scripted_engine import at_rest, saying, scripted_engine

from jaxllm.core import SamplingParams
from jaxllm.llm import LLM
from serve.chat import Conversation, repl

PARAMS = SamplingParams(max_tokens=50)


@pytest.fixture
def tokenizer(tokenizers_by_kind):
    return tokenizers_by_kind["byte_level"]


def conversation(tokenizer, say, **kwargs):
    return Conversation(LLM(engine=scripted_engine(tokenizer, say)), PARAMS, **kwargs)


def talk(made, *lines, stats=False):
    out, err = io.StringIO(), io.StringIO()
    good = repl(made, lines, out, err, stats=stats)
    assert at_rest(made.llm.engine)
    return good, out.getvalue(), err.getvalue()


def test_the_model_sees_everything_said_so_far(tokenizer):
    prompts = []

    def say(sequence):
        if sequence.num_output + sequence.num_pending == 1:
            prompts.append(tokenizer.decode(sequence.request.prompt_token_ids, skip_special_tokens=False))
        return saying(tokenizer, "fine")(sequence)

    made = conversation(tokenizer, say, system="Be brief.")
    assert talk(made, "one", "two") == (True, "fine\nfine\n", "")
    assert [(message["role"], message["content"]) for message in made.messages] == [
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", "fine"),
        ("user", "two"),
        ("assistant", "fine"),
    ]
    assert "Be brief." in prompts[1]
    assert "one<|im_end|>\n<|im_start|>assistant\nfine" in prompts[1]


def test_reset_forgets_all_but_the_system_message(tokenizer):
    made = conversation(tokenizer, saying(tokenizer, "fine"), system="Be brief.")
    talk(made, "one", "/reset")
    assert made.messages == [{"role": "system", "content": "Be brief."}]


def test_help_and_empty_lines_ask_nothing(tokenizer):
    made = conversation(tokenizer, saying(tokenizer, "fine"))
    good, out, err = talk(made, "", "  ", "/help", "/quit", "never asked")
    assert (good, out) == (True, "")
    assert err.startswith("/reset forgets")


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(tokenizer):
    def say(sequence):
        if sequence.num_output == 1 and "stop me" in tokenizer.decode(sequence.request.prompt_token_ids[-30:]):
            os.kill(os.getpid(), signal.SIGINT)
        return saying(tokenizer, "hello world the end")(sequence)

    made = conversation(tokenizer, say)
    good, out, err = talk(made, "stop me", stats=True)
    said = made.messages[-1]["content"]
    assert good
    assert 0 < len(said) < len("hello world the end")
    assert out == said + "\n"
    assert err.startswith("[stopped; 2 tokens")


def test_a_second_ctrl_c_breaks_in_and_the_request_is_taken_back(tokenizer):
    def say(sequence):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return saying(tokenizer, "hello")(sequence)

    made = conversation(tokenizer, say)
    with pytest.raises(KeyboardInterrupt):
        repl(made, ["one"], io.StringIO(), io.StringIO(), stats=False)
    assert not made.llm.engine.has_work
    assert made.messages == []


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(tokenizer):
    made = conversation(tokenizer, lambda sequence: ["not finite"])
    assert talk(made, "one") == (False, "\n", "error: not finite\n")
    assert made.messages == []
