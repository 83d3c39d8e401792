"""LLM over a real engine with a scripted runner: whole results, streams, bad input in its place, aborts."""

import dataclasses
import gc
import io
import sys

import pytest
from helpers.scripted_engine import at_rest, saying, scripted_engine

from jaxllm.config import ConfigError, EngineConfig
from jaxllm.core import FinishReason, RequestError, SamplingParams
from jaxllm.llm import LLM, GenerationError

ANSWERS = {"one": "hello 🙂", "two": "world, the end", "three": "def f(): return 3"}


@pytest.fixture
def tokenizer(tokenizers_by_kind):
    return tokenizers_by_kind["byte_level"]


@pytest.fixture
def llm(tokenizer):
    made = LLM(engine=scripted_engine(tokenizer, saying(tokenizer, ANSWERS)))
    yield made
    assert at_rest(made.engine)
    assert made._outputs.num_requests == 0
    assert made._boxes == {}


def texts(outputs):
    return [output.outputs[0].text for output in outputs]


def user(content):
    return {"role": "user", "content": content}


# ---- whole results ----


def test_results_come_in_the_order_of_the_prompts(llm):
    outputs = llm.generate(["two", "one", "three"] * 3)
    assert texts(outputs) == [ANSWERS["two"], ANSWERS["one"], ANSWERS["three"]] * 3
    assert all(output.finished and output.error is None for output in outputs)
    assert {output.outputs[0].finish_reason for output in outputs} == {FinishReason.STOP}


def test_one_prompt_gives_a_list_of_one(llm, tokenizer):
    (output,) = llm.generate("one")
    assert output.outputs[0].text == "hello 🙂"
    assert output.prompt == "one"
    assert output.prompt_token_ids == tokenizer.encode("one")
    assert output.outputs[0].token_ids == [*tokenizer.encode("hello 🙂"), *tokenizer.eos_token_ids]
    assert output.timings.ttft_s >= 0


def test_a_prompt_may_be_text_ids_or_an_object(llm, tokenizer):
    ids = tokenizer.encode("two")
    assert texts(llm.generate(ids)) == [ANSWERS["two"]]
    assert texts(llm.generate({"prompt_token_ids": ids})) == [ANSWERS["two"]]
    outputs = llm.generate(["one", ids, {"prompt": "three"}, {"prompt": "shown", "prompt_token_ids": ids}])
    assert texts(outputs) == [ANSWERS["one"], ANSWERS["two"], ANSWERS["three"], ANSWERS["two"]]
    assert [output.prompt for output in outputs] == ["one", None, "three", "shown"]


def test_no_prompts_give_no_results(llm):
    assert llm.generate([]) == []


def test_params_are_one_for_all_or_one_each(llm):
    assert texts(llm.generate(["one", "two"], SamplingParams(stop="l"))) == ["he", "wor"]
    each = [SamplingParams(stop="o", max_tokens=50), SamplingParams(stop="the", max_tokens=50)]
    assert texts(llm.generate(["one", "two"], each)) == ["hell", "world, "]
    with pytest.raises(RequestError, match="params = '2 entries': must be one, or one for each of the 3 prompts"):
        llm.generate(["one", "two", "three"], each)


def test_without_params_the_models_own_suggestions_hold(tokenizer):
    suggested = SamplingParams(stop="l", max_tokens=50)
    engine = scripted_engine(tokenizer, saying(tokenizer, ANSWERS), default_params=suggested)
    assert texts(LLM(engine=engine).generate("one")) == ["he"]


def test_a_stop_string_finishes_the_sequence_in_the_engine(llm):
    (output,) = llm.generate("three", SamplingParams(stop=["return"], max_tokens=50))
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("def f(): ", "return")
    assert llm.engine.scheduler.metrics.finished[FinishReason.STOP] == 1


def test_n_completions_and_log_probabilities(llm, tokenizer):
    (output,) = llm.generate("one", SamplingParams(n=3, logprobs=2, prompt_logprobs=1, max_tokens=50))
    assert [one.index for one in output.outputs] == [0, 1, 2]
    assert texts([output]) == ["hello 🙂"]
    first = output.outputs[0]
    assert [lp.token_id for lp in first.logprobs] == first.token_ids
    assert all(len(lp.top) == 2 for lp in first.logprobs)
    assert first.cumulative_logprob == sum(lp.logprob for lp in first.logprobs)
    assert len(output.prompt_logprobs) == len(tokenizer.encode("one"))
    assert output.prompt_logprobs[0] is None


def test_a_repeated_prompt_is_found_in_the_prefix_cache(llm):
    prompt = "The quick brown fox jumps over the lazy dog. one"
    assert llm.generate(prompt)[0].num_cached_tokens == 0
    assert llm.generate(prompt)[0].num_cached_tokens > 0
    assert llm.generate(prompt, cache_salt="other tenant")[0].num_cached_tokens == 0
    assert llm.generate({"prompt": prompt, "cache_salt": "third"})[0].num_cached_tokens == 0


# ---- bad input ----


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt = '': must hold at least one token"),
        ({"prompt_token_ids": []}, "must hold at least one token"),
        ([100_000], "prompt = 100000: token ids must be integers in"),
        ([1, "a"], "prompt = 'a': token ids must be integers"),
        ({"text": "a"}, "must hold `prompt` or `prompt_token_ids`"),
        ({"prompt": "a", "temperature": 1}, "must hold `prompt` or `prompt_token_ids`"),
        ({"prompt": 5}, "prompt = 5: must be a text or a list of token ids"),
        ("word " * 400, "must have at most 255 tokens"),
        ("a\ud800", "lone surrogate at character 1"),
        (b"bytes", "prompts = b'bytes': must be a text, token ids"),
    ],
)
def test_a_bad_prompt_alone_raises(llm, prompt, message):
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt)


def test_a_bad_prompt_among_others_fails_alone_in_its_place(llm, tokenizer):
    outputs = llm.generate(["one", "", [100_000], "two", None], SamplingParams(max_tokens=50))
    assert texts(outputs) == [ANSWERS["one"], "", "", ANSWERS["two"], ""]
    assert [output.error is None for output in outputs] == [True, False, False, True, False]
    bad = outputs[2]
    assert bad.error == f"prompt = 100000: token ids must be integers in [0, {tokenizer.vocab_size - 1}]"
    assert (bad.finished, bad.outputs[0].finish_reason) == (True, FinishReason.ERROR)


def test_bad_params_of_one_prompt_fail_that_prompt_alone(llm):
    params = [SamplingParams(max_tokens=50), SamplingParams(stop_token_ids=[100_000])]
    outputs = llm.generate(["one", "two"], params)
    assert outputs[0].outputs[0].text == ANSWERS["one"]
    assert outputs[1].error.startswith("stop_token_ids = 100000")


def failing(tokenizer):
    good = saying(tokenizer, ANSWERS)

    def say(sequence):
        ids = good(sequence)
        return ids if "one" in tokenizer.decode(sequence.request.prompt_token_ids) else [*ids[:2], "not finite"]

    return scripted_engine(tokenizer, say)


def test_a_request_that_fails_on_the_way_carries_its_error_and_the_others_finish(tokenizer):
    llm = LLM(engine=failing(tokenizer))
    outputs = llm.generate(["two", "one"])
    assert outputs[0].error == "not finite"
    assert len(outputs[0].outputs[0].token_ids) == 2
    assert outputs[1].outputs[0].text == ANSWERS["one"]
    assert at_rest(llm.engine)


def test_a_request_alone_that_fails_on_the_way_raises_with_what_it_had(tokenizer):
    with pytest.raises(GenerationError, match="not finite") as caught:
        LLM(engine=failing(tokenizer)).generate("two")
    assert len(caught.value.output.outputs[0].token_ids) == 2


@pytest.mark.parametrize("theirs", [False, True])
def test_no_collection_looks_at_old_objects_while_it_generates(llm, monkeypatch, theirs):
    step, frozen = llm.engine.step, []
    monkeypatch.setattr(llm.engine, "step", lambda: frozen.append(gc.get_freeze_count()) or step())
    if theirs:
        gc.freeze()
    try:
        llm.generate(["a", "b"], SamplingParams(max_tokens=3))
        assert min(frozen) > 10_000
        assert (gc.get_freeze_count() > 0) == theirs
    finally:
        gc.unfreeze()


def test_an_interruption_takes_every_request_back(llm, monkeypatch):
    def interrupted(plan):
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.runner, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["one", "two"])
    llm.engine.check()
    assert not llm.engine.has_work


# ---- chat ----


def test_a_conversation_is_answered(llm):
    (output,) = llm.chat([user("one")], template_args={"enable_thinking": False})
    assert output.outputs[0].text == "?"  # the prompt ends in the assistant's header
    assert output.prompt == "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"


def test_many_conversations_are_answered_and_a_bad_one_fails_alone(llm):
    outputs = llm.chat([[user("one")], [{"role": "wizard", "content": "x"}], []], add_generation_prompt=False)
    assert [output.error is None for output in outputs] == [True, False, False]
    assert "messages[0].role = 'wizard'" in outputs[1].error
    assert "must be a list of at least one message" in outputs[2].error


def test_a_bad_conversation_alone_raises(llm):
    with pytest.raises(RequestError, match=r"messages\[0\].content must be text"):
        llm.chat([{"role": "user"}])
    with pytest.raises(RequestError, match="at least one message"):
        llm.chat([])


def test_a_model_without_a_tokenizer_takes_ids_and_refuses_chats(tokenizer):
    scripted = scripted_engine(tokenizer, saying(tokenizer, ANSWERS))
    llm = LLM(engine=dataclasses.replace(scripted, tokenizer=None))
    (output,) = llm.generate([5, 6])
    assert output.outputs[0].text == ""
    assert output.outputs[0].token_ids
    for call in (lambda: llm.chat([user("a")]), lambda: llm.stream_chat([user("a")])):
        with pytest.raises(RequestError, match="the model has no tokenizer"):
            call()


# ---- streams ----


def test_a_stream_gives_deltas_that_join_to_the_whole(llm):
    deltas = list(llm.stream("two", SamplingParams(max_tokens=50), request_id="mine"))
    assert "".join(texts(deltas)) == ANSWERS["two"]
    assert {delta.request_id for delta in deltas} == {"mine"}
    assert [delta.finished for delta in deltas].index(True) == len(deltas) - 1
    assert deltas[-1].outputs[0].finish_reason is FinishReason.STOP


def test_a_streamed_chat_is_the_chat(llm):
    (whole,) = llm.chat([user("one")])
    assert "".join(texts(llm.stream_chat([user("one")]))) == whole.outputs[0].text


def test_streams_and_generate_may_be_interleaved(llm):
    first, second = llm.stream("one"), llm.stream("two")
    heard = [next(first), next(second), next(first)]
    whole = llm.generate(["three", "two"])
    assert texts(whole) == [ANSWERS["three"], ANSWERS["two"]]
    assert "".join(texts([heard[0], heard[2], *first])) == ANSWERS["one"]
    assert "".join(texts([heard[1], *second])) == ANSWERS["two"]


def test_a_bad_stream_raises_before_anything_runs(llm):
    with pytest.raises(RequestError, match="at least one token"):
        llm.stream("")
    with pytest.raises(RequestError, match="must be a list of at least one"):
        llm.stream_chat([])


def test_closing_a_stream_aborts_its_request(llm):
    stream = llm.stream("two")
    next(stream)
    assert llm.engine.has_work
    stream.close()
    assert not llm.engine.has_work
    assert llm.engine.scheduler.metrics.finished[FinishReason.ABORT] == 1


def test_a_stream_that_was_never_read_leaves_nothing(llm):
    llm.stream("two").close()
    assert not llm.engine.has_work


def test_an_abort_ends_the_stream_with_an_aborted_delta(llm):
    stream = llm.stream("two", request_id="mine")
    next(stream)
    llm.abort("mine")
    (last,) = stream
    assert (last.finished, last.outputs[0].finish_reason) == (True, FinishReason.ABORT)
    llm.abort("mine")
    llm.abort("unknown")


def test_an_abort_from_a_streams_consumer_reaches_a_waiting_stream(llm):
    first, second = llm.stream("three", request_id="first"), llm.stream("one", request_id="second")
    next(first), next(second)
    for _ in second:
        llm.abort("first")
    assert [delta.outputs[0].finish_reason for delta in first][-1] is FinishReason.ABORT


def test_an_id_in_use_is_refused(llm):
    stream = llm.stream("two", request_id="mine")
    next(stream)
    with pytest.raises(RequestError, match="already in use"):
        next(llm.stream("one", request_id="mine"))
    assert "".join(texts(stream)) != ""


def test_a_failed_stream_says_so_in_its_last_delta(tokenizer):
    *_, last = LLM(engine=failing(tokenizer)).stream("two")
    assert (last.finished, last.error) == (True, "not finite")


# ---- progress and construction ----


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_progress_bar_shows_on_a_terminal_only(llm, monkeypatch):
    for stream, wanted, shown in ((Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        llm.generate(["one", "two"], use_tqdm=wanted)
        assert ("2/2" in stream.getvalue()) == shown


def test_an_engine_and_settings_exclude_each_other(llm):
    with pytest.raises(ConfigError, match="either an engine or the settings"):
        LLM("model", engine=llm.engine)
    with pytest.raises(ConfigError, match="leaves no room for further settings"):
        LLM(config=EngineConfig(), seed=3)


def test_a_wrong_path_or_setting_is_one_clear_error():
    with pytest.raises(ConfigError, match="model = 'nowhere': no such directory"):
        LLM("nowhere")
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        LLM("nowhere", max_num_seq=3)
