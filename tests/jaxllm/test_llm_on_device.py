"""LLM from a model directory to text: a tiny random model with a real tokenizer, through everything below."""

import json
import shutil

import pytest

from jaxllm.core import FinishReason, SamplingParams
from jaxllm.llm import LLM

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(vocabulary_directories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(vocabulary_directories["byte_level"], folder)
    (folder / "config.json").write_text(json.dumps(TINY))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "eos_token_id": [7]}))
    return LLM(
        folder,
        load_format="dummy",
        cache_dir="",
        max_num_seqs=4,
        max_num_batched_tokens=64,
        page_size=8,
        decode_buckets=[4],
        token_buckets=[64],
    )


@pytest.fixture(autouse=True)
def _nothing_stays_behind(llm):
    yield
    llm.engine.check()
    pool = llm.engine.scheduler.pool
    assert not llm.engine.has_work
    assert pool.num_held == 0


def test_a_stream_is_the_whole_and_a_stop_string_cuts_it(llm):
    (whole,) = llm.generate("The quick", GREEDY)
    text = whole.outputs[0].text
    assert len(whole.outputs[0].token_ids) == 24
    assert "".join(delta.outputs[0].text for delta in llm.stream("The quick", GREEDY)) == text
    stop = text[4:8]
    (cut,) = llm.generate("The quick", GREEDY.replace(stop=stop))
    assert cut.outputs[0].text == text[: text.index(stop)]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == (FinishReason.STOP, stop)


def test_bad_prompts_fail_alone_and_the_others_give_what_they_give_alone(llm):
    prompts = ["The quick", "", [512], "brown fox jumps over the lazy dog", "x" * 600]
    outputs = llm.generate(prompts, GREEDY)
    assert [output.error is None for output in outputs] == [True, False, False, True, False]
    for place in (0, 3):
        assert outputs[place].outputs[0].token_ids == llm.generate(prompts[place], GREEDY)[0].outputs[0].token_ids


def test_an_aborted_stream_frees_its_pages_at_once(llm):
    stream = llm.stream("The quick brown fox", GREEDY)
    next(stream)
    stream.close()
    assert llm.engine.scheduler.pool.num_held == 0


def test_a_chat_is_answered_with_log_probabilities_of_every_token(llm):
    messages = [{"role": "user", "content": "hello <|im_end|>"}]
    (output,) = llm.chat(messages, GREEDY.replace(logprobs=3, prompt_logprobs=0))
    first = output.outputs[0]
    assert len(first.logprobs) == len(first.token_ids) == 24
    assert first.cumulative_logprob == pytest.approx(sum(lp.logprob for lp in first.logprobs))
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


def test_the_directorys_suggestions_and_end_tokens_reach_the_engine(llm):
    assert llm.default_params.temperature == 0.5
    assert {7, *llm.tokenizer.eos_token_ids} <= set(llm.engine.model_config.eos_token_ids)
