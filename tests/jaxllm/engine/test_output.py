"""From tokens to what a user reads: text, endings, log-probabilities, deltas and faults of one request alone."""

import subprocess
import sys

import pytest
from helpers.requests import request

from jaxllm.core import FinishReason, RequestTimings, Sequence, TokenLogprobs, TokenOutput
from jaxllm.engine.output import OutputProcessor, speed


@pytest.fixture
def tokenizer(tokenizers_by_kind):
    return tokenizers_by_kind["byte_level"]


class Stage:
    """One request followed by a processor, played a token at a time as an engine would."""

    def __init__(self, tokenizer, *, stream=False, prompt="hi", **params):
        self.processor = OutputProcessor(tokenizer)
        self.request = request(prompt=tokenizer.encode(prompt), eos=tokenizer.eos_token_ids, max_tokens=99, **params)
        self.processor.add(self.request, prompt=prompt, stream=stream)
        self.sequences = [Sequence(self.request, index) for index in range(self.request.params.n)]
        self.updates, self.ended = [], []

    def play(self, ids, reason=None, *, index=0, stop_reason=None, logprobs=(), error=None):
        """The ids one step each; the last one ends the sequence if there is a reason."""
        sequence = self.sequences[index]
        for place, token in enumerate(ids):
            last = place == len(ids) - 1
            sequence.tokens.append(token)
            sequence.stop_reason = stop_reason if last else None
            news = TokenOutput(
                sequence,
                token,
                logprobs[place] if logprobs else None,
                finish_reason=reason if last else None,
                error=error if last else None,
            )
            self.step(news)
        return self

    def step(self, *news):
        processed = self.processor.process(list(news))
        self.updates += processed.updates
        self.ended += processed.ended

    @property
    def only(self):
        (update,) = self.updates
        assert update.finished
        return update.outputs[0]


def test_a_request_that_is_not_streamed_gives_one_whole_update_at_its_end(tokenizer):
    ids = tokenizer.encode("hello 🙂 world")
    stage = Stage(tokenizer).play(ids, FinishReason.LENGTH)
    assert (stage.only.text, stage.only.token_ids) == ("hello 🙂 world", ids)
    assert stage.only.finish_reason is FinishReason.LENGTH
    assert stage.updates[0].prompt == "hi"
    assert stage.updates[0].prompt_token_ids == tokenizer.encode("hi")
    assert stage.processor.num_requests == 0


def test_deltas_join_to_the_whole(tokenizer):
    ids = tokenizer.encode("hello 🙂 world, the end")
    stage = Stage(tokenizer, stream=True, stop=["the ende"]).play(ids, FinishReason.LENGTH)
    assert "".join(update.outputs[0].text for update in stage.updates) == "hello 🙂 world, the end"
    assert [token for update in stage.updates for token in update.outputs[0].token_ids] == ids
    assert [update.finished for update in stage.updates] == [False] * (len(ids) - 1) + [True]
    assert [update.outputs[0].finish_reason for update in stage.updates][-2:] == [None, FinishReason.LENGTH]


def test_a_stop_string_cuts_the_text_and_tells_the_engine(tokenizer):
    ids = tokenizer.encode("hello world. The END of it")
    stage = Stage(tokenizer, stop=["nowhere", " END"]).play(ids)
    assert stage.only.text == "hello world. The"
    assert (stage.only.finish_reason, stage.only.stop_reason) == (FinishReason.STOP, " END")
    assert stage.only.token_ids == ids[: len(stage.only.token_ids)]
    assert stage.ended == [(stage.sequences[0], FinishReason.STOP, " END")]


def test_a_stop_string_may_be_included(tokenizer):
    ids = tokenizer.encode("a END b")
    assert Stage(tokenizer, stop="END", include_stop_str_in_output=True).play(ids).only.text == "a END"


def test_a_stop_string_before_min_tokens_does_not_count(tokenizer):
    ids = tokenizer.encode("a.b.c.d")
    assert len(ids) == 7
    assert Stage(tokenizer, stop=".", min_tokens=3).play(ids).only.text == "a.b"


def test_a_stop_string_in_the_token_that_reaches_the_limit_is_the_reason_and_the_engine_knows_already(tokenizer):
    stage = Stage(tokenizer, stop="b").play(tokenizer.encode("a.b"), FinishReason.LENGTH)
    assert (stage.only.text, stage.only.finish_reason) == ("a.", FinishReason.STOP)
    assert stage.ended == []


def test_the_end_token_is_listed_but_not_shown(tokenizer):
    end = tokenizer.eos_token_ids[0]
    ids = [*tokenizer.encode("ok"), end]
    stage = Stage(tokenizer, skip_special_tokens=False).play(ids, FinishReason.STOP)
    assert (stage.only.text, stage.only.token_ids, stage.only.stop_reason) == ("ok", ids, None)


def test_a_stop_token_is_shown_only_on_request_and_is_the_stop_reason(tokenizer):
    ids = tokenizer.encode("a.b")
    hidden = Stage(tokenizer).play(ids, FinishReason.STOP, stop_reason=ids[-1])
    assert (hidden.only.text, hidden.only.stop_reason) == ("a.", ids[-1])
    shown = Stage(tokenizer, include_stop_str_in_output=True).play(ids, FinishReason.STOP, stop_reason=ids[-1])
    assert shown.only.text == "a.b"


def test_what_was_held_back_appears_when_the_end_comes_from_elsewhere(tokenizer):
    stage = Stage(tokenizer, stop=["world!"]).play(tokenizer.encode("hello world"), FinishReason.LENGTH)
    assert stage.only.text == "hello world"


def test_a_character_cut_off_by_the_end_is_replaced(tokenizer):
    single = {tokenizer.token_bytes(i): i for i in range(256)}
    ids = [single[bytes([byte])] for byte in "🙂".encode()[:2]]
    assert Stage(tokenizer).play(ids, FinishReason.LENGTH).only.text == "\ufffd"


def test_without_detokenizing_there_are_only_ids(tokenizer):
    ids = tokenizer.encode("hello")
    stage = Stage(tokenizer, detokenize=False).play(ids, FinishReason.LENGTH)
    assert (stage.only.text, stage.only.token_ids) == ("", ids)


def test_a_model_without_a_tokenizer_gives_ids(tokenizer):
    processor = OutputProcessor(None)
    mine = request(prompt=[1, 2])
    processor.add(mine)
    sequence = Sequence(mine)
    (update,), _ = processor.process([TokenOutput(sequence, 7, finish_reason=FinishReason.LENGTH)])
    assert (update.outputs[0].token_ids, update.outputs[0].text) == ([7], "")


def lp(token, value):
    return TokenLogprobs(token, value, 1, ((1, -0.1), (2, -0.2), (3, -0.3)))


def test_logprobs_are_trimmed_to_what_was_asked_and_summed(tokenizer):
    given = [lp(4, -1.0), lp(5, -2.5)]
    stage = Stage(tokenizer, logprobs=2).play([4, 5], FinishReason.LENGTH, logprobs=given)
    assert stage.only.cumulative_logprob == -3.5
    assert [one.top for one in stage.only.logprobs] == [((1, -0.1), (2, -0.2))] * 2
    assert [one.logprob for one in stage.only.logprobs] == [-1.0, -2.5]
    unasked = Stage(tokenizer).play([4, 5], FinishReason.LENGTH, logprobs=given)
    assert (unasked.only.logprobs, unasked.only.cumulative_logprob) == (None, None)


def test_streamed_logprobs_come_with_their_tokens_and_the_sum_runs(tokenizer):
    stage = Stage(tokenizer, logprobs=0, stream=True)
    stage.play([4, 5], FinishReason.LENGTH, logprobs=[lp(4, -1.0), lp(5, -2.5)])
    assert [len(update.outputs[0].logprobs) for update in stage.updates] == [1, 1]
    assert [update.outputs[0].cumulative_logprob for update in stage.updates] == [-1.0, -3.5]


def test_prompt_logprobs_gather_over_chunks_behind_an_empty_first_entry(tokenizer):
    stage = Stage(tokenizer, prompt="abc", prompt_logprobs=1)
    sequence = stage.sequences[0]
    stage.step(TokenOutput(sequence, None, prompt_logprobs=(lp(1, -1.0),)))
    stage.step(TokenOutput(sequence, 9, prompt_logprobs=(lp(2, -2.0),), finish_reason=FinishReason.LENGTH))
    assert stage.updates[0].prompt_logprobs[0] is None
    assert [one.logprob for one in stage.updates[0].prompt_logprobs[1:]] == [-1.0, -2.0]
    assert len(stage.updates[0].prompt_logprobs[1].top) == 1


def test_of_n_completions_the_request_ends_with_the_last(tokenizer):
    stage = Stage(tokenizer, n=2)
    stage.play(tokenizer.encode("b"), FinishReason.LENGTH, index=1)
    assert stage.updates == []
    stage.play(tokenizer.encode("a"), FinishReason.LENGTH, index=0)
    assert [(one.index, one.text) for one in stage.updates[0].outputs] == [(0, "a"), (1, "b")]


def test_a_delta_holds_only_the_completions_that_have_news(tokenizer):
    stage = Stage(tokenizer, n=3, stream=True)
    stage.play(tokenizer.encode("b"), index=1)
    assert [one.index for one in stage.updates[0].outputs] == [1]


def test_a_failed_sequence_ends_the_request_with_its_error_and_its_text_so_far(tokenizer):
    stage = Stage(tokenizer).play(tokenizer.encode("ab"))
    stage.step(TokenOutput(stage.sequences[0], None, finish_reason=FinishReason.ERROR, error="not finite"))
    assert (stage.only.text, stage.only.finish_reason) == ("ab", FinishReason.ERROR)
    assert stage.updates[0].error == "not finite"


def test_a_fault_in_making_text_ends_that_request_alone(tokenizer, monkeypatch, caplog):
    good, bad = (request(name, [1, 2], stop=["needs the text at once"]) for name in ("good", "bad"))
    processor = OutputProcessor(tokenizer)
    for one in (good, bad):
        processor.add(one)
    monkeypatch.setattr(processor._states["bad"].completions[0]._assembler, "push", lambda token: 1 / 0)
    sequences = [Sequence(bad), Sequence(good)]
    updates, ended = processor.process([TokenOutput(sequence, 40) for sequence in sequences])
    assert [(update.request_id, update.error) for update in updates] == [
        ("bad", "making the text failed: ZeroDivisionError")
    ]
    assert ended == [(sequences[0], FinishReason.ERROR, None)]
    assert processor.num_requests == 1
    assert "making its text failed" in caplog.text


@pytest.mark.parametrize("end", ["length", "abort"])
def test_text_that_nobody_waits_for_is_made_at_the_end_and_a_fault_in_it_is_told_then(tokenizer, monkeypatch, end):
    bad = request("bad", [1, 2])
    processor = OutputProcessor(tokenizer)
    processor.add(bad)
    monkeypatch.setattr(processor._states["bad"].completions[0]._assembler, "push", lambda token: 1 / 0)
    sequence = Sequence(bad)
    assert processor.process([TokenOutput(sequence, 40)]) == ([], [])
    if end == "abort":
        update = processor.abort("bad")
    else:
        (update,), ended = processor.process([TokenOutput(sequence, 41, finish_reason=FinishReason.LENGTH)])
        assert ended == []
    assert (update.error, update.finished) == ("making the text failed: ZeroDivisionError", True)
    assert update.outputs[0].finish_reason is FinishReason.ERROR
    assert processor.num_requests == 0


def test_an_abort_gives_what_there_is_and_later_news_is_dropped(tokenizer):
    stage = Stage(tokenizer, stop=["hello!"]).play(tokenizer.encode("hello"))
    update = stage.processor.abort(stage.request.id)
    assert (update.outputs[0].text, update.outputs[0].finish_reason, update.finished) == (
        "hello",
        FinishReason.ABORT,
        True,
    )
    stage.play([5])
    assert stage.updates == []
    assert stage.processor.abort(stage.request.id) is None


def test_news_of_a_sequence_that_a_stop_string_ended_is_dropped(tokenizer):
    stage = Stage(tokenizer, n=2, stop="b")
    stage.play([*tokenizer.encode("a.b"), 5, 6])
    stage.play([5], FinishReason.LENGTH, index=1)
    assert stage.updates[0].outputs[0].text == "a."
    assert len(stage.ended) == 1


def test_times_are_taken_and_speed_counts_the_tokens_after_the_first(tokenizer):
    stage = Stage(tokenizer).play([4, 5, 6], FinishReason.LENGTH)
    timings = stage.updates[0].timings
    assert timings.arrival_s <= timings.first_token_s <= timings.finished_s
    measured = speed(RequestTimings(arrival_s=1.0, first_token_s=1.5, finished_s=3.5), 5)
    assert (measured.ttft_s, measured.tokens_per_s, str(measured)) == (0.5, 2.0, "5 tokens, TTFT 0.500 s, 2.0 tok/s")
    assert speed(RequestTimings(arrival_s=1.0, first_token_s=1.5, finished_s=1.5), 1).tokens_per_s == 2.0
    assert str(speed(None, 0)) == "0 tokens, TTFT -, -"


def test_importing_it_imports_no_jax():
    script = "import sys, jaxllm.engine.output; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
